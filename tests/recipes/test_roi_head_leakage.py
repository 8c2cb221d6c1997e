"""The recipe of Tables 3 and 6: its scenes and heads are what it says, and its verdicts are decided by the numbers."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import lightning_bn as lbn
from recipes.roi_head_leakage.__main__ import make_parser
from recipes.roi_head_leakage.claims import ORDERINGS, PAPER, claims
from recipes.roi_head_leakage.coco import Coco
from recipes.roi_head_leakage.detector import HEADS, Detector, average_precision
from recipes.roi_head_leakage.experiment import AP, TRAININGS, Parts, Results, Row, roi_head_leakage
from recipes.roi_head_leakage.scenes import STAMPS, ComposedScenes, SceneData, as_lists, stamps

SCHEDULE = Path(__file__).parents[2] / "recipes" / "roi_head_leakage" / "coco.yaml"


@pytest.fixture(scope="module")
def data() -> SceneData:
    return SceneData(train_images=40, val_images=10)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the real command, in a process of its own: it forks its ranks."""
    folder = tmp_path_factory.mktemp("smoke")
    command = [sys.executable, "-m", "recipes.roi_head_leakage", "--preset", "smoke", "--out", str(folder)]
    subprocess.run(command, check=True, env={**os.environ, "WANDB_MODE": "offline"}, timeout=240)
    return folder


@pytest.mark.ddp
def test_one_training_is_evaluated_with_both_statistics_and_another_with_one(smoke: Path) -> None:
    report = json.loads((smoke / "report.json").read_text())
    rows = [(row["training"], row["inference"]) for row in report["rows"]]
    assert rows == [("bn-1", "population"), ("bn-1", "mini-batch"), ("shuffle-1", "population")]
    assert report["rows"][0]["seconds"] == report["rows"][1]["seconds"], "trained once"
    assert (report["ranks"], report["steps"], report["images_per_step"]) == (2, 4, 4)
    assert len(report["claims"]) == 2


TRAIN_ONE = """
import sys, torch
from recipes.roi_head_leakage.detector import Detector
from recipes.roi_head_leakage.experiment import TRAININGS, Parts, train
from recipes.roi_head_leakage.scenes import SceneData
torch.set_num_threads(1)
model = Detector(pretrained=False, regions=8, warmup_steps=1)
before = {name: value.clone() for name, value in model.state_dict().items()}
quiet = dict(accelerator="cpu", max_epochs=1, enable_checkpointing=False, enable_progress_bar=False)
steps = train(Parts(model, SceneData(train_images=8, images_per_gpu=1), quiet), TRAININGS["bn-1"], 2, 4)
moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
head = {name for name in before if "box_head" in name}
tracked = {int(value) for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")}
assert steps == 2 and tracked == {4}, (steps, tracked)
assert head <= moved, head - moved
assert not any("backbone.body.0" in name for name in moved)
"""


@pytest.mark.ddp
def test_what_the_ranks_trained_comes_back_with_its_statistics_and_frozen_layers_stay() -> None:
    subprocess.run([sys.executable, "-c", TRAIN_ONE], check=True, timeout=240)


@pytest.mark.ddp
def test_the_report_has_the_papers_numbers_and_a_picture(smoke: Path) -> None:
    markdown = (smoke / "report.md").read_text()
    assert "| per-GPU BN | 1 | mini-batch | 41.5 / 37.0 |" in markdown
    assert (smoke / "ap.png").stat().st_size > 5000 and list((smoke / "wandb").glob("offline-run-*"))


def test_a_scene_is_the_same_every_time_and_another_in_validation(data: SceneData) -> None:
    image, target = data.train_set[3]
    again, same = data.train_set[3]
    assert torch.equal(image, again) and torch.equal(target["boxes"], same["boxes"])
    assert not torch.equal(image, data.val_set[3][0])


def test_boxes_are_those_of_the_masks_and_do_not_overlap(data: SceneData) -> None:
    for index in range(40):
        _, target = data.train_set[index]
        masks = target["masks"]
        assert 1 <= len(masks) <= 5 and masks.sum(0).max() == 1
        for mask, (left, top, right, bottom) in zip(masks, target["boxes"].int().tolist(), strict=True):
            assert mask[top:bottom, left:right].sum() == mask.sum() > 0
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            assert abs(rows.max() + 1 - rows.min() - (bottom - top)) <= 6, "trimmed, then resized"
            assert abs(columns.max() + 1 - columns.min() - (right - left)) <= 6


def test_scenes_are_of_a_single_class_unless_asked_otherwise(data: SceneData) -> None:
    kinds = {index: len(set(data.train_set[index][1]["labels"].tolist())) for index in range(40)}
    assert set(kinds.values()) == {1}
    mixed = SceneData(train_images=40, val_images=10, single_class=False).train_set
    assert max(len(set(mixed[index][1]["labels"].tolist())) for index in range(40)) > 2


def test_validation_has_cut_outs_of_its_own(data: SceneData) -> None:
    def contents(scenes: Any) -> set[bytes]:
        assert isinstance(scenes, ComposedScenes)
        return {one[..., 3].tobytes() for of_class in scenes.cut_outs for one in of_class}

    train, val = contents(data.train_set), contents(data.val_set)
    assert len(train) > 3900 and len(val) > 900 and not train & val


def test_a_folder_of_transparent_pngs_gives_its_folders_as_classes(tmp_path: Path) -> None:
    pixels = np.zeros((20, 30, 4), dtype=np.uint8)
    pixels[5:15, 10:22] = 255
    for kind, count in (("animals", 16), ("few", 3)):
        (tmp_path / kind / "deep").mkdir(parents=True)
        for index in range(count):
            Image.fromarray(pixels).save(tmp_path / kind / "deep" / f"{index}.png")
        Image.fromarray(pixels).save(tmp_path / kind / "0_mirror.png")
        Image.fromarray(pixels[..., :3]).save(tmp_path / kind / "opaque.png")
    found = stamps(tmp_path)
    assert found.classes == ["animals"]
    assert (len(found.train[0]), len(found.val[0])) == (12, 4)
    assert found.train[0][0].shape == (10, 12, 4), "trimmed to what is opaque"


def test_missing_stamps_say_which_package_brings_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        stamps(tmp_path / "none")
    if not STAMPS.exists():
        with pytest.raises(FileNotFoundError, match="apt-get install tuxpaint-stamps-default"):
            stamps(STAMPS)


@pytest.mark.parametrize("masks", [False, True])
def test_only_the_heads_have_batch_norm_and_the_patterns_find_all_of_it(masks: bool) -> None:
    model = Detector(pretrained=False, masks=masks)
    layers = lbn.find_bn(model)
    assert len(layers) == (8 if masks else 4)
    assert list(lbn.find_bn(model, f"{HEADS}.*")) == list(layers)
    for norm, kind in (("GN", nn.GroupNorm), ("none", None)):
        other = Detector(head_norm=norm, pretrained=False, masks=masks)  # type: ignore[arg-type]
        assert not any(isinstance(module, nn.BatchNorm2d) for module in other.modules())
        assert sum(isinstance(module, nn.GroupNorm) for module in other.modules()) == (len(layers) if kind else 0)


def test_mask_rcnn_trains_and_finds_boxes_and_masks(data: SceneData) -> None:
    model = Detector(pretrained=False, masks=True, regions=8, regions_in_evaluation=8)
    batch = as_lists([data.train_set[0], data.train_set[1]])
    model.training_step(batch, 0).backward()
    model.eval().validation_step(batch, 0)
    assert len(model.found) == 2 and model.kinds == ("bbox", "segm")
    assert model.found[0][0]["masks"].shape[1:] == (128, 128)


def test_what_is_found_exactly_has_an_ap_of_100_and_what_is_missed_of_0(data: SceneData) -> None:
    targets = [data.val_set[index][1] for index in range(10)]
    exact = [({**target, "scores": torch.ones(len(target["labels"]))}, target) for target in targets]
    assert average_precision(exact, "bbox") == pytest.approx(100)
    assert average_precision(exact, "segm") == pytest.approx(100)
    missed = [({**one, "labels": one["labels"] % 10 + 1}, target) for one, target in exact]
    assert average_precision(missed, "bbox") == pytest.approx(0)


def results(box_ap: dict[tuple[str, Any], float], spread: float = 0.1) -> Results:
    """Three seeds and four parts, whose APs spread around these."""
    rows = []
    for seed in range(3):
        for index, ((training, inference), ap) in enumerate(box_ap.items()):
            own = torch.Generator().manual_seed(100 * seed + index)
            parts = (ap + spread * torch.randn(5, generator=own)).tolist()
            rows.append(Row(training, inference, seed, AP(parts[0], parts[1:]), None, 1.0))
    return Results("data", 2, 10, 4, 20, rows)


def test_the_papers_own_numbers_hold_and_reversed_ones_do_not() -> None:
    paper = {cell: box for cell, (box, _) in PAPER.items()}
    assert {claim.verdict for claim in claims(results(paper, spread=0.02))} == {"holds"}
    turned = claims(results({cell: 80 - box for cell, box in paper.items()}, spread=0.02))
    ordered = [claim for claim in turned if "as good" not in claim.claim]
    assert len(ordered) == 8 and {claim.verdict for claim in ordered} == {"does not hold"}


def test_a_wide_spread_decides_nothing() -> None:
    paper = {cell: box for cell, (box, _) in PAPER.items()}
    assert {claim.verdict for claim in claims(results(paper, spread=200.0))} == {"within noise"}


def test_with_one_seed_the_parts_of_the_images_say_how_sure_it_is() -> None:
    paper = {cell: box for cell, (box, _) in PAPER.items()}
    three = results(paper, spread=200.0)
    one = replace(three, rows=[replace(row, box=replace(row.box, of_all=40.0)) for row in three.rows if row.seed == 0])
    assert {claim.verdict for claim in claims(one)} == {"within noise"}
    same = [replace(row, box=AP(PAPER[row.training, row.inference][0], [1.0] * 4)) for row in one.rows]
    assert {claim.verdict for claim in claims(replace(one, rows=same))} == {"holds"}, "of all images, not of the parts"


def test_the_claims_are_about_rows_of_the_tables_and_every_row_is_trained() -> None:
    assert {cell for _, a, b, _ in ORDERINGS for cell in (a, b)} <= set(PAPER)
    assert [(key, inference) for key, one in TRAININGS.items() for inference in one.inferences] == list(PAPER)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seeds": []}, "seeds is empty"),
        ({"trainings": ["bn-3"]}, "trainings must be some of bn-1"),
        ({"images_per_step": 6}, "training bn-2 has 4 images on its 2 ranks"),
    ],
)
def test_impossible_settings_are_refused_before_any_training(settings: dict[str, Any], words: str) -> None:
    def make(norm: Any, images_per_gpu: int) -> Parts:
        raise AssertionError("nothing is made")

    with pytest.raises(ValueError, match=words):
        roi_head_leakage(make, **settings)


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / f"{split}2017").mkdir()
        Image.new("RGB", (40, 30), (255, 0, 0)).save(tmp_path / f"{split}2017" / "7.jpg")
        found = {"image_id": 7, "category_id": 90, "iscrowd": 0, "bbox": [5, 6, 10, 12]}
        found["segmentation"] = [[5, 6, 14, 6, 14, 17, 5, 17]]
        crowd = {**found, "iscrowd": 1, "segmentation": {}}
        images = [{"id": 7, "file_name": "7.jpg"}, {"id": 8, "file_name": "empty.jpg"}]
        table = {"images": images, "annotations": [found, crowd], "categories": [{"id": 3}, {"id": 90}]}
        (tmp_path / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(table))
    return tmp_path


def test_coco_gives_corners_labels_without_holes_and_masks_and_leaves_out_crowds(coco: Path) -> None:
    data = SceneData(root=coco)
    assert data.num_classes == 3 and len(data.train_set) == 1  # type: ignore[arg-type]
    image, target = data.train_set[0]
    assert image.shape == (3, 30, 40) and image[0].min() > 0.9
    assert target["boxes"].tolist() == [[5, 6, 15, 18]] and target["labels"].tolist() == [2]
    assert target["masks"].shape == (1, 30, 40) and target["masks"].sum() == 10 * 12


def test_a_folder_that_is_not_coco_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="the folder that COCO 2017 was unpacked in"):
        Coco(tmp_path, "train")


def test_the_config_of_the_papers_schedule_is_read() -> None:
    config = make_parser("demo").parse_args(["--config", str(SCHEDULE), "--data-root", "coco"])
    assert config.data.root == Path("coco") and config.model.masks and config.images_per_step == 16
    assert config.trainer.max_steps == 90_000
