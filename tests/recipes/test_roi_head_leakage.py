"""The recipe of Tables 3 and 6: its heads, its trainings on ranks, and what its command writes."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import lightning_bn as lbn
from recipes.detection import Parts, train
from recipes.roi_head_leakage.detector import HEADS, Detector
from recipes.roi_head_leakage.experiment import TRAININGS
from recipes.scenes import SceneData, as_lists
from tests.ranks import in_a_fresh_process
from tests.recipes.commands import run_command

TINY = ["--preset", "smoke", "--data.train_images", "8", "--data.val_images", "2", "--model.regions", "8"]
TINY += ["--model.regions_in_evaluation", "8"]


@pytest.mark.ddp
def test_the_command_trains_on_two_ranks_and_evaluates_with_both_statistics(tmp_path: Path) -> None:
    run_command("roi_head_leakage", TINY, tmp_path)
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
