"""Checks of a dataset's files before a run starts, in the user's terms."""

import difflib
import json
import os

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..errors import InputError
from .register import prepare_dataset

__all__ = ["check_dataset"]

_REQUIRED_KEYS = {
    "images": {"id", "file_name", "width", "height"},
    "categories": {"id", "name"},
    "annotations": {"id", "image_id", "category_id", "bbox"},
}


def check_dataset(name):
    """Checks that a dataset can be used; writes it first if it is one that is generated.

    It reads the annotation file once and lists the image folder once; no image is opened. For
    COCO's train2017 most of the time goes into its 450 MB of JSON, so one process is enough.
    A dataset that is not in COCO's format is only looked up by name.

    Args:
        name (str): name of the dataset as in DATASETS.TRAIN.

    Raises:
        InputError: the name is unknown, or the dataset's files are missing or broken.
    """
    if name not in DatasetCatalog.list():
        close = difflib.get_close_matches(name, DatasetCatalog.list())
        raise InputError(
            f"Dataset {name!r} is not registered in detectron2's catalog: register it or correct "
            f"the name{' to ' + ' or '.join(close) if close else ''}."
        )
    prepare_dataset(name)
    metadata = MetadataCatalog.get(name)
    # LVIS has these files too, but another format in them.
    if metadata.get("evaluator_type") != "coco" or not metadata.get("json_file"):
        return
    _check_root(name, metadata.json_file)
    content = _read_json(name, metadata.json_file)
    _check_content(metadata.json_file, content)
    _check_images(name, metadata.image_root, [i["file_name"] for i in content["images"]])


def _check_root(name, json_file):
    root = os.getenv("DETECTRON2_DATASETS")
    if root is not None and not os.path.isdir(os.path.expanduser(root)):
        under_root = os.path.abspath(json_file).startswith(
            os.path.abspath(os.path.expanduser(root)) + os.sep
        )
        if under_root:
            raise InputError(
                f"Folder {root}, where dataset {name} is looked for, does not exist: set the "
                "environment variable DETECTRON2_DATASETS to the folder that holds the datasets."
            )


def _read_json(name, json_file):
    if not PathManager.isfile(json_file):
        raise InputError(
            f"Annotation file {json_file} of dataset {name} does not exist: put it there, or set "
            "the environment variable DETECTRON2_DATASETS to the folder that holds the datasets."
        )
    try:
        with PathManager.open(json_file, "r", encoding="utf-8") as f:
            return json.load(f)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise InputError(
            f"Annotation file {json_file} is not valid JSON ({error.msg} at {where}, character "
            f"{error.pos} of {len(error.doc)}): it is broken or cut short, copy it again."
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"Annotation file {json_file} is not text (byte {error.start} is not UTF-8): expected "
            "COCO instances in JSON, copy it again."
        ) from error


def _check_content(json_file, content):
    """Checks that the parsed annotation file has the structure of COCO instances."""
    fault = _fault_of_content(content, test_set=_is_test_set(json_file))
    if fault is not None:
        raise InputError(
            f"Annotation file {json_file} {fault}: expected COCO instances, a JSON object with "
            "the lists images, annotations and categories."
        )


def _is_test_set(json_file):
    """COCO keeps the annotations of its test sets back; their files are named image_info_*."""
    return os.path.basename(json_file).startswith("image_info")


def _fault_of_content(content, test_set):
    if not isinstance(content, dict):
        return f"holds a JSON {type(content).__name__}"
    for part, keys in _REQUIRED_KEYS.items():
        if part == "annotations" and test_set:
            continue
        entries = content.get(part)
        if not isinstance(entries, list):
            return f"has no list {part}"
        if not entries and part != "annotations":
            return f"has an empty list {part}"
        for index, entry in enumerate(entries):
            if not isinstance(entry, dict) or not keys <= entry.keys():
                return f"lacks one of {', '.join(sorted(keys))} in entry {index} of {part}"
    known = {category["id"] for category in content["categories"]}
    for index, annotation in enumerate(content.get("annotations", ())):
        if annotation["category_id"] not in known:
            return (
                f"has the category_id {annotation['category_id']}, which is none of its "
                f"categories, in entry {index} of annotations"
            )
    return None


def _check_images(name, image_root, file_names):
    """Checks that all images exist, by listing each folder once instead of asking per image."""
    if not PathManager.isdir(image_root):
        raise InputError(
            f"Image folder {image_root} of dataset {name} does not exist: put the images there, or "
            "set the environment variable DETECTRON2_DATASETS to the folder that holds the "
            "datasets."
        )
    present = {}
    missing = []
    for file_name in file_names:
        folder, base = os.path.split(file_name)
        if folder not in present:
            path = os.path.join(image_root, folder)
            present[folder] = set(PathManager.ls(path)) if PathManager.isdir(path) else set()
        if base not in present[folder]:
            missing.append(file_name)
    if missing:
        raise InputError(
            f"Image folder {image_root} lacks {len(missing)} of the {len(file_names)} images of "
            f"dataset {name}, the first is {missing[0]}: expected all of them, copy the rest."
        )
