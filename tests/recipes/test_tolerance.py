"""Where tolerance= stops, and whether that was enough."""

import pytest
import torch

from recipes import tolerance
from recipes.classifier import ImageClassifier
from recipes.images import ImageData
from recipes.tolerance import Stops, plain, sweep_tolerances, tolerance_section


@pytest.fixture
def stops(monkeypatch: pytest.MonkeyPatch) -> Stops:
    monkeypatch.setattr(tolerance, "MOST", 1000)
    data = ImageData(train_images=400, val_images=50)
    return sweep_tolerances(ImageClassifier(width=8), data, "model", [1e-9, 10.0], draws=2, say=lambda line: None)


def test_a_small_tolerance_takes_all_and_a_large_one_the_fewest_whose_spread_says_something(stops: Stops) -> None:
    assert {t: taken.tolist() for t, (taken, _) in stops.at.items()} == {10.0: [800, 800], 1e-9: [1000, 1000]}


def test_the_report_has_a_row_for_each_and_one_for_the_reference(stops: Stops) -> None:
    rows = [line for line in tolerance_section([stops]).splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 3 and "| 800 |" in rows[3]
    assert tolerance_section([]) == ""
    assert plain([stops])[0]["tolerances"][0]["images"] == [800, 800]


@pytest.mark.parametrize(("error", "within"), [(10.15, True), (10.3, False), (9.7, False)])
def test_the_noise_is_two_standard_deviations_of_one_estimate(error: float, within: bool) -> None:
    reference = torch.tensor([9.9, 10.0, 10.1])
    stops = Stops("model", reference, {0.1: (torch.tensor([800] * 3), torch.tensor([error] * 3))})
    assert stops.within_noise(0.1) == within


def test_the_model_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tolerance, "MOST", 200)
    model = ImageClassifier(width=8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sweep_tolerances(model, ImageData(train_images=100, val_images=20), "model", [0.1], 1, lambda line: None)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
