"""The photographs of the evidence are made anew from COCO's own files."""

import json

import numpy as np
import pytest
from evidence.persons import IDS, collect
from PIL import Image
from pycocotools import mask as run_lengths

from kn_detectron import InputError

BOX = [[64.0, 64.0, 256.0, 64.0, 256.0, 320.0, 64.0, 320.0]]  # of 640 x 480 pixels


@pytest.fixture
def coco(tmp_path):
    """Photograph 7 in train2017 is large and has a person, a crowd and a dog; 9 in val2017 is small."""
    folder = tmp_path / "coco"
    crowd = np.zeros((480, 640), np.uint8)
    crowd[96:288, 320:448] = 1
    flat = crowd.flatten(order="F")
    ends = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.concatenate([[0], ends, [flat.size]])).tolist()
    of_7 = [
        dict(id=1, category_id=1, iscrowd=0, segmentation=BOX, bbox=[64, 64, 192, 256], area=49152),
        dict(
            dict(id=2, category_id=1, iscrowd=1, bbox=[320, 96, 128, 192], area=24576),
            segmentation={"size": [480, 640], "counts": counts},
        ),
        dict(id=3, category_id=18, iscrowd=0, segmentation=BOX, bbox=[64, 64, 192, 256], area=1),
    ]
    of_9 = [dict(of_7[0], id=4)]
    (folder / "annotations").mkdir(parents=True)
    for split, number, size, found in (
        ("train2017", 7, (640, 480), of_7),
        ("val2017", 9, (400, 300), of_9),
    ):
        (folder / split).mkdir()
        Image.new("RGB", size, (200, 100, 50)).save(folder / split / f"{number}.jpg")
        image = dict(id=number, file_name=f"{number}.jpg", width=size[0], height=size[1], license=4)
        content = dict(
            images=[image],
            annotations=[dict(a, image_id=number) for a in found],
            categories=[dict(id=1, name="person"), dict(id=18, name="dog")],
            licenses=[dict(id=4, name="CC BY", url="")],
        )
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return folder


def test_persons_are_scaled_with_their_photographs(coco, tmp_path):
    output = tmp_path / "persons"
    collect(coco, {"train": [9], "val": [7]}, output)  # another split than COCO's
    train, val = (
        json.loads((output / "annotations" / f"instances_{split}.json").read_text())
        for split in ("train", "val")
    )
    for split, content in (("train", train), ("val", val)):
        (image,) = content["images"]
        with Image.open(output / split / image["file_name"]) as photo:
            assert photo.size == (image["width"], image["height"])
        assert [c["id"] for c in content["categories"]] == [1]
    assert (train["images"][0]["width"], train["images"][0]["height"]) == (400, 300)
    assert train["annotations"][0]["segmentation"] == BOX
    assert (val["images"][0]["width"], val["images"][0]["height"]) == (480, 360)
    person, crowd = val["annotations"]
    assert person["bbox"] == [48, 48, 144, 192] and person["area"] == 49152 * 0.75**2
    assert person["segmentation"] == [[0.75 * number for number in BOX[0]]]
    assert crowd["bbox"] == [240, 72, 96, 144] and crowd["iscrowd"] == 1
    want = np.zeros((360, 480), np.uint8)
    want[72:216, 240:336] = 1
    assert np.array_equal(run_lengths.decode(crowd["segmentation"]), want)


def test_what_is_missing_is_named(coco, tmp_path):
    with pytest.raises(InputError, match="lacks 2 photographs, the first 8"):
        collect(coco, {"train": [7, 8], "val": [10]}, tmp_path / "out")
    (coco / "train2017" / "7.jpg").unlink()
    with pytest.raises(InputError, match="7.jpg does not exist"):
        collect(coco, {"train": [7]}, tmp_path / "one")
    (coco / "annotations" / "instances_val2017.json").unlink()
    with pytest.raises(InputError, match="instances_val2017.json does not exist"):
        collect(coco, {"train": [7]}, tmp_path / "two")


def test_the_list_has_the_photographs_of_the_page():
    splits = json.loads(IDS.read_text())
    assert {name: len(set(ids)) for name, ids in splits.items()} == {"train": 1454, "val": 325}
    assert not set(splits["train"]) & set(splits["val"])
