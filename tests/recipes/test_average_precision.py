"""AP is COCO's, and which of two is the larger is decided over seeds and over parts of the images."""

import pytest
import torch

from recipes.average_precision import AP, Measured, ap_by_part, average_precision, ordering
from recipes.claims import equal, larger
from recipes.scenes import SceneData


@pytest.fixture(scope="module")
def data() -> SceneData:
    return SceneData(train_images=10, val_images=10)


def test_what_is_found_exactly_has_an_ap_of_100_and_what_is_missed_of_0(data: SceneData) -> None:
    targets = [data.val_set[index][1] for index in range(10)]
    exact = [({**target, "scores": torch.ones(len(target["labels"]))}, target) for target in targets]
    assert average_precision(exact, "bbox") == pytest.approx(100)
    assert average_precision(exact, "segm") == pytest.approx(100)
    missed = [({**one, "labels": one["labels"] % 10 + 1}, target) for one, target in exact]
    assert average_precision(missed, "bbox") == pytest.approx(0)


def test_parts_are_of_interleaved_images(data: SceneData) -> None:
    targets = [data.val_set[index][1] for index in range(4)]
    exact = [({**target, "scores": torch.ones(len(target["labels"]))}, target) for target in targets]
    wrong = [(({**one, "boxes": one["boxes"] + 500}), target) for one, target in exact]
    found = ap_by_part([exact[0], wrong[1], exact[2], wrong[3]], "bbox", 2)
    assert found.by_part == pytest.approx([100, 0]) and 0 < found.all_images < 100


def test_the_mean_is_of_all_images_over_seeds() -> None:
    assert Measured([AP(10.0, [0.0, 1.0]), AP(20.0, [0.0, 1.0])], 39.1).mean() == 15


def test_an_ordering_is_decided_by_the_wider_spread() -> None:
    def row(*aps: float, parts: tuple[float, float] = (0.0, 0.0)) -> Measured:
        return Measured([AP(ap, list(parts)) for ap in aps], 39.1)

    assert ordering("", row(30.0, 31.0, 32.0), row(20.0, 21.0, 22.0), larger).verdict == "holds"
    assert ordering("", row(20.0, 21.0, 22.0), row(30.0, 31.0, 32.0), larger).verdict == "does not hold"
    assert ordering("", row(30.0, 31.0, 32.0), row(30.0, 21.0, 32.0), larger).verdict == "within noise"
    unlike = row(30.0, parts=(50.0, 0.0))
    assert ordering("", unlike, row(20.0), larger).verdict == "within noise", "parts disagree"
    assert ordering("", row(30.0), row(30.2), equal).verdict == "holds"
