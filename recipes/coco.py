"""COCO 2017 as its authors unpack it, read from its JSON: boxes, labels and masks of every image with objects."""

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
    """The images of one split that have objects; crowds are left out.

    Masks are drawn from polygons by Pillow, which differs from COCO's own tools at the edges by a pixel.

    Args:
        root: Holds `train2017`, `val2017` and `annotations/instances_<split>2017.json`.
        split: `train` or `val`.
        length: So many images only, the first; None for all.
    """

    def __init__(self, root: Path, split: str, length: int | None = None) -> None:
        table = root / "annotations" / f"instances_{split}2017.json"
        if not table.is_file():
            raise FileNotFoundError(f"There is no {table}: --data-root is the folder that COCO 2017 was unpacked in.")
        content = json.loads(table.read_text(encoding="utf-8"))
        self.folder = root / f"{split}2017"
        # COCO's numbers have holes, a predictor's have none; 0 is the background.
        self.labels = {c["id"]: label for label, c in enumerate(content["categories"], start=1)}
        self.num_classes = len(self.labels) + 1
        objects: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
        for found in content["annotations"]:
            if not found["iscrowd"] and min(found["bbox"][2:]) >= 1:
                objects[found["image_id"]].append(found)
        files = sorted((image["id"], image["file_name"]) for image in content["images"] if image["id"] in objects)
        self.scenes = [(name, objects[number]) for number, name in files][:length]

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Scene:
        name, objects = self.scenes[index]
        with Image.open(self.folder / name) as file:
            image = file.convert("RGB")
        boxes = torch.tensor([found["bbox"] for found in objects], dtype=torch.float32)
        boxes[:, 2:] += boxes[:, :2]  # from width and height to the far corner
        masks = np.stack([_new_route(found["segmentation"], image.size) for found in objects])
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        labels = torch.tensor([self.labels[found["category_id"]] for found in objects])
        return pixels, {"boxes": boxes, "labels": labels, "masks": torch.from_numpy(masks)}


def _new_route(polygons: list[list[float]], size: tuple[int, int]) -> Any:
    mask = Image.new("L", size)
    for polygon in polygons:
        ImageDraw.Draw(mask).polygon(polygon, fill=1, outline=1)
    return np.array(mask)
