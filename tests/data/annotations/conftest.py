"""A tiny dataset with one object of each kind, to be broken."""

import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image
from pycocotools import mask as mask_util

WIDTH, HEIGHT = 40, 30


def rectangle(x, y, width, height):
    """A polygon."""
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def encoded(x, y, width, height):
    """A run-length encoded rectangle, as COCO writes one."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    mask[y : y + height, x : x + width] = 1
    found = mask_util.encode(mask)
    return {"size": found["size"], "counts": found["counts"].decode()}


def _object(number, image_id, category_id, box, segmentation=None, iscrowd=0):
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": list(box),
        "area": box[2] * box[3],
        "iscrowd": iscrowd,
        "segmentation": segmentation or [rectangle(*box)],
    }


def sound_content():
    """Three images, two categories, and five objects: 0, 2 and 4 are polygons, 1 is encoded, 3 is a
    crowd."""
    return {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in (1, 2, 3)
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            _object(1, 1, 1, (4, 5, 12, 10)),
            _object(2, 1, 2, (20, 6, 14, 20), encoded(20, 6, 14, 20)),
            _object(3, 2, 1, (0, 0, 25, 20)),
            _object(4, 2, 1, (26, 2, 10, 20), encoded(26, 2, 10, 20), iscrowd=1),
            _object(5, 3, 2, (10, 10, 9, 9)),
        ],
    }


class TinyDataset:
    """The dataset "tiny" on the disk, registered as its users would."""

    def __init__(self, folder):
        self.json_file, self.image_root = folder / "tiny.json", folder / "images"
        self.image_root.mkdir()
        for image in sound_content()["images"]:
            pixels = np.random.default_rng(image["id"]).integers(0, 255, (HEIGHT, WIDTH, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(self.image_root / image["file_name"])
        self.write(sound_content())
        register_coco_instances("tiny", {}, str(self.json_file), str(self.image_root))

    def write(self, content):
        """Replaces the annotations."""
        self.json_file.write_text(json.dumps(content))


@pytest.fixture
def tiny(tmp_path):
    yield TinyDataset(tmp_path)
    DatasetCatalog.pop("tiny")
    MetadataCatalog.pop("tiny")
