"""The recipe of Tables 3 and 6: its heads, its trainings on ranks, its verdicts, and what its command writes."""

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
from recipes.roi_head_leakage.__main__ import RoIHeadLeakage
from recipes.roi_head_leakage.claims import ORDERINGS, PAPER, judge
from recipes.roi_head_leakage.detector import HEADS, Detector
from recipes.roi_head_leakage.experiment import TRAININGS, Results, Row, measure
from recipes.run import start
from recipes.scenes import SceneData, as_lists
from tests.ranks import in_a_fresh_process

TINY = ["--preset", "smoke", "--data.train_images", "8", "--data.val_images", "2", "--model.regions", "8"]
TINY += ["--model.regions_in_evaluation", "8"]
BOX = {cell: box for cell, (box, _) in PAPER.items()}


@pytest.mark.ddp
def test_the_command_trains_on_two_ranks_and_evaluates_with_both_statistics(tmp_path: Path) -> None:
    # In a new process, because it forks its ranks.
    command = [sys.executable, "-m", "recipes.roi_head_leakage", *TINY, "--out", str(tmp_path)]
    subprocess.run(command, check=True, env={**os.environ, "WANDB_MODE": "offline"}, timeout=240)
    report = json.loads((tmp_path / "report.json").read_text())
    rows = [(row["training"], row["inference"]) for row in report["rows"]]
    assert rows == [("bn-1", "population"), ("bn-1", "mini-batch"), ("shuffle-1", "population")]
    assert report["rows"][0]["seconds"] == report["rows"][1]["seconds"], "trained once"
    assert (report["ranks"], report["steps"], report["images_per_step"]) == (2, 2, 4)
    assert len(report["claims"]) == 2
    assert "| per-GPU BN | 1 | mini-batch | 41.5 / 37.0 |" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "ap.png").stat().st_size > 5000 and list((tmp_path / "wandb").glob("offline-run-*"))


def trained() -> tuple[int, set[str], set[int], list[str]]:
    """Steps, names of changed tensors, numbers of tracked batches, and all names, after a training on two ranks."""
    model = Detector(pretrained=False, regions=8, warmup_steps=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    quiet = {"accelerator": "cpu", "max_epochs": 1, "enable_progress_bar": False}
    parts = Parts(model, SceneData(train_images=8, images_per_gpu=1), quiet)
    steps = train(parts, TRAININGS["bn-1"].callbacks(), 2, 4)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    tracked = {int(value) for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")}
    return steps, moved, tracked, list(before)


@pytest.mark.ddp
def test_the_ranks_return_the_trained_weights_and_statistics_and_frozen_layers_stay() -> None:
    steps, moved, tracked, names = in_a_fresh_process(trained)
    assert steps == 2 and tracked == {4}
    assert {name for name in names if "box_head" in name} <= moved
    assert not any("backbone.body.0" in name for name in moved)


@pytest.mark.parametrize("masks", [False, True])
def test_only_the_heads_have_batch_norm_and_the_patterns_match_all_of_it(masks: bool) -> None:
    model = Detector(pretrained=False, masks=masks)
    layers = lbn.find_bn(model)
    assert len(layers) == (8 if masks else 4)
    assert list(lbn.find_bn(model, f"{HEADS}.*")) == list(layers)
    for norm, kind in (("GN", nn.GroupNorm), ("none", None)):
        other = Detector(head_norm=norm, pretrained=False, masks=masks)  # type: ignore[arg-type]
        assert not any(isinstance(module, nn.BatchNorm2d) for module in other.modules())
        assert sum(isinstance(module, nn.GroupNorm) for module in other.modules()) == (len(layers) if kind else 0)


def test_mask_rcnn_trains_and_predicts_boxes_and_masks() -> None:
    data = SceneData(train_images=2, val_images=1)
    model = Detector(pretrained=False, masks=True, regions=8, regions_in_evaluation=8)
    batch = as_lists([data.train_set[0], data.train_set[1]])
    model.training_step(batch, 0).backward()
    model.eval().validation_step(batch, 0)
    assert len(model.detections) == 2 and model.kinds == ("bbox", "segm")
    assert model.detections[0][0]["masks"].shape[1:] == (128, 128)


def results(box_ap: dict[Any, float], spread: float) -> Results:
    """Three seeds and four parts, whose APs spread around these."""
    rows = []
    for seed in range(3):
        for index, ((training, inference), ap) in enumerate(box_ap.items()):
            generator = torch.Generator().manual_seed(100 * seed + index)
            parts = (ap + spread * torch.randn(5, generator=generator)).tolist()
            rows.append(Row(training, inference, seed, AP(parts[0], parts[1:]), None, 1.0))
    return Results("data", 2, 10, 4, 20, rows)


def test_the_papers_numbers_hold_reversed_ones_do_not_and_a_wide_spread_decides_nothing() -> None:
    assert {claim.verdict for claim in judge(results(BOX, spread=0.02))} == {"holds"}
    turned = judge(results({cell: 80 - box for cell, box in BOX.items()}, spread=0.02))
    ordered = [claim for claim in turned if "as good" not in claim.claim]
    assert len(ordered) == 8 and {claim.verdict for claim in ordered} == {"does not hold"}
    assert {claim.verdict for claim in judge(results(BOX, spread=200.0))} == {"within noise"}


def test_with_one_seed_the_parts_of_the_images_decide() -> None:
    first = [row for row in results(BOX, spread=200.0).rows if row.seed == 0]
    one = replace(results(BOX, 0.0), rows=[replace(row, box=replace(row.box, all_images=40.0)) for row in first])
    assert {claim.verdict for claim in judge(one)} == {"within noise"}
    same = [replace(row, box=AP(PAPER[row.training, row.inference][0], [1.0] * 4)) for row in one.rows]
    assert {claim.verdict for claim in judge(replace(one, rows=same))} == {"holds"}, "of all images, not of the parts"


def test_claims_are_about_rows_of_the_tables_and_every_row_is_trained() -> None:
    assert {cell for _, a, b, _ in ORDERINGS for cell in (a, b)} <= set(PAPER)
    assert [(key, inference) for key, one in TRAININGS.items() for inference in one.inferences] == list(PAPER)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--trainings", "[bn-3]"], "trainings must be some of bn-1"),
        (["--trainings", "[bn-2]", "--images_per_step", "6"], "training bn-2 has batches of 4 images on 2 ranks"),
    ],
)
def test_impossible_settings_are_errors_before_any_training(settings: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        measure(start(RoIHeadLeakage(), [*TINY, *settings, "--out", str(tmp_path)]))
