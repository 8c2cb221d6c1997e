"""The recipe of Table 2: its measurements, its verdicts, and what its command writes."""

import copy
import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from matplotlib.image import imread

import lightning_bn as lbn
from recipes.classifier import ImageClassifier
from recipes.evaluation import copy_of_state
from recipes.images import ImageData
from recipes.precise_batch_size import experiment
from recipes.precise_batch_size.__main__ import main
from recipes.precise_batch_size.experiment import Estimate, estimates_by_b, micro_batch_size

TINY = ["--preset", "smoke", "--data.train_images", "120", "--data.val_images", "60", "--data.batch_size", "20"]
TINY += ["--model.network", "resnet8", "--nbs", "[20,2]", "--images", "60", "--batch_sizes", "[2,40]"]


@pytest.fixture(scope="module")
def data() -> ImageData:
    data = ImageData(train_images=60, val_images=30, batch_size=20)
    data.train_set.dataset.shift = 0  # type: ignore[attr-defined]
    data.train_set.dataset.padded = data.train_set.dataset.padded[..., 3:-3, 3:-3]  # type: ignore[attr-defined]
    return data


@pytest.fixture(scope="module")
def model() -> ImageClassifier:
    torch.manual_seed(0)
    return ImageClassifier(width=8)


@pytest.fixture(scope="module")
def estimates(model: ImageClassifier, data: ImageData) -> dict[int, Estimate]:
    before = copy_of_state(model)
    _, estimates = estimates_by_b(model, data, [2, 20, 40, 500], images=60, draws=2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "restored"
    return estimates


def test_every_b_is_estimated_once_per_draw_from_the_same_images(estimates: dict[int, Estimate]) -> None:
    assert list(estimates) == [2, 20, 40, 60], "500 are more than there are"
    for estimate in estimates.values():
        assert estimate.wrong.shape == (2, 30) and len(estimate.seconds) == 2 and estimate.gaps.shape == (2, 9, 2)
        assert estimate.gaps[:, 0].max() < 1e-4, "the first layer's input does not depend on B"


def test_small_b_is_further_from_exact_than_large_b(estimates: dict[int, Estimate]) -> None:
    deepest = [float(estimates[b].gaps[:, -3:, 1].mean()) for b in (2, 20, 40, 60)]
    assert deepest == sorted(deepest, reverse=True) and deepest[0] > 3 * deepest[2] > 0
    assert estimates[60].gaps.abs().max() == 0


def test_the_exact_statistics_are_those_of_one_forward_of_all_images(
    estimates: dict[int, Estimate], model: ImageClassifier, data: ImageData
) -> None:
    one_forward = copy.deepcopy(model).train()
    for bn in lbn.find_bn(one_forward).values():
        bn.momentum = 1.0
    with torch.no_grad():
        one_forward(torch.cat([images for images, _ in data.training_sample(60, torch.Generator())]))
        logits = torch.cat([one_forward.eval()(images) for images, _ in data.val_dataloader()])
    labels = torch.cat([labels for _, labels in data.val_dataloader()])
    assert torch.equal(estimates[60].wrong[0], (logits.argmax(1) != labels).double())


def test_whole_micro_batches_make_up_b() -> None:
    assert [micro_batch_size(b, most) for b, most in ((2, 32), (100, 32), (1000, 32), (7, 4))] == [2, 25, 25, 1]


class NoteNBS(L.Callback):
    """Notes the normalization batch size of the first batch, and the weights before it."""

    notes: list[tuple[set[float], torch.Tensor]]

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if args[-1] == 0:
            sizes = set(lbn.normalization_batch_size(pl_module, samples=20).values())
            self.notes.append((sizes, torch.cat([p.detach().flatten() for p in pl_module.parameters()])))


def test_the_command_writes_table_figures_and_wandb_runs_of_models_that_differ_in_their_nbs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    NoteNBS.notes = []
    monkeypatch.setattr(experiment, "PrintErrors", NoteNBS)
    command = main([*TINY, "--out", str(tmp_path)])
    report = json.loads((command / "report.json").read_text())
    rows = [(row["nbs"], list(row["batch_sizes"])) for row in report["rows"]]
    assert rows == [(20, ["2", "40", "60"]), (2, ["2", "40", "60"])]
    markdown = (command / "report.md").read_text()
    for name in ("batch_size.png", "depth.png"):
        assert f"({name})" in markdown and imread(command / name).std() > 0.05, "an empty picture"
    assert "| NBS 20 |" in markdown and "N=60" in markdown
    assert len(list((command / "wandb").glob("offline-run-*"))) == 3
    (usual, weights), (small, same) = NoteNBS.notes
    assert (usual, small) == ({20}, {2}) and torch.equal(weights, same)
