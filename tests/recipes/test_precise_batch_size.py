"""The recipe of Table 2: what it measures is what it says, and its verdicts are decided by the numbers."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from matplotlib.image import imread

import lightning_bn as lbn
from recipes.claims import Claim
from recipes.classifier import ImageClassifier
from recipes.images import ImageData
from recipes.precise_batch_size.__main__ import PRESETS, main, make_parser
from recipes.precise_batch_size.claims import claims
from recipes.precise_batch_size.experiment import (
    Estimate,
    Parts,
    Results,
    Row,
    micro_batch,
    precise_batch_size,
    table_row,
    train,
)
from recipes.registry import all_recipes
from tests.recipes.offline import offline, wandb_runs  # noqa: F401

TINY = ["--preset", "smoke", "--data.train_images", "120", "--data.val_images", "60", "--data.batch_size", "20"]
TINY += ["--model.network", "resnet8", "--nbs", "[20,2]", "--images", "60"]
TINY += ["--batch_sizes", "[2,40]", "--draws", "2"]
IMAGES = 10_000


def no_logger(nbs: int, seed: int) -> bool:
    return False


def make(**settings: Any) -> Parts:
    data = ImageData(train_images=60, val_images=30, batch_size=20)
    quiet = {"max_epochs": 1, "enable_progress_bar": False, "enable_checkpointing": False, "num_sanity_val_steps": 0}
    return Parts(ImageClassifier(width=8), data, {**quiet, "enable_model_summary": False, **settings})


@pytest.fixture(scope="module")
def row() -> Row:
    torch.manual_seed(0)
    return table_row(make(), 20, 0, batch_sizes=[2, 20, 40, 500], images=60, draws=2, say=lambda line: None)


def test_every_b_is_estimated_once_a_draw_and_all_images_as_one_batch_come_last(row: Row) -> None:
    assert list(row.precise) == [2, 20, 40, 60], "500 are more than there are"
    for estimate in row.precise.values():
        assert estimate.wrong.shape == (2, 30) and len(estimate.seconds) == 2
        assert estimate.gaps.shape == (2, 9, 2)


def test_every_b_sees_the_same_images(row: Row) -> None:
    for estimate in row.precise.values():
        assert estimate.gaps[:, 0].max() < 1e-5, "the first layer's input does not depend on B"


def test_small_b_is_further_from_exact_than_large_b_and_all_images_are_exact(row: Row) -> None:
    deepest = [float(row.precise[b].gaps[:, -3:, 1].mean()) for b in (2, 20, 40, 60)]
    assert deepest == sorted(deepest, reverse=True) and deepest[0] > 3 * deepest[2] > 0
    assert row.precise[60].gaps.abs().max() == 0


def test_the_exact_statistics_are_those_of_one_forward_of_all_images() -> None:
    parts = make()
    parts.data.train_set.dataset.shift = 0  # type: ignore[attr-defined]
    parts.data.train_set.dataset.padded = parts.data.train_set.dataset.padded[..., 3:-3, 3:-3]  # type: ignore[attr-defined]
    found = table_row(parts, 20, 0, batch_sizes=[2], images=60, draws=1, say=lambda line: None)
    images = torch.cat([batch[0] for batch in parts.data.training_sample(60, torch.Generator())])
    parts.model.train()
    for bn in lbn.find_bn(parts.model).values():
        bn.momentum = 1.0
    with torch.no_grad():
        parts.model(images)
    parts.model.eval()
    logits = torch.cat([parts.model(batch[0]) for batch in parts.data.val_dataloader()])
    labels = torch.cat([batch[1] for batch in parts.data.val_dataloader()])
    assert torch.equal(found.precise[60].wrong[0], (logits.argmax(1) != labels).double())


def test_the_model_is_left_as_it_was() -> None:
    parts = make()
    before = {name: value.clone() for name, value in parts.model.state_dict().items()}
    table_row(parts, 20, 0, batch_sizes=[2], images=60, draws=1, say=lambda line: None)
    assert all(torch.equal(value, before[name]) for name, value in parts.model.state_dict().items())


@pytest.mark.parametrize(("b", "loaded", "size"), [(2, 32, 2), (10, 32, 10), (100, 32, 25), (1000, 32, 25), (7, 4, 1)])
def test_whole_micro_batches_make_up_b(b: int, loaded: int, size: int) -> None:
    assert micro_batch(b, loaded) == size


class NBS(L.Callback):
    """Notes what the layers of the first batch normalize together, and the weights before it."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if args[-1] == 0:
            self.found = set(lbn.normalization_batch_size(pl_module, samples=20).values())
            self.weights = torch.cat([parameter.detach().flatten() for parameter in pl_module.parameters()])


def test_the_models_of_a_seed_start_alike_and_differ_in_what_is_normalized_together() -> None:
    noted = {nbs: NBS() for nbs in (20, 2)}
    for nbs, note in noted.items():
        train(nbs, 0, lambda note=note: make(callbacks=[note]), no_logger, lambda line: None)  # type: ignore[misc]
    assert {nbs: note.found for nbs, note in noted.items()} == {20: {20}, 2: {2}}
    assert torch.equal(noted[20].weights, noted[2].weights)


def test_what_cannot_be_is_refused_before_any_training() -> None:
    with pytest.raises(ValueError, match="20 images cannot be normalized 32 together"):
        precise_batch_size(make, no_logger, nbs=[32, 2])
    with pytest.raises(ValueError, match="100 images were asked for, but there are only 60"):
        precise_batch_size(make, no_logger, nbs=[20, 2], images=100)
    with pytest.raises(ValueError, match=r"--seeds \[0\]"):
        precise_batch_size(make, no_logger, seeds=[])


def wrong(error: float) -> torch.Tensor:
    images = torch.zeros(2, IMAGES, dtype=torch.float64)
    images[:, : round(error / 100 * IMAGES)] = 1
    return images


def results(usual: dict[int, float] = {}, small: dict[int, float] = {}, last: float = 0.1) -> Results:  # noqa: B006
    """Table 2 as in the paper (0 is the EMA), but for the errors given."""
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


def test_the_papers_own_numbers_hold() -> None:
    assert {claim.verdict for claim in claims(results())} == {"holds"}
    assert len(claims(results())) == 12


@pytest.mark.parametrize(
    ("words", "contrary"),
    [
        ("NBS 32: B = 2 is worse", {"usual": {2: 20.0}}),
        ("NBS 32: B = 10 is worse", {"usual": {10: 20.0}}),
        ("NBS 2: B = 2 is worse", {"small": {2: 20.0}}),
        ("NBS 32: B = 100 suffices", {"usual": {100: 27.0}}),
        ("NBS 2: B = 1,000 suffices", {"small": {1000: 27.0}}),
        ("NBS 2: PreciseBN with B = 100 beats the EMA", {"small": {0: 27.0}}),
        ("the NBS 2 model is worse", {"small": {2000: 20.0}}),
        ("NBS 32: the error of small B grows", {"last": 0.001}),
    ],
)
def test_a_claim_that_the_numbers_contradict_does_not_hold(words: str, contrary: dict[str, Any]) -> None:
    found: list[Claim] = claims(results(**contrary))
    (verdict,) = (claim.verdict for claim in found if words in claim.claim)
    assert verdict == "does not hold"


def test_the_command_writes_table_figures_and_wandb_runs(tmp_path: Path) -> None:
    main([*TINY, "--out", str(tmp_path)])
    report = json.loads((tmp_path / "report.json").read_text())
    assert [(row["nbs"], list(row["batch_sizes"])) for row in report["rows"]] == [
        (20, ["2", "40", "60"]),
        (2, ["2", "40", "60"]),
    ]
    markdown = (tmp_path / "report.md").read_text()
    for name in ("batch_size.png", "depth.png"):
        assert f"({name})" in markdown and imread(tmp_path / name).std() > 0.05, "an empty picture"
    assert "| NBS 20 |" in markdown and "N=60" in markdown
    runs = wandb_runs(tmp_path)
    assert set(runs) == {"NBS 20, seed 0", "NBS 2, seed 0", "report"}
    assert "figures/depth" in runs["report"] and "val/error" in runs["NBS 2, seed 0"]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_prints_its_settings_as_a_config_that_parses(preset: str, tmp_path: Path) -> None:
    parser = make_parser(preset)
    config = tmp_path / "config.yaml"
    config.write_text(parser.dump(parser.parse_args(["--preset", preset]), skip_link_targets=True))
    again = make_parser("demo").parse_args(["--config", str(config)])
    assert all(again[key] == value for key, value in PRESETS[preset].items())


def test_full_reaches_twenty_thousand_images_and_three_seeds() -> None:
    assert PRESETS["full"]["images"] >= 20_000 and len(PRESETS["full"]["seeds"]) >= 3


def test_the_list_of_recipes_knows_every_preset() -> None:
    (recipe,) = (recipe for recipe in all_recipes() if recipe.name == "precise_batch_size")
    assert {preset.name for preset in recipe.presets} == set(PRESETS)
