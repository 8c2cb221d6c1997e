"""AP is COCO's, of all images and of parts of them."""

from typing import Any

import pytest
import torch

from recipes.average_precision import AP, Measured, ap_by_part, average_precision
from recipes.scenes import SceneData


@pytest.fixture(scope="module")
def exact() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Detections that are the targets."""
    scenes = SceneData(train_images=10, val_images=10).val_set
    targets = [scenes[index][1] for index in range(10)]
    return [({**target, "scores": torch.ones(len(target["labels"]))}, target) for target in targets]


def test_what_is_found_exactly_has_an_ap_of_100_and_what_is_missed_of_0(exact: Any) -> None:
    assert average_precision(exact, "bbox") == pytest.approx(100)
    assert average_precision(exact, "segm") == pytest.approx(100)
    missed = [({**one, "labels": one["labels"] % 10 + 1}, target) for one, target in exact]
    assert average_precision(missed, "bbox") == pytest.approx(0)


def test_parts_are_of_interleaved_images_and_the_mean_is_of_all_images_over_seeds(exact: Any) -> None:
    wrong = [(({**one, "boxes": one["boxes"] + 500}), target) for one, target in exact]
    found = ap_by_part([exact[0], wrong[1], exact[2], wrong[3]], "bbox", 2)
    assert found.by_part == pytest.approx([100, 0]) and 0 < found.all_images < 100
    assert Measured([AP(10.0, [0.0, 1.0]), AP(20.0, [0.0, 1.0])], 39.1).mean() == 15
