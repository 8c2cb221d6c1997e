"""The recipe of Tables 3 and 6: its scenes and heads are what it says, and its verdicts are decided by the numbers."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightning_bn as lbn
from recipes.average_precision import AP
from recipes.detection import Parts, train
from recipes.roi_head_leakage.__main__ import make_parser
from recipes.roi_head_leakage.claims import ORDERINGS, PAPER, claims
from recipes.roi_head_leakage.detector import HEADS, Detector
from recipes.roi_head_leakage.experiment import TRAININGS, Results, Row, roi_head_leakage
from recipes.scenes import SceneData, as_lists
from tests.ranks import in_a_fresh_process

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


def trained() -> tuple[int, set[str], set[int], list[str]]:
    """Steps, what has moved, batches tracked, and all names of a detector that two ranks have trained."""
    model = Detector(pretrained=False, regions=8, warmup_steps=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    quiet = {"accelerator": "cpu", "max_epochs": 1, "enable_checkpointing": False, "enable_progress_bar": False}
    parts = Parts(model, SceneData(train_images=8, images_per_gpu=1), quiet)
    steps = train(parts, TRAININGS["bn-1"].callbacks(), 2, 4)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    tracked = {int(value) for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")}
    return steps, moved, tracked, list(before)


@pytest.mark.ddp
def test_what_the_ranks_trained_comes_back_with_its_statistics_and_frozen_layers_stay() -> None:
    steps, moved, tracked, names = in_a_fresh_process(trained)
    assert steps == 2 and tracked == {4}
    assert {name for name in names if "box_head" in name} <= moved
    assert not any("backbone.body.0" in name for name in moved)


@pytest.mark.ddp
def test_the_report_has_the_papers_numbers_and_a_picture(smoke: Path) -> None:
    markdown = (smoke / "report.md").read_text()
    assert "| per-GPU BN | 1 | mini-batch | 41.5 / 37.0 |" in markdown
    assert (smoke / "ap.png").stat().st_size > 5000 and list((smoke / "wandb").glob("offline-run-*"))


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
    def make(norm: Any, images_per_gpu: int) -> Parts[Detector]:
        raise AssertionError("nothing is made")

    with pytest.raises(ValueError, match=words):
        roi_head_leakage(make, **settings)


def test_the_config_of_the_papers_schedule_is_read() -> None:
    config = make_parser("demo").parse_args(["--config", str(SCHEDULE), "--data-root", "coco"])
    assert config.data.root == Path("coco") and config.model.masks and config.images_per_step == 16
    assert config.trainer.max_steps == 270_000
