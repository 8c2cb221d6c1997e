"""Scenes are the same in every training, with boxes of their masks; COCO is read from its own files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from recipes.coco import Coco
from recipes.scenes import STAMPS, SceneData, stamps


@pytest.fixture(scope="module")
def data() -> SceneData:
    return SceneData(train_images=40, val_images=10)


def test_a_scene_is_the_same_every_time_and_validation_has_others_with_other_cut_outs(data: SceneData) -> None:
    image, target = data.train_set[3]
    again, same = data.train_set[3]
    assert torch.equal(image, again) and torch.equal(target["boxes"], same["boxes"])
    assert not torch.equal(image, data.val_set[3][0])
    sets: Any = (data.train_set, data.val_set)
    train, val = ({one[..., 3].tobytes() for of_class in s.cut_outs for one in of_class} for s in sets)
    assert len(train) > 3900 and len(val) > 900 and not train & val


def test_boxes_are_those_of_the_masks_and_do_not_overlap(data: SceneData) -> None:
    for index in range(40):
        _, target = data.train_set[index]
        masks = target["masks"]
        assert 1 <= len(masks) <= 5 and masks.sum(0).max() == 1
        for mask, (left, top, right, bottom) in zip(masks, target["boxes"].int().tolist(), strict=True):
            assert mask[top:bottom, left:right].sum() == mask.sum() > 0
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            assert abs(rows.max() + 1 - rows.min() - (bottom - top)) <= 6, "trimmed, then resized"
            assert abs(columns.max() + 1 - columns.min() - (right - left)) <= 6


def test_scenes_have_one_class_unless_set_otherwise(data: SceneData) -> None:
    mixed = SceneData(train_images=40, val_images=10, single_class=False)
    one, several = ([len(set(s.train_set[i][1]["labels"].tolist())) for i in range(40)] for s in (data, mixed))
    assert set(one) == {1} and max(several) > 2


def test_folders_of_transparent_pngs_are_classes(tmp_path: Path) -> None:
    pixels = np.zeros((20, 30, 4), dtype=np.uint8)
    pixels[5:15, 10:22] = 255
    for kind, count in (("animals", 16), ("few", 3)):
        (tmp_path / kind / "deep").mkdir(parents=True)
        for index in range(count):
            Image.fromarray(pixels).save(tmp_path / kind / "deep" / f"{index}.png")
        Image.fromarray(pixels).save(tmp_path / kind / "0_mirror.png")
        Image.fromarray(pixels[..., :3]).save(tmp_path / kind / "opaque.png")
    found = stamps(tmp_path)
    assert found.classes == ["animals"]
    assert (len(found.train[0]), len(found.val[0])) == (12, 4)
    assert found.train[0][0].shape == (10, 12, 4), "trimmed to the opaque part"


def test_missing_data_is_an_error_with_its_source(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="the folder of the unpacked COCO 2017"):
        Coco(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        stamps(tmp_path / "none")
    if not STAMPS.exists():
        with pytest.raises(FileNotFoundError, match="apt-get install tuxpaint-stamps-default"):
            stamps(STAMPS)


def test_coco_has_corners_labels_without_gaps_and_masks_but_no_crowds(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / f"{split}2017").mkdir()
        Image.new("RGB", (40, 30), (255, 0, 0)).save(tmp_path / f"{split}2017" / "7.jpg")
        found = {"image_id": 7, "category_id": 90, "iscrowd": 0, "bbox": [5, 6, 10, 12]}
        found["segmentation"] = [[5, 6, 14, 6, 14, 17, 5, 17]]
        crowd = {**found, "iscrowd": 1, "segmentation": {}}
        images = [{"id": 7, "file_name": "7.jpg"}, {"id": 8, "file_name": "empty.jpg"}]
        table = {"images": images, "annotations": [found, crowd], "categories": [{"id": 3}, {"id": 90}]}
        (tmp_path / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(table))
    data = SceneData(root=tmp_path)
    assert data.num_classes == 3 and len(data.train_set) == 1  # type: ignore[arg-type]
    image, target = data.train_set[0]
    assert image.shape == (3, 30, 40) and image[0].min() > 0.9
    assert target["boxes"].tolist() == [[5, 6, 15, 18]] and target["labels"].tolist() == [2]
    assert target["masks"].shape == (1, 30, 40) and target["masks"].sum() == 10 * 12
