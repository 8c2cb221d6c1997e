"""COCO 2017, read from its JSON: boxes, labels and masks of every image with objects."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset

Scene: TypeAlias = tuple[Tensor, dict[str, Tensor]]


class Coco(Dataset[Scene]):
    """The images of one split that have objects; crowds are omitted.

    Pillow draws the masks from polygons. At the edges they differ from those of COCO's own tools by a pixel.

    Args:
        root: Folder with `train2017`, `val2017` and `annotations/instances_<split>2017.json`.
        split: `train` or `val`.
        length: Number of images, the first ones; None for all.
    """

    def __init__(self, root: Path, split: str, length: int | None = None) -> None:
        table = root / "annotations" / f"instances_{split}2017.json"
        if not table.is_file():
            raise FileNotFoundError(f"There is no {table}: --data-root must be the folder of the unpacked COCO 2017.")
        content = json.loads(table.read_text(encoding="utf-8"))
        self.folder = root / f"{split}2017"
        # COCO's category numbers have gaps, a predictor's labels must not. Label 0 is the background.
        self.labels = {c["id"]: label for label, c in enumerate(content["categories"], start=1)}
        self.num_classes = len(self.labels) + 1
        objects: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
        for annotation in content["annotations"]:
            if not annotation["iscrowd"] and min(annotation["bbox"][2:]) >= 1:
                objects[annotation["image_id"]].append(annotation)
        files = sorted((image["id"], image["file_name"]) for image in content["images"] if image["id"] in objects)
        self.scenes = [(name, objects[number]) for number, name in files][:length]

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Scene:
        name, objects = self.scenes[index]
        with Image.open(self.folder / name) as file:
            image = file.convert("RGB")
        boxes = torch.tensor([annotation["bbox"] for annotation in objects], dtype=torch.float32)
        boxes[:, 2:] += boxes[:, :2]  # from width and height to the opposite corner
        masks = np.stack([_draw(annotation["segmentation"], image.size) for annotation in objects])
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        labels = torch.tensor([self.labels[annotation["category_id"]] for annotation in objects])
        return pixels, {"boxes": boxes, "labels": labels, "masks": torch.from_numpy(masks)}


def _draw(polygons: list[list[float]], size: tuple[int, int]) -> Any:
    mask = Image.new("L", size)
    for polygon in polygons:
        ImageDraw.Draw(mask).polygon(polygon, fill=1, outline=1)
    return np.array(mask)
