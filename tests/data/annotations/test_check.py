"""What annotation tools and people write, and what is said to it or made of it."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from pycocotools import mask as mask_util

from kn_detectron.data import check_dataset
from kn_detectron.data.annotations import Uses
from kn_detectron.data.annotations.run_lengths import fault_of_run_lengths
from kn_detectron.engine.evaluation import FullCOCOEvaluator
from kn_detectron.errors import InputError

from ..scoring import score_of_truth
from .conftest import HEIGHT, WIDTH, encoded, rectangle, sound_content

nan, inf = math.nan, math.inf


def of_object(index, **values):
    """A change of an object; ``...`` takes a key away."""

    def change(content):
        entry = content["annotations"][index]
        for key, value in values.items():
            if value is ...:
                del entry[key]
            else:
                entry[key] = value

    return change


def of_all(part, change):
    """A change of all entries of a list."""

    def change_all(content):
        for entry in content[part]:
            change(entry)

    return change_all


def of_entry(part, index, **values):
    """A change of an image or a category."""
    return lambda content: content[part][index].update(values)


def append(part, **values):
    """An entry more, like the last one but for some values."""
    return lambda content: content[part].append({**content[part][-1], **values})


def texts_for_numbers(entry):
    entry["bbox"] = [str(value) for value in entry["bbox"]]
    entry["area"] = str(entry["area"])
    entry["iscrowd"] = str(entry["iscrowd"])


POINTS = [[4, 5], [16, 5], [16, 15], [4, 15]]
RUNS = encoded(20, 6, 14, 20)

# What is changed, what the log says, what is then in the mended file at a path of keys.
MENDED = {
    "iscrowd is missing": (
        of_object(0, iscrowd=...),
        "iscrowd is missing or null, and is taken as 0, in 1 of its annotations; the first is "
        "entry 0",
        ("annotations", 0, "iscrowd", 0),
    ),
    "iscrowd is null": (of_object(2, iscrowd=None), "entry 2", ("annotations", 2, "iscrowd", 0)),
    "iscrowd is a bool": (of_object(3, iscrowd=True), "iscrowd", ("annotations", 3, "iscrowd", 1)),
    "iscrowd is text": (of_object(3, iscrowd="1"), "iscrowd", ("annotations", 3, "iscrowd", 1)),
    "ignore 1": (of_object(0, ignore=1), "ignore .* crowd", ("annotations", 0, "iscrowd", 1)),
    "ignore null": (of_object(0, ignore=None), "ignore", ("annotations", 0, "iscrowd", 0)),
    "ignore is text": (of_object(0, ignore="0"), "ignore", ("annotations", 0, "iscrowd", 0)),
    "area is missing": (of_object(0, area=...), "area", ("annotations", 0, "area", 120)),
    "area is missing, encoded mask": (
        of_object(1, area=..., bbox=[19, 5, 16, 22]),
        "area",
        ("annotations", 1, "area", 14 * 20),
    ),
    "area is null": (of_object(0, area=None), "area", ("annotations", 0, "area", 120)),
    "area is text": (of_object(0, area="large"), "area", ("annotations", 0, "area", 120)),
    "area is NaN": (of_object(0, area=nan), "area", ("annotations", 0, "area", 120)),
    "area is negative": (of_object(0, area=-3), "area", ("annotations", 0, "area", 120)),
    "area is 0": (of_object(0, area=0), "area", ("annotations", 0, "area", 120)),
    "area is larger than the image": (
        of_object(0, area=1e12),
        "area",
        ("annotations", 0, "area", 120),
    ),
    "numbers are text": (
        of_all("annotations", texts_for_numbers),
        "bbox holds text.* in 5 of its annotations",
        ("annotations", 1, "bbox", [20, 6, 14, 20]),
    ),
    "annotation ids are not unique": (
        of_object(1, id=1),
        "id of an object .* in 1 of",
        ("annotations", 1, "id", 6),
    ),
    "annotation id 0, which pycocotools takes for no match": (
        of_object(0, id=0),
        "id of an object",
        ("annotations", 0, "id", 6),
    ),
    "an annotation id is too large": (
        of_object(1, id=10**400),
        "the id of an object is not a positive number of its own, and it gets one, in 1",
        ("annotations", 1, "id", 6),
    ),
    "annotation ids are text": (
        of_all("annotations", lambda entry: entry.update(id=f"a{entry['id']}")),
        "id of an object .* in 5 of",
        ("annotations", 0, "id", 1),
    ),
    "annotation id is missing": (of_object(0, id=...), "id", ("annotations", 0, "id", 6)),
    "image_id is text": (
        of_all("annotations", lambda entry: entry.update(image_id=str(entry["image_id"]))),
        "image_id is written in another way .* in 5 of",
        ("annotations", 0, "image_id", 1),
    ),
    "image id is text": (
        of_all("images", lambda entry: entry.update(id=f"00{entry['id']}")),
        "image_id is written in another way",
        ("annotations", 0, "image_id", "001"),
    ),
    "image ids are mixed": (of_entry("images", 0, id="1"), "an id was", ("images", 0, "id", 1)),
    "category_id is text": (
        of_object(0, category_id="1"),
        "category_id is written in another way",
        ("annotations", 0, "category_id", 1),
    ),
    "ids are floats": (
        lambda content: [
            of_all("images", lambda entry: entry.update(id=float(entry["id"])))(content),
            of_all("categories", lambda entry: entry.update(id=float(entry["id"])))(content),
        ],
        "in 3 of its images",
        ("images", 0, "id", 1),
    ),
    "an object of an image that is not listed": (
        append("annotations", id=9, image_id=77),
        "image_id that none of the images has, and is left out, in 1 of .* entry 5",
        ("annotations", 4, "id", 5),
    ),
    "sizes are floats": (
        of_all("images", lambda entry: entry.update(width=float(WIDTH), height=f"{HEIGHT}")),
        "width or height .* in 6 of its images",
        ("images", 0, "height", HEIGHT),
    ),
    "an image is listed twice": (
        append("images"),
        "an image is listed again",
        ("images", 2, "id", 3),
    ),
    "a category is listed twice": (
        append("categories"),
        "a category is listed again",
        ("categories", 1, "id", 2),
    ),
    "a name is a number": (
        of_entry("categories", 0, name=7),
        "a name is a number",
        ("categories", 0, "name", "7"),
    ),
    "bbox is missing": (
        of_object(1, bbox=...),
        "bbox .* becomes the box of the segmentation",
        ("annotations", 1, "bbox", [20, 6, 14, 20]),
    ),
    "bbox is null": (of_object(0, bbox=None), "bbox", ("annotations", 0, "bbox", [4, 5, 12, 10])),
    "bbox is NaN": (
        of_object(0, bbox=[nan, 5, 12, 10]),
        "bbox",
        ("annotations", 0, "bbox", [4, 5, 12, 10]),
    ),
    "bbox goes to the left": (
        of_object(0, bbox=[16, 15, -12, -10]),
        "negative width or height",
        ("annotations", 0, "bbox", [4, 5, 12, 10]),
    ),
    "segmentation is a flat list": (
        of_object(0, segmentation=rectangle(4, 5, 12, 10)),
        "is not written as a list of polygons",
        ("annotations", 0, "segmentation", [rectangle(4, 5, 12, 10)]),
    ),
    "segmentation is a list of points": (
        of_object(0, segmentation=POINTS),
        "is not written as a list of polygons",
        ("annotations", 0, "segmentation", [rectangle(4, 5, 12, 10)]),
    ),
    "segmentation is a list of lists of points": (
        of_object(0, segmentation=[POINTS]),
        "is not written as a list of polygons",
        ("annotations", 0, "segmentation", [rectangle(4, 5, 12, 10)]),
    ),
    "a polygon holds text": (
        of_object(0, segmentation=[[str(v) for v in rectangle(4, 5, 12, 10)]]),
        "is text",
        ("annotations", 0, "segmentation", [rectangle(4, 5, 12, 10)]),
    ),
    "a part is no polygon": (
        of_object(
            0, segmentation=[[], [4, 5, 6, 7], rectangle(4, 5, 12, 10), [1, 2, 3, 4, 5, 6, 7]]
        ),
        "a part of a segmentation",
        ("annotations", 0, "segmentation", [rectangle(4, 5, 12, 10)]),
    ),
    "segmentation is empty in itself": (
        of_object(0, segmentation=[[]]),
        "no polygon of three points or more, and its object is left out, in 1",
        ("annotations", 0, "id", 2),
    ),
    "segmentation is four numbers": (
        of_object(0, segmentation=[[4, 5, 12, 10]]),
        "no polygon of three points or more, and its object is left out, in 1",
        ("annotations", 0, "id", 2),
    ),
    "a crowd has no segmentation": (
        of_object(3, segmentation=...),
        "a crowd has no segmentation",
        ("annotations", 3, "segmentation", [rectangle(26, 2, 10, 20)]),
    ),
    "keypoints nobody asked for": (
        of_object(0, keypoints=[1, None, "x"]),
        "keypoints cannot be used",
        ("annotations", 0, "bbox", [4, 5, 12, 10]),
    ),
    "a backslash": (
        of_entry("images", 0, file_name="below\\1.png"),
        "has backslashes",
        ("images", 0, "file_name", "below/1.png"),
    ),
    "NFC for NFD": (
        of_entry("images", 0, file_name="\u00fc.png"),
        "another Unicode normal form",
        ("images", 0, "file_name", "u\u0308.png"),
    ),
    "capital letters": (
        of_entry("images", 1, file_name="2.PNG"),
        "other capital letters",
        ("images", 1, "file_name", "2.png"),
    ),
}


@pytest.mark.parametrize("change, line, expected", MENDED.values(), ids=MENDED)
def test_mended(tiny, tmp_path, kn_log, change, line, expected):
    """It is said once, with a count; training and COCO's evaluation both have it."""
    (tiny.image_root / "below").mkdir()
    for copy in ("below/1.png", "u\u0308.png"):
        (tiny.image_root / copy).write_bytes((tiny.image_root / "1.png").read_bytes())
    content = sound_content()
    change(content)
    tiny.write(content)
    written = tiny.json_file.read_bytes()
    check_dataset("tiny", tmp_path / "run")
    assert tiny.json_file.read_bytes() == written
    lines = [record.getMessage() for record in kn_log.records]
    assert any(re.search(line, said) and str(tiny.json_file) in said for said in lines), lines

    mended_file = MetadataCatalog.get("tiny").json_file
    mended = json.loads(Path(mended_file).read_text())
    part, index, key, value = expected
    assert mended[part][index][key] == value
    assert type(mended[part][index][key]) is type(value) or part == "annotations"
    for annotation in mended["annotations"]:
        assert isinstance(annotation["area"], (int, float)) and annotation["iscrowd"] in (0, 1)

    # A second pass finds nothing more.
    kn_log.clear()
    tiny.write(mended)
    check_dataset("tiny", tmp_path / "run")
    assert not kn_log.records

    cfg = get_cfg()
    cfg.MODEL.MASK_ON, cfg.INPUT.MASK_FORMAT = True, "bitmask"
    mapper = DatasetMapper(cfg, is_train=True)
    assert sum(len(mapper(record)["instances"]) for record in DatasetCatalog.get("tiny")) >= 3
    assert score_of_truth("tiny") == pytest.approx((100, 100))


# What is changed, and what the sentence has.
REFUSED = {
    "an image id twice": (
        of_entry("images", 1, id=1),
        "gives 2.png the id 1 that 1.png has in entry 1 of images",
    ),
    "a category id twice": (
        of_entry("categories", 1, id=1),
        "gives 'dog' the id 1 that 'cat' has in entry 1 of categories",
    ),
    "a null name": (of_entry("categories", 1, name=None), "name None in entry 1 of categories"),
    "an empty name": (of_entry("categories", 1, name=""), "name '' in entry 1 of categories"),
    "an id is null": (of_entry("images", 1, id=None), "id None, .* in entry 1 of images"),
    "an id is half": (of_entry("images", 1, id=1.5), "id 1.5, .* in entry 1 of images"),
    "ids are numbers and words": (of_entry("images", 1, id="two"), "id 'two'"),
    "an image without name": (of_entry("images", 0, file_name=None), "file_name None in entry 0"),
    "a size is null": (of_entry("images", 0, width=None), "width None in entry 0 of images"),
    "a size is 0": (of_entry("images", 0, height=0), "height 0 in entry 0 of images"),
    "a size is half": (of_entry("images", 0, height=30.5), "height 30.5 in entry 0 of images"),
    "a size is NaN": (of_entry("images", 0, height=nan), "height nan in entry 0 of images"),
    "an entry is no object": (lambda c: c["images"].append(3), "no object in entry 3 of images"),
    "image_id is null": (of_object(2, image_id=None), "image_id None, .* in entry 2"),
    "category_id is unknown": (
        of_object(2, category_id=3),
        r"category_id 3, .* entry 2 .*\(id 3\)",
    ),
    "category_id may be either of two": (
        lambda content: [
            content["categories"][0].update(id="7"),
            content["categories"][1].update(id="007"),
            of_all("annotations", lambda entry: entry.update(category_id=7))(content),
        ],
        "category_id 7, which is none of its categories, in entry 0",
    ),
    "category_id is a bool": (of_object(2, category_id=True), "category_id True"),
    "category_id is a list": (of_object(2, category_id=[1]), r"category_id \[1\]"),
    "iscrowd is 2": (of_object(0, iscrowd=2), "iscrowd 2 in entry 0 of annotations"),
    "iscrowd is a word": (of_object(0, iscrowd="yes"), "iscrowd 'yes' in entry 0"),
    "bbox has five numbers": (of_object(0, bbox=[1] * 5, segmentation=...), "bbox .* in entry 0"),
    "bbox is a word": (of_object(0, bbox="a", segmentation=...), "bbox 'a' in entry 0"),
    "bbox is NaN": (of_object(0, bbox=[nan] * 4, segmentation=...), "bbox .* in entry 0"),
    "bbox is infinite": (of_object(0, bbox=[0, 0, inf, 1], segmentation=...), "bbox .*inf"),
    "bbox is null": (of_object(0, bbox=[None] * 4, segmentation=...), "bbox .* in entry 0"),
    "bbox is beyond all floats": (
        of_object(0, bbox=[0, 0.5, 10**400, 1], segmentation=...),
        "bbox .* in entry 0",
    ),
    "bbox is far away": (of_object(0, bbox=[1e8, 0, 5, 5]), "far outside its image of 40 x 30"),
    "bbox is far to the left": (of_object(0, bbox=[-1e8, 0, 5, 5]), "far outside its image"),
    "bbox is far above": (of_object(0, bbox=[0, -1e8, 5, 5]), "far outside its image"),
    "bbox is far below": (of_object(0, bbox=[0, 1e8, 5, 5]), "far outside its image"),
    "bbox is too wide": (of_object(0, bbox=[0, 0, 1e8, 5]), "far outside its image"),
    "bbox is too high": (of_object(0, bbox=[0, 0, 5, 1e8]), "far outside its image"),
    "a coordinate is NaN": (
        of_object(0, segmentation=[[4, 5, nan, 5, 16, 15]]),
        "coordinate that is not a number or lies far outside the image in entry 0",
    ),
    "a coordinate is 1e8": (of_object(2, segmentation=[[4, 5, 1e8, 5, 16, 15]]), "in entry 2"),
    "a coordinate is -1e8": (of_object(2, segmentation=[[4, 5, 9, -1e8, 16, 15]]), "in entry 2"),
    "a coordinate is null": (
        of_object(2, segmentation=[[4, 5, None, 5, 16, 15]]),
        "coordinate that is not a number in entry 2",
    ),
    "a coordinate is beyond all floats": (
        of_object(2, segmentation=[[4, 5, 10**400, 5, 16, 15]]),
        "coordinate that is not a number in entry 2",
    ),
    "segmentation is a word": (of_object(0, segmentation="mask.png"), "neither a list of poly"),
    "segmentation is a number": (of_object(0, segmentation=3), "neither a list of polygons"),
    "segmentation has objects": (
        of_object(0, segmentation=[{"x": 1, "y": 2}] * 3),
        "segmentation .* in entry 0",
    ),
    "a mask of another size": (
        of_object(1, segmentation={**RUNS, "size": [WIDTH, HEIGHT]}),
        r"size \[40, 30\] \(height, width\) in an image of 40 x 30",
    ),
    "a mask without size": (of_object(1, segmentation={"counts": RUNS["counts"]}), "size None"),
    "a mask without counts": (of_object(1, segmentation={"size": RUNS["size"]}), "no counts"),
    "a mask that is cut short": (
        of_object(1, segmentation={**RUNS, "counts": RUNS["counts"][:4]}),
        "do not add up",
    ),
    "a mask that ends within a number": (
        of_object(1, segmentation={**RUNS, "counts": RUNS["counts"] + "o"}),
        "do not add up",
    ),
    "a mask of other characters": (
        of_object(1, segmentation={**RUNS, "counts": "\u00fc "}),
        "do not add up",
    ),
    "runs that do not add up": (
        of_object(1, segmentation={**RUNS, "counts": [10, 10**9]}),
        "do not add up",
    ),
    "a negative run": (
        of_object(1, segmentation={**RUNS, "counts": [-10, WIDTH * HEIGHT + 10]}),
        "do not add up",
    ),
}


@pytest.mark.parametrize("change, pattern", REFUSED.values(), ids=REFUSED)
def test_refused(tiny, tmp_path, change, pattern):
    content = sound_content()
    change(content)
    tiny.write(content)
    with pytest.raises(InputError, match=pattern) as caught:
        check_dataset("tiny", tmp_path / "run")
    sentence = str(caught.value)
    assert sentence.startswith(f"Annotation file {tiny.json_file} ")
    assert "\n" not in sentence and sentence.endswith(".") and ": " in sentence


@pytest.mark.parametrize(
    "segmentation",
    [
        [[]],
        [[4, 5, 12, 10]],
        [4, 5, 12, 10],
        "mask.png",
        3,
        {"counts": [3]},
        [[nan] * 6],
        [[1e8] * 6],
        [[None] * 6],
    ],
    ids=str,
)
def test_masks_that_nobody_uses_cost_no_boxes(tiny, tmp_path, kn_log, segmentation):
    content = sound_content()
    of_object(0, segmentation=segmentation, area=...)(content)
    tiny.write(content)
    truth = check_dataset("tiny", tmp_path / "run", Uses(masks=False))
    assert truth.num_objects == 4
    assert "a segmentation cannot be used and is left out" in kn_log.text
    records = DatasetCatalog.get("tiny")
    assert [len(record["annotations"]) for record in records] == [2, 2, 1]
    mended = json.loads(Path(MetadataCatalog.get("tiny").json_file).read_text())
    assert mended["annotations"][0]["area"] == 120


def test_sound_annotations_are_used_as_they_are(tiny, tmp_path, kn_log):
    metadata = MetadataCatalog.get("tiny").as_dict()
    truth = check_dataset("tiny", tmp_path / "run")
    assert not kn_log.records and not (tmp_path / "run").exists()
    assert MetadataCatalog.get("tiny").json_file == metadata["json_file"]
    assert truth.classes == ("cat", "dog")
    assert (truth.num_objects, truth.num_without_mask) == (4, 0)
    assert truth.has_encoded_masks
    assert (truth.most_objects, truth.fullest_image) == (2, "1.png")


def test_run_lengths_in_a_list_are_as_good_as_in_a_text(tiny, tmp_path, kn_log):
    content = sound_content()
    # Column by column: 20 columns and 6 pixels before the mask, 14 columns of 20 in it.
    runs = [20 * HEIGHT + 6, *[20, HEIGHT - 20] * 13, 20, 6 * HEIGHT + 4]
    content["annotations"][1]["segmentation"]["counts"] = runs
    tiny.write(content)
    truth = check_dataset("tiny", tmp_path / "run")
    assert not kn_log.records and truth.has_encoded_masks
    assert score_of_truth("tiny") == pytest.approx((100, 100))


def test_a_loader_that_would_not_read_the_mended_file(tiny, tmp_path):
    DatasetCatalog.pop("tiny")
    DatasetCatalog.register("tiny", lambda: [])
    check_dataset("tiny", tmp_path / "run")  # nothing is to be mended
    content = sound_content()
    of_object(0, iscrowd=...)(content)
    tiny.write(content)
    with pytest.raises(InputError, match="iscrowd is missing .* loaded by a function of its own"):
        check_dataset("tiny", tmp_path / "run")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_encodings(tiny, tmp_path, kn_log, encoding):
    tiny.json_file.write_text(json.dumps(sound_content()), encoding=encoding)
    check_dataset("tiny", tmp_path / "run")
    assert "its text is utf-" in kn_log.text
    assert score_of_truth("tiny") == pytest.approx((100, 100))


def test_evaluation_needs_no_info(tiny):
    """Some versions of pycocotools do, and this one may be another."""
    assert "info" not in json.loads(tiny.json_file.read_text())
    evaluator = FullCOCOEvaluator("tiny", ("bbox",), False, use_fast_impl=False)
    assert evaluator._coco_api.dataset["info"] == {}


def test_text_ids_of_images_stay_what_they_are(tiny, tmp_path, kn_log):
    content = sound_content()
    for entry in content["images"]:
        entry["id"] = f"image {entry['id']}"
    for entry in content["annotations"]:
        entry["image_id"] = f"image {entry['image_id']}"
    tiny.write(content)
    check_dataset("tiny", tmp_path / "run")
    assert not kn_log.records
    assert score_of_truth("tiny") == pytest.approx((100, 100))


@pytest.mark.parametrize(
    "box",
    [
        *([4, 5, 0, 10], [4, 5, 12, 0]),
        *([-8, 5, 8, 10], [WIDTH, 5, 8, 10], [4, -10, 8, 10], [4, HEIGHT, 8, 10]),
    ],
    ids=str,
)
def test_boxes_without_area_are_counted(tiny, tmp_path, kn_log, box):
    content = sound_content()
    of_object(0, bbox=box)(content)
    of_object(2, bbox=box)(content)
    tiny.write(content)
    assert check_dataset("tiny", tmp_path / "run").num_objects == 2
    assert "no area within its image, and its object is not learned, in 2" in kn_log.text


def test_corners_for_sizes_are_pointed_out(tiny, tmp_path, kn_log):
    content = sound_content()
    for entry in content["annotations"]:
        entry["bbox"] = [25, 20, 39, 29]
    tiny.write(content)
    check_dataset("tiny", tmp_path / "run")
    assert "could be [left, top, right, bottom]" in kn_log.text


def test_many_corners_for_sizes_are_refused(tiny, tmp_path):
    content = sound_content()
    for entry in content["annotations"]:
        entry["bbox"] = [25, 20, 39, 29]
    objects = content["annotations"]
    for round in range(1, 4):
        objects += [{**entry, "id": entry["id"] + 1000 * round} for entry in objects[:5]]
    tiny.write(content)
    with pytest.raises(InputError, match="20 of them stick out .* in entry 0 .*width, height"):
        check_dataset("tiny", tmp_path / "run")


def test_boxes_in_fractions_of_the_image_are_refused(tiny, tmp_path):
    content = sound_content()
    for entry in content["annotations"]:
        entry["bbox"] = [0.25, 0.1, 0.5, 0.9]
    tiny.write(content)
    with pytest.raises(InputError, match="all lie in the first pixel .* in entry 0 .*: multiply"):
        check_dataset("tiny", tmp_path / "run")
    content["annotations"][0]["bbox"] = [4, 5, 10, 10]  # one object may be as small
    tiny.write(content)
    check_dataset("tiny", tmp_path / "run")


def test_keypoints_that_are_learned(tiny, tmp_path, kn_log):
    content = sound_content()
    for entry in content["annotations"]:
        entry.update(keypoints=[1, 2, 2, 0, 0, 0], num_keypoints=1)
    del content["annotations"][0]["keypoints"], content["annotations"][1]["num_keypoints"]
    tiny.write(content)
    assert check_dataset("tiny", tmp_path / "run", Uses(keypoints=2)).most_keypoints == 1
    mended = json.loads(Path(MetadataCatalog.get("tiny").json_file).read_text())
    assert mended["annotations"][0]["keypoints"] == [0] * 6
    assert [a["num_keypoints"] for a in mended["annotations"]] == [0, 1, 1, 1, 1]
    with pytest.raises(InputError, match="NUM_KEYPOINTS 3 in entry 1.* or that number"):
        check_dataset("tiny", tmp_path / "run", Uses(keypoints=3))


@pytest.mark.parametrize("seed", range(20))
def test_lengths_of_encoded_masks_are_read_as_pycocotools_reads_them(seed):
    random = np.random.default_rng(seed)
    height, width = random.integers(1, 2000 if seed % 2 else 40, 2)
    mask = np.zeros((height, width), np.uint8, order="F")
    for _ in range(random.integers(0, 6)):
        top, left = random.integers(0, height), random.integers(0, width)
        mask[top : top + random.integers(1, height + 1), left : left + 300] ^= 1
    found = mask_util.encode(mask)
    text = {"size": [int(height), int(width)], "counts": found["counts"].decode()}
    assert fault_of_run_lengths(text, (width, height)) is None
    wrong = {"size": [int(height), int(width) + 1], "counts": text["counts"]}
    assert "add up" in fault_of_run_lengths(wrong, (width + 1, height))
