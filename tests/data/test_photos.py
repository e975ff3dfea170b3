"""The photographs in the package: free ones, all named, and as their annotations say."""

import json

import pytest
from detectron2.data import DatasetCatalog
from PIL import Image
from pycocotools import mask as masks

from kn_detectron.data import PHOTOS, check_dataset

# CC BY, CC BY-SA, no known restrictions, US government: the others forbid changes or commerce.
FREE = {4, 5, 7, 8}
COUNTS = {"train": 100, "val": 36}


def annotations(split):
    return json.loads((PHOTOS / "annotations" / f"instances_{split}.json").read_text())


@pytest.mark.parametrize("split", COUNTS)
def test_annotations_fit_the_files(split):
    content = annotations(split)
    assert len(content["images"]) == COUNTS[split]
    names = {image["file_name"] for image in content["images"]}
    assert names == {path.name for path in (PHOTOS / split).iterdir()}
    sizes = {}
    for image in content["images"]:
        with Image.open(PHOTOS / split / image["file_name"]) as photo:
            assert photo.size == (image["width"], image["height"])
        sizes[image["id"]] = image["height"], image["width"]
    for annotation in content["annotations"]:
        height, width = sizes[annotation["image_id"]]
        area = masks.area(masks.merge(masks.frPyObjects(annotation["segmentation"], height, width)))
        assert area == pytest.approx(annotation["area"], rel=0.1, abs=20)


@pytest.mark.parametrize("split", COUNTS)
def test_detectron2_reads_them(split, tmp_path):
    assert len(DatasetCatalog.get(f"photos_{split}")) == COUNTS[split]
    check_dataset(f"photos_{split}", str(tmp_path), open_images=True)


def test_every_photograph_is_free_and_named():
    page = (PHOTOS / "ATTRIBUTION.md").read_text()
    for split in COUNTS:
        content = annotations(split)
        urls = {entry["id"]: entry["url"] for entry in content["licenses"]}
        for image in content["images"]:
            assert image["license"] in FREE
            (line,) = [
                line for line in page.splitlines() if f"{split}/{image['file_name']}" in line
            ]
            assert urls[image["license"]] in line


def test_no_photograph_is_in_both_parts():
    train, val = ({image["id"] for image in annotations(split)["images"]} for split in COUNTS)
    assert not train & val


def test_they_are_small():
    assert sum(path.stat().st_size for path in PHOTOS.rglob("*") if path.is_file()) < 6e6
