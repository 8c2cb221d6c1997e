"""80 classes of images, and batches of some classes x some images.

Leakage needs many classes. In 8 orientations (rotated and mirrored), 10 classes are 80: class c in orientation k is
class 8 c + k.
"""

from collections.abc import Iterator
from pathlib import Path

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from lightning_bn.core.checks import check_int
from recipes.images import Batches, ImageData, LabelledImages, ShiftedImages

ORIENTATIONS = 8


class OrientedImages(Dataset[tuple[Tensor, Tensor]]):
    """Every image in 8 orientations; index 8 i + k is image i in orientation k."""

    def __init__(self, images: LabelledImages) -> None:
        self.images = images
        of_orientation = torch.arange(ORIENTATIONS)
        self.labels = (ORIENTATIONS * labels_of(images).unsqueeze(1) + of_orientation).flatten()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index // ORIENTATIONS][0]
        orientation = index % ORIENTATIONS
        turned = image.rot90(orientation % 4, (-2, -1))
        return turned.flip(-1) if orientation >= 4 else turned, self.labels[index]


def labels_of(images: LabelledImages) -> Tensor:
    """Returns the labels without reading the images."""
    if isinstance(images, Subset):
        return labels_of(images.dataset)[torch.as_tensor(images.indices)]
    if isinstance(images, ShiftedImages):
        return images.labels
    raise TypeError(
        "batch_leakage needs square images in memory, and cannot use an ImageNet-style folder: use CIFAR-10, MNIST or "
        "Fashion-MNIST."
    )


class BatchSampler(Sampler[list[int]]):
    """Batches of `classes` classes x `each` images in the order c0, c0, c1, c1, ...; or random batches of that size.

    Args:
        labels: Labels of all images.
        classes: Classes per batch, drawn without replacement.
        each: Images per class, drawn without replacement within the batch.
        batches: Batches per epoch.
        pattern: False for random batches, drawn without replacement within the epoch.
        seed: If given, every epoch has the same batches; by default they depend on torch's random numbers.
    """

    def __init__(
        self, labels: Tensor, *, classes: int, each: int, batches: int, pattern: bool, seed: int | None = None
    ) -> None:
        self.of_class = [(labels == c).nonzero()[:, 0] for c in range(int(labels.max()) + 1)]
        self.labels, self.classes, self.each, self.batches = labels, classes, each, batches
        self.pattern, self.seed = pattern, seed
        fewest = min(map(len, self.of_class))
        if pattern and (len(self.of_class) < classes or fewest < each):
            raise ValueError(
                f"{classes} classes x {each} images cannot be drawn from {len(self.of_class)} classes of at least "
                f"{fewest} images."
            )
        if not pattern and batches * classes * each > len(labels):
            raise ValueError(
                f"{batches} batches of {classes * each} images are more than the {len(labels):,} there are."
            )

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator()
        generator.manual_seed(int(torch.randint(2**62, ())) if self.seed is None else self.seed)
        if not self.pattern:
            order = torch.randperm(len(self.labels), generator=generator)
            for batch in order[: self.batches * self.classes * self.each].split(self.classes * self.each):
                yield batch.tolist()
            return
        for _ in range(self.batches):
            chosen = torch.randperm(len(self.of_class), generator=generator)[: self.classes].tolist()
            members = [self.of_class[c] for c in chosen]
            drawn = [of_class[torch.randperm(len(of_class), generator=generator)[: self.each]] for of_class in members]
            yield torch.cat(drawn).tolist()


class LeakyData(L.LightningDataModule):
    """80 classes of images, in training batches that are random or follow the pattern of Fig. 8.

    An epoch has as many images as the data, each in one orientation on average. Validation batches are random and
    always the same. `same_pattern` returns as many validation batches of the pattern.

    Args:
        root: Folder with the data, as in `ImageData`.
        train_images: Number of training images; by default all.
        val_images: Number of validation images; by default all.
        shift: Augmentation: each training image moves by up to this many pixels in both directions.
        classes: Classes per batch.
        each: Images per class in a batch.
    """

    def __init__(
        self,
        root: Path | None = None,
        train_images: int | None = None,
        val_images: int | None = None,
        shift: int = 3,
        classes: int = 16,
        each: int = 2,
    ) -> None:
        super().__init__()
        check_int("data.classes", classes, at_least=1)
        check_int("data.each", each, at_least=1)
        images = ImageData(root, train_images=train_images, val_images=val_images, shift=shift)
        self.source = f"{images.source} in {ORIENTATIONS} orientations"
        self.train_set, self.val_set = OrientedImages(images.train_set), OrientedImages(images.val_set)
        self.num_channels, self.num_classes = images.num_channels, ORIENTATIONS * images.num_classes
        self.num_workers = images.num_workers
        self.classes, self.each = classes, each
        self.pattern = False
        """Whether training batches follow the pattern; set by the experiment."""

    @property
    def batch_size(self) -> int:
        return self.classes * self.each

    @property
    def num_training_images(self) -> int:
        return len(self.train_set) // ORIENTATIONS

    @property
    def num_validation_images(self) -> int:
        """Number of images of a validation error, each in one orientation."""
        return len(self.val_dataloader()) * self.batch_size

    def train_dataloader(self) -> Batches:
        return self._loader(self.train_set, self.pattern)

    def val_dataloader(self) -> Batches:
        return self._loader(self.val_set, pattern=False, seed=0)

    def same_pattern(self, trainer: L.Trainer) -> Batches:
        """Validation images in batches of the pattern, for `BatchLeakageMonitor(same_pattern=)`."""
        return self._loader(self.val_set, pattern=True, seed=0)

    def _loader(self, images: OrientedImages, pattern: bool, seed: int | None = None) -> Batches:
        batches = len(images) // ORIENTATIONS // self.batch_size
        if not batches:
            raise ValueError(f"{len(images) // ORIENTATIONS} images do not fill a batch of {self.batch_size}.")
        sampler = BatchSampler(
            images.labels, classes=self.classes, each=self.each, batches=batches, pattern=pattern, seed=seed
        )
        return DataLoader(images, batch_sampler=sampler, num_workers=self.num_workers)
