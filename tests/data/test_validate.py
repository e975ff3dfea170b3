import functools
import json
import os
import sys

import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances

from kn_detectron.data import (
    ShapesSpec,
    check_dataset,
    check_datasets_once,
    register_shapes_lazily,
)
from kn_detectron.errors import InputError


@pytest.fixture
def coco(tmp_path):
    """A dataset of three images in COCO's format, registered as `tiny`: its two paths."""
    json_file, image_root = tmp_path / "sets" / "tiny.json", tmp_path / "sets" / "images"
    image_root.mkdir(parents=True)
    images = [dict(id=i, file_name=f"{i}.jpg", width=4, height=3) for i in range(3)]
    for image in images:
        (image_root / image["file_name"]).touch()
    annotations = [dict(id=1, image_id=2, category_id=7, bbox=[0, 0, 2, 2], area=4, iscrowd=0)]
    content = dict(images=images, annotations=annotations, categories=[dict(id=7, name="cat")])
    json_file.write_text(json.dumps(content))
    register_coco_instances("tiny", {}, str(json_file), str(image_root))
    yield json_file, image_root
    DatasetCatalog.pop("tiny")
    MetadataCatalog.pop("tiny")


def _check(name):
    # No test here has something to be mended.
    return check_dataset(name, output_dir="/dev/null")


def _refused(name="tiny"):
    with pytest.raises(InputError) as caught:
        _check(name)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith(".") and ". " not in sentence
    return sentence


def _change(json_file, change):
    content = json.loads(json_file.read_text())
    change(content)
    json_file.write_text(json.dumps(content))


def test_sound_dataset_passes(coco, shapes):
    _check("tiny")
    _check("shapes_train")


def test_a_file_that_was_changed_is_checked_again(coco):
    json_file, _ = coco
    _check("tiny")
    size, seen = json_file.stat().st_size, json_file.stat().st_mtime_ns
    _change(json_file, lambda content: content["annotations"][0].update(category_id=8))
    os.utime(json_file, ns=(seen + 10**9, seen + 10**9))  # some file systems have coarse clocks
    assert json_file.stat().st_size == size
    assert "category" in _refused()


def test_another_config_is_checked_against_a_dataset_that_is_known(coco, tmp_path):
    """As in a notebook, with one trainer after another."""
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path)
    cfg.DATASETS.TRAIN = ("tiny",)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
    check_datasets_once(cfg)
    read = MetadataCatalog.get("tiny").checked
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    with pytest.raises(InputError, match="NUM_CLASSES is 80, but .* has 1 categories"):
        check_datasets_once(cfg)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
    check_datasets_once(cfg)
    assert MetadataCatalog.get("tiny").checked is read


def test_metadata_that_a_user_holds_stays_true(coco, tmp_path):
    json_file, _ = coco
    metadata = MetadataCatalog.get("tiny")
    check_dataset("tiny", str(tmp_path))
    assert MetadataCatalog.get("tiny") is metadata and metadata.json_file == str(json_file)
    _change(json_file, lambda content: content["annotations"][0].pop("iscrowd"))
    check_dataset("tiny", str(tmp_path))
    assert MetadataCatalog.get("tiny") is metadata
    assert metadata.json_file != str(json_file) == metadata.source_json_file
    DatasetCatalog.get("tiny")
    assert metadata.thing_classes == ["cat"]


def test_a_dataset_without_an_image_folder_is_not_cocos(coco):
    json_file, _ = coco
    MetadataCatalog.pop("tiny")
    MetadataCatalog.get("tiny").set(json_file=str(json_file), evaluator_type="coco")
    assert check_dataset("tiny", "/dev/null") is None


@pytest.mark.parametrize(
    "args, keywords", [((["colour"],), {}), ((), {"extra_annotation_keys": ["colour"]})]
)
def test_a_loader_with_keys_of_its_own_is_not_replaced(coco, tmp_path, args, keywords):
    json_file, image_root = coco
    DatasetCatalog.pop("tiny")
    load = functools.partial(
        load_coco_json, str(json_file), str(image_root), "tiny", *args, **keywords
    )
    DatasetCatalog.register("tiny", load)
    check_dataset("tiny", str(tmp_path))
    _change(json_file, lambda content: content["annotations"][0].pop("iscrowd"))
    with pytest.raises(InputError, match="is loaded by a function of its own"):
        check_dataset("tiny", str(tmp_path))


def test_generated_dataset_is_generated(tmp_path, default_registration):
    register_shapes_lazily(tmp_path / "shapes", ShapesSpec(num_train=1, num_val=1, size=32))
    _check("shapes_train")
    assert (tmp_path / "shapes" / "train" / "000000.png").is_file()


def test_unknown_name():
    assert "coco_2017_train" in _refused("coco_2017_trian")
    assert " to " not in _refused("xyzzy")


def test_folder_in_place_of_a_name(tmp_path):
    assert "--dataset" in _refused(str(tmp_path))


def test_missing_datasets_folder(coco, tmp_path, monkeypatch):
    folder = tmp_path / "sets"
    monkeypatch.setenv("DETECTRON2_DATASETS", str(folder))
    _check("tiny")
    folder.rename(tmp_path / "elsewhere")
    sentence = _refused()
    assert sentence.startswith(f"Folder {folder}, ") and "DETECTRON2_DATASETS" in sentence


def test_missing_annotation_file(coco):
    coco[0].unlink()
    assert f"Annotation file {coco[0]} of dataset tiny does not exist" in _refused()


def test_truncated_json(coco):
    text = coco[0].read_text()
    coco[0].write_text(text[:100])
    sentence = _refused()
    assert f"{coco[0]} is not valid JSON" in sentence and "line 1, column" in sentence
    assert "of 100)" in sentence
    coco[0].write_bytes(b"\xff\xd8\xff\xe0" + text.encode())
    assert f"{coco[0]} is not text (byte 0" in _refused()


@pytest.mark.parametrize("part", ["images", "annotations", "categories"])
def test_json_that_is_not_coco(coco, part):
    _change(coco[0], lambda content: content.pop(part))
    assert f"{coco[0]} has no list {part}" in _refused()


@pytest.mark.parametrize(
    "part, key", [("images", "height"), ("annotations", "bbox"), ("categories", "name")]
)
def test_entries_that_are_not_coco(coco, part, key):
    _change(coco[0], lambda content: content[part][0].pop(key))
    sentence = _refused()
    assert key in sentence and f"entry 0 of {part}" in sentence


def test_annotations_that_point_nowhere(coco):
    _change(coco[0], lambda content: content["annotations"][0].update(category_id=8))
    assert "category_id 8" in _refused()


def test_other_json(coco):
    coco[0].write_text("[1, 2]")
    assert "holds a JSON list" in _refused()
    coco[0].write_text(json.dumps(dict(images=[], annotations=[], categories=[])))
    assert "has an empty list images" in _refused()


def test_a_number_that_is_too_long(coco):
    coco[0].write_text("[" + "9" * 5000 + "]")
    assert f"{coco[0]} cannot be read (Exceeds the limit" in _refused()


def test_json_that_is_nested_without_end(coco):
    coco[0].write_text("[" * 200_000)
    assert "nested too deeply" in _refused()


def test_image_list_of_a_test_set_needs_no_annotations(coco):
    json_file = coco[0].with_name("image_info_tiny.json")
    json_file.write_text(coco[0].read_text())
    _change(json_file, lambda content: content.pop("annotations"))
    register_coco_instances("tiny_test", {}, str(json_file), str(coco[1]))
    try:
        _check("tiny_test")
        (coco[1] / "0.jpg").unlink()
        assert "lacks 1 of the 3 images" in _refused("tiny_test")
    finally:
        DatasetCatalog.pop("tiny_test")
        MetadataCatalog.pop("tiny_test")


def test_missing_image_folder(coco):
    coco[1].rename(coco[1].with_name("pictures"))
    assert f"Image folder {coco[1]} of dataset tiny does not exist" in _refused()


def test_images_that_are_half_there(coco):
    for name in ("1.jpg", "2.jpg"):
        (coco[1] / name).unlink()
    sentence = _refused()
    assert "lacks 2 of the 3 images" in sentence and "the first is 1.jpg" in sentence


@pytest.mark.parametrize(
    "file_name, advice",
    [
        ("a\\nothing.jpg", "write / for"),
        ("images/0.jpg", "write file_name without the folder, 0.jpg"),
        ("nothing.jpg", "copy the rest"),
    ],
)
def test_why_an_image_is_not_found(coco, file_name, advice):
    _change(coco[0], lambda content: content["images"][0].update(file_name=file_name))
    sentence = _refused()
    assert f"the first is {file_name}" in sentence and advice in sentence


def test_images_in_subfolders(coco):
    (coco[1] / "a").mkdir()
    (coco[1] / "2.jpg").rename(coco[1] / "a" / "2.jpg")
    assert "lacks 1 of the 3" in _refused()
    _change(coco[0], lambda content: content["images"][2].update(file_name="a/2.jpg"))
    _check("tiny")
    _change(coco[0], lambda content: content["images"][1].update(file_name="b/1.jpg"))
    assert "the first is b/1.jpg" in _refused()


def _questions_to_the_file_system(number_of_images):
    asked = []

    def note(frame, event, function):
        if event == "c_call" and function in (os.stat, os.lstat, os.access, os.listdir, os.scandir):
            asked.append(function.__name__)

    sys.setprofile(note)
    try:
        assert f"lacks {number_of_images} of the {number_of_images} images" in _refused()
    finally:
        sys.setprofile(None)
    return asked


def test_the_file_system_is_not_asked_about_every_image(coco):
    asked = []
    for count in (3, 300):
        images = [dict(id=i, file_name=f"{i:012}.jpg", width=4, height=3) for i in range(count)]
        _change(coco[0], lambda content: content.update(images=images))
        asked.append(_questions_to_the_file_system(count))
    assert asked[0] == asked[1] and "listdir" in asked[0]
