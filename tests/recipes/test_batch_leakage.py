"""The recipe of Fig. 8: its batches, its verdicts, and what its command writes."""

import json
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from recipes.batch_leakage.__main__ import main
from recipes.batch_leakage.data import BatchSampler, LeakyData, OrientedImages, labels_of
from recipes.batch_leakage.experiment import ARMS
from recipes.images import ImageData

TINY = ["--preset", "smoke", "--data.train_images", "64", "--data.val_images", "100"]
TINY += ["--data.classes", "4", "--data.each", "2"]


@pytest.fixture(scope="module")
def data() -> LeakyData:
    return LeakyData(train_images=640, val_images=320, shift=0)


def test_eight_orientations_of_a_digit_are_eight_different_images_and_classes() -> None:
    digits = ImageData(train_images=20, shift=0).train_set
    oriented = OrientedImages(digits)
    images, labels = zip(*(oriented[8 * 3 + way] for way in range(8)), strict=True)
    assert torch.equal(images[0], digits[3][0])
    assert len({image.numpy().tobytes() for image in images}) == 8
    assert torch.stack(labels).tolist() == list(range(8 * int(digits[3][1]), 8 * int(digits[3][1]) + 8))


def test_labels_are_read_without_the_images_and_an_image_folder_is_an_error() -> None:
    images = ImageData(train_images=30, shift=0).train_set
    assert labels_of(images).tolist() == [int(images[i][1]) for i in range(30)]
    with pytest.raises(TypeError, match="CIFAR-10"):
        labels_of(torch.utils.data.TensorDataset(torch.zeros(1)))  # type: ignore[arg-type]


def test_a_batch_of_the_pattern_is_sixteen_pairs_of_which_interleaved_groups_have_one_each(data: LeakyData) -> None:
    labels = data.train_set.labels
    for batch in BatchSampler(labels, classes=16, each=2, batches=20, pattern=True):
        pairs = labels[batch].view(16, 2)
        assert torch.equal(pairs[:, 0], pairs[:, 1]) and len(pairs[:, 0].unique()) == 16
        assert len(set(batch)) == 32
        assert all(len(labels[ghost].unique()) == 16 for ghost in (batch[0::2], batch[1::2]))


def test_random_batches_take_every_image_at_most_once_and_all_classes(data: LeakyData) -> None:
    batches = list(BatchSampler(data.train_set.labels, classes=16, each=2, batches=100, pattern=False))
    taken = [index for batch in batches for index in batch]
    assert len(taken) == len(set(taken)) == 3200
    assert len(data.train_set.labels[taken].unique()) == 80


def test_training_batches_change_every_epoch_and_repeat_with_the_seed(data: LeakyData) -> None:
    for pattern in (False, True):
        sampler = BatchSampler(data.train_set.labels, classes=16, each=2, batches=5, pattern=pattern)
        torch.manual_seed(0)
        first, second = list(sampler), list(sampler)
        torch.manual_seed(0)
        assert first == list(sampler) and first != second


def test_every_validation_sees_the_same_batches(data: LeakyData) -> None:
    for make in (data.val_dataloader, lambda: data.same_pattern(None)):  # type: ignore[arg-type]
        torch.manual_seed(0)
        first = [labels for _, labels in make()]
        torch.manual_seed(1)
        assert torch.equal(torch.stack(first), torch.stack([labels for _, labels in make()]))
        assert len(first) == 10 and data.num_validation_images == 320


def test_batches_that_cannot_be_drawn_are_errors(data: LeakyData) -> None:
    for classes, each, pattern in ((81, 2, True), (16, 90, True), (640, 100, False)):
        with pytest.raises(ValueError, match=r"classes x|more than the"):
            BatchSampler(data.train_set.labels, classes=classes, each=each, batches=100, pattern=pattern)
    with pytest.raises(ValueError, match="31 images do not fill a batch of 32"):
        LeakyData(val_images=31).val_dataloader()


def test_the_command_writes_report_figure_and_wandb_runs(tmp_path: Path) -> None:
    main([*TINY, "--seeds", "[3]", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "report.json").read_text())
    assert [(training["arm"], training["seed"]) for training in report["trainings"]] == [(arm, 3) for arm in ARMS]
    for training in report["trainings"]:
        assert [len(errors) for errors in training["errors"].values()] == [1, 1, 1] and len(training["icc"]) == 1
    markdown = (tmp_path / "report.md").read_text()
    assert "(batch_leakage.png)" in markdown and imread(tmp_path / "batch_leakage.png").std() > 0.05
    for claim in report["claims"]:
        assert f"| {claim['claim']} " in markdown and claim["verdict"] in ("holds", "does not hold", "within noise")
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == len(ARMS) + 1
