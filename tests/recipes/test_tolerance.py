"""Where tolerance= stops, and whether that was enough."""

import pytest
import torch

from recipes import tolerance
from recipes.classifier import ImageClassifier
from recipes.evaluation import copy_of_state
from recipes.images import ImageData
from recipes.tolerance import Stops, sweep_tolerances, tolerance_section


@pytest.fixture(scope="module")
def stops() -> Stops:
    model, data = ImageClassifier(width=8), ImageData(train_images=400, val_images=50)
    before = copy_of_state(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tolerance, "NUM_IMAGES", 1000)
        stops = sweep_tolerances(model, data, "model", [1e-9, 10.0], draws=2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "restored"
    return stops


def test_a_small_tolerance_takes_all_images_and_a_large_one_the_minimum_and_the_report_has_both(stops: Stops) -> None:
    assert {t: taken.tolist() for t, (taken, _) in stops.at.items()} == {10.0: [800, 800], 1e-9: [1000, 1000]}
    rows = [line for line in tolerance_section([stops]).splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 3 and "| 800 |" in rows[3], "and one for the reference"
    assert tolerance_section([]) == ""
    assert stops.as_json()["tolerances"][0]["images"] == [800, 800]


def test_the_noise_is_two_standard_deviations_of_one_estimate() -> None:
    for error, within in ((10.15, True), (10.3, False), (9.7, False)):
        at = {0.1: (torch.tensor([800] * 3), torch.tensor([error] * 3))}
        assert Stops("model", torch.tensor([9.9, 10.0, 10.1]), at).within_noise(0.1) == within
