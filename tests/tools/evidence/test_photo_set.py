import json
import sys

import pytest
from evidence.photo_set import attribution, choose, main, resize
from PIL import Image

from kn_detectron import InputError

LICENSES = [{"id": 1, "name": "not free", "url": "u1"}, {"id": 4, "name": "free", "url": "u4"}]


def annotation(image, box, **changes):
    left, top, width, height = box
    corners = [left, top, left + width, top, left + width, top + height, left, top + height]
    made = {"id": image, "image_id": image, "category_id": 1, "iscrowd": 0, "bbox": box}
    return {**made, "area": width * height, "segmentation": [corners], **changes}


@pytest.fixture
def content():
    """Seven photographs, of which only the first is fit for a set."""
    images = [
        {"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480, "license": 4}
        for i in range(1, 8)
    ]
    for image in images:
        image["flickr_url"] = f"http://farm1.staticflickr.com/1/{100 + image['id']}_ab_z.jpg"
        image["coco_url"] = "http://images.cocodataset.org/x.jpg"
    images[1]["license"] = 1
    annotations = [
        annotation(1, [100, 50, 100, 300]),
        annotation(2, [100, 50, 100, 300]),  # not free
        annotation(3, [100, 50, 20, 40]),  # small
        annotation(4, [0, 50, 100, 430]),  # cut off by two edges
        annotation(5, [100, 50, 100, 300], iscrowd=1),
        annotation(6, [100, 50, 300, 100]),  # wide
        *(annotation(7, [10 + 100 * i, 50, 50, 300], id=7 + i) for i in range(5)),  # too many
    ]
    categories = [{"id": 1, "name": "person"}]
    return dict(images=images, annotations=annotations, categories=categories, licenses=LICENSES)


def test_takes_free_photographs_of_upright_persons(content):
    assert choose(content, 1) == [1]
    with pytest.raises(InputError, match="Only 1 photographs are fit for a set of 2"):
        choose(content, 2)


def test_the_choice_is_the_same_every_time(content):
    content["images"] = [dict(content["images"][0], id=i) for i in range(1, 21)]
    content["annotations"] = [annotation(i, [100, 50, 100, 300]) for i in range(1, 21)]
    assert choose(content, 5) == choose(content, 5) != choose(content, 5, seed=1)


def test_photographs_and_annotations_shrink_together(content, tmp_path):
    Image.new("RGB", (640, 480), "red").save(tmp_path / "1.jpg")
    part = resize(content, [1], tmp_path, tmp_path / "set", "val")
    written = json.loads((tmp_path / "set" / "annotations" / "instances_val.json").read_text())
    assert written == part
    with Image.open(tmp_path / "set" / "val" / "1.jpg") as photo:
        assert photo.size == (320, 240)
    (image,), (person,) = part["images"], part["annotations"]
    assert (image["width"], image["height"]) == (320, 240)
    assert person["bbox"] == [50, 25, 50, 150] and person["area"] == 7500
    assert person["segmentation"] == [[50, 25, 100, 25, 100, 175, 50, 175]]


def test_each_photograph_is_attributed(content, tmp_path):
    Image.new("RGB", (640, 480)).save(tmp_path / "1.jpg")
    page = attribution({"val": resize(content, [1], tmp_path, tmp_path / "set", "val")})
    assert "| val/1.jpg | [101](https://www.flickr.com/photo.gne?id=101) | [free](u4) |" in page


def test_the_rest_has_all_others(content, tmp_path, monkeypatch):
    folder = tmp_path / "all"
    (folder / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (folder / split).mkdir()
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
        Image.new("RGB", (640, 480)).save(folder / split / "1.jpg")
    rest = tmp_path / "rest"
    words = ["photo_set.py", folder, tmp_path / "set", "--rest", rest, "--count", 1, 1]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    main()
    train, val = (
        json.loads((rest / "annotations" / f"instances_{split}.json").read_text())
        for split in ("train", "val")
    )
    assert [image["id"] for image in train["images"]] == [2, 3, 4, 5, 6, 7]
    assert [a["image_id"] for a in train["annotations"]] == [2, 3, 4, 5, 6, *[7] * 5]
    assert val == content
    for split in ("train", "val"):
        assert (rest / split).samefile(folder / split)
