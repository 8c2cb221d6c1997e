"""The recipe of Table 2: its measurements, its verdicts, and what its command writes."""

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
from recipes.precise_batch_size.__main__ import PreciseBatchSize, main
from recipes.precise_batch_size.claims import judge
from recipes.precise_batch_size.experiment import Estimate, Results, Row, estimates_by_b, micro_batch_size
from recipes.run import start

TINY = ["--preset", "smoke", "--data.train_images", "120", "--data.val_images", "60", "--data.batch_size", "20"]
TINY += ["--model.network", "resnet8", "--nbs", "[20,2]", "--images", "60", "--batch_sizes", "[2,40]"]
IMAGES = 10_000


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
    state = copy_of_state(model)
    images = torch.cat([batch[0] for batch in data.training_sample(60, torch.Generator())])
    model.train()
    for bn in lbn.find_bn(model).values():
        bn.momentum = 1.0
    with torch.no_grad():
        model(images)
        model.eval()
        logits = torch.cat([model(batch[0]) for batch in data.val_dataloader()])
    labels = torch.cat([batch[1] for batch in data.val_dataloader()])
    model.load_state_dict(state)
    assert torch.equal(estimates[60].wrong[0], (logits.argmax(1) != labels).double())


@pytest.mark.parametrize(("b", "most", "size"), [(2, 32, 2), (100, 32, 25), (1000, 32, 25), (7, 4, 1)])
def test_whole_micro_batches_make_up_b(b: int, most: int, size: int) -> None:
    assert micro_batch_size(b, most) == size


class NoteNBS(L.Callback):
    """Notes the normalization batch size of the first batch, and the weights before it."""

    notes: list[tuple[set[float], torch.Tensor]]

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if args[-1] == 0:
            sizes = set(lbn.normalization_batch_size(pl_module, samples=20).values())
            self.notes.append(
                (sizes, torch.cat([parameter.detach().flatten() for parameter in pl_module.parameters()]))
            )


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smoke")
    NoteNBS.notes = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "PrintErrors", NoteNBS)
        return main([*TINY, "--out", str(folder)])


def test_the_command_writes_table_figures_and_wandb_runs(command: Path) -> None:
    report = json.loads((command / "report.json").read_text())
    rows = [(row["nbs"], list(row["batch_sizes"])) for row in report["rows"]]
    assert rows == [(20, ["2", "40", "60"]), (2, ["2", "40", "60"])]
    markdown = (command / "report.md").read_text()
    for name in ("batch_size.png", "depth.png"):
        assert f"({name})" in markdown and imread(command / name).std() > 0.05, "an empty picture"
    assert "| NBS 20 |" in markdown and "N=60" in markdown
    assert len(list((command / "wandb").glob("offline-run-*"))) == 3


def test_the_models_of_a_seed_start_alike_and_differ_in_their_nbs(command: Path) -> None:
    (usual, weights), (small, same) = NoteNBS.notes
    assert (usual, small) == ({20}, {2}) and torch.equal(weights, same)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--nbs", "[32,2]"], "nbs 32 is larger than the batch of 20"),
        (["--images", "200"], "images is 200, but there are only 120"),
    ],
)
def test_impossible_settings_are_errors_before_any_training(settings: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        experiment.measure(start(PreciseBatchSize(), [*TINY, *settings, "--out", str(tmp_path)]))


def wrong(error: float) -> torch.Tensor:
    images = torch.zeros(2, IMAGES, dtype=torch.float64)
    images[:, : round(error / 100 * IMAGES)] = 1
    return images


def results(usual: dict[int, float] = {}, small: dict[int, float] = {}, last: float = 0.1) -> Results:  # noqa: B006
    """Table 2 as in the paper (0 is the EMA), except for the errors given."""
    paper = {
        32: {0: 23.7, 2: 28.8, 10: 24.0, 100: 23.5, 1000: 23.5, 2000: 23.5, **usual},
        2: {0: 35.5, 2: 34.4, 10: 32.3, 100: 32.0, 1000: 32.0, 2000: 32.0, **small},
    }
    gaps = torch.linspace(0.01, last, 9).view(1, 9, 1).repeat(2, 1, 2)
    rows = []
    for nbs, errors in paper.items():
        made = {b: Estimate(wrong(error), gaps, [1.0, 1.0]) for b, error in errors.items()}
        rows.append(Row(nbs, 0, made.pop(0), made))
    return Results("data", 4000, IMAGES, 2000, [f"bn{i}" for i in range(9)], rows, [])


def test_the_papers_numbers_hold() -> None:
    assert [claim.verdict for claim in judge(results())] == ["holds"] * 12


@pytest.mark.parametrize(
    ("words", "contrary"),
    [
        ("NBS 32: B = 2 is worse", {"usual": {2: 20.0}}),
        ("NBS 32: B = 10 is worse", {"usual": {10: 20.0}}),
        ("NBS 2: B = 2 is worse", {"small": {2: 20.0}}),
        ("NBS 32: B = 100 suffices", {"usual": {100: 27.0}}),
        ("NBS 2: B = 1,000 suffices", {"small": {1000: 27.0}}),
        ("NBS 2: PreciseBN with B = 100 beats the EMA", {"small": {0: 27.0}}),
        ("the NBS 2 model is still worse", {"small": {2000: 20.0}}),
        ("NBS 32: the error of small B grows", {"last": 0.001}),
    ],
)
def test_a_claim_that_the_numbers_contradict_does_not_hold(words: str, contrary: dict[str, Any]) -> None:
    (verdict,) = (claim.verdict for claim in judge(results(**contrary)) if words in claim.claim)
    assert verdict == "does not hold"
