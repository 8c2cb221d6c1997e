"""`ImageData` reads every kind of folder, and always chooses the same images."""

import gzip
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from recipes.images import FASHION_MNIST, ImageData


def test_mnist_5k_is_split_once_and_without_overlap() -> None:
    data = ImageData(shift=0)
    loaders = data.training_sample(4000, torch.Generator()), data.val_dataloader()
    train, val = (torch.cat([images for images, _ in loader]) for loader in loaders)
    assert train.shape == (4000, 1, 28, 28) and val.shape == (1000, 1, 28, 28)
    assert not {row.numpy().tobytes() for row in train} & {row.numpy().tobytes() for row in val}
    assert (data.num_channels, data.num_classes) == (1, 10)
    assert train.mean().abs() < 0.01 and (train.std() - 1).abs() < 0.01


def test_a_shift_moves_the_image_and_keeps_its_ink() -> None:
    still, moving = ImageData(shift=0), ImageData(shift=3)
    digit = still.train_set[0][0]
    assert all(torch.equal(moving.val_set[0][0], moving.val_set[0][0]) for _ in range(5)), "validation images stay"
    moved = [moving.train_set[0][0] for _ in range(100)]
    shifts = [(dy, dx) for dy in range(-3, 4) for dx in range(-3, 4)]
    rolled = [digit.roll(by, (1, 2))[:, 5:-5, 5:-5] for by in shifts]
    offsets = [[i for i, one in enumerate(rolled) if torch.equal(image[:, 5:-5, 5:-5], one)] for image in moved]
    assert all(offsets) and len({found[0] for found in offsets}) > 30, "100 draws of 49 equally likely shifts"


def test_parts_are_the_same_whatever_the_seed_and_samples_repeat_with_their_generator() -> None:
    torch.manual_seed(1)
    first = ImageData(train_images=10, shift=0).train_set[3][0]
    torch.manual_seed(2)
    assert torch.equal(first, ImageData(train_images=10, shift=0).train_set[3][0])
    data = ImageData(shift=0, train_images=100, batch_size=30)
    samples = [data.training_sample(60, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    one, again, other = (torch.cat([images for images, _ in sample]) for sample in samples)
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert len({image.numpy().tobytes() for image in one}) == 60, "without replacement"


def test_a_sample_larger_than_the_population_takes_all_of_it_again() -> None:
    data = ImageData(shift=0, train_images=40)
    batches = [images for images, _ in data.training_sample(100, torch.Generator(), batch_size=30)]
    assert [len(images) for images in batches] == [30, 30, 30, 10]
    times = torch.cat(batches).flatten(1).unique(dim=0, return_counts=True)[1].tolist()
    assert sorted(times) == [2] * 20 + [3] * 20


def write_idx(folder: Path) -> None:
    for part, count in (("train", 40), ("t10k", 10)):
        pixels = np.arange(count, dtype=np.uint8).repeat(28 * 28).tobytes()
        labels = (np.arange(count, dtype=np.uint8) % 10).tobytes()
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + pixels))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + labels))


def test_idx_files_are_read_image_by_image(tmp_path: Path) -> None:
    write_idx(tmp_path)
    data = ImageData(tmp_path, shift=0)
    image, label = data.train_set[17]
    assert label == 7 and image.unique().numel() == 1 and image.shape == (1, 28, 28)
    assert (data.num_training_images, data.num_validation_images) == (40, 10)


def test_cifar_10_is_read_from_its_folder_or_the_one_around_it(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        red = np.zeros((4, 3, 32, 32), dtype=np.uint8)
        red[:, 0] = 200
        (folder / name).write_bytes(pickle.dumps({b"data": red.reshape(4, -1), b"labels": [0, 1, 2, 9]}))
    for root in (folder, tmp_path):
        data = ImageData(root, shift=0)
        assert (data.source, data.num_training_images, data.num_validation_images) == ("CIFAR-10", 20, 4)
        assert (data.num_channels, data.num_classes) == (3, 10)


def test_an_imagenet_style_folder_gives_images_of_the_size_asked_for(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for name in ("cat", "dog", "owl"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (50, 40)).save(tmp_path / part / name / "1.png")
    data = ImageData(tmp_path, image_size=32, batch_size=3)
    images, labels = next(iter(data.val_dataloader()))
    assert images.shape == (3, 3, 32, 32) and labels.tolist() == [0, 1, 2]
    assert (data.num_channels, data.num_classes) == (3, 3)


def test_a_folder_that_is_missing_or_has_unknown_data_is_an_error(tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(FileNotFoundError, match="data_batch_1"):
        ImageData(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        ImageData(tmp_path / "nowhere")
    monkeypatch.setattr(Path, "is_dir", lambda path: False)
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        ImageData(FASHION_MNIST)
