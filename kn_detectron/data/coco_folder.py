"""A folder of one's own data in COCO's format, without registering it by hand."""

import glob
import json
import os
from typing import NamedTuple, Tuple

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from ..errors import InputError
from .validate import check_dataset

__all__ = ["CocoFolder", "register_coco_folder"]


class CocoFolder(NamedTuple):
    """What a config has to know of a folder of data.

    Attributes:
        train, val: the names under which the two splits are registered.
        classes: names of the categories, in the order of their ids.
        has_masks: whether all objects have segmentations.
        has_encoded_masks: whether some objects, crowds aside, have theirs run-length encoded, for
            which detectron2 wants INPUT.MASK_FORMAT "bitmask".
    """

    train: str
    val: str
    classes: Tuple[str, ...]
    has_masks: bool
    has_encoded_masks: bool


def register_coco_folder(folder):
    """Registers the two splits of a folder that is laid out as COCO is.

    That is ``annotations/instances_train.json`` with its images in ``train/``, and
    ``annotations/instances_val.json`` with its images in ``val/``; where the file is called
    ``instances_train2017.json`` the images are in ``train2017/``. They are registered under the
    absolute paths of their image folders. Doing it again changes nothing.

    Args:
        folder (str): the folder.

    Returns:
        CocoFolder

    Raises:
        InputError: a part is missing or broken, or the splits have different categories.
    """
    folder = os.path.abspath(os.path.expanduser(folder))
    splits = [_register_split(folder, split) for split in ("train", "val")]
    contents = []
    for name in splits:
        check_dataset(name)
        with open(MetadataCatalog.get(name).json_file, encoding="utf-8") as file:
            contents.append(json.load(file))
    train, val = (
        {category["id"]: category["name"] for category in content["categories"]}
        for content in contents
    )
    if train != val:
        name = next(f"{i} {(train | val)[i]!r}" for i in train | val if train.get(i) != val.get(i))
        raise InputError(
            f"The categories of train and val in {folder} differ (the first is {name}): give both "
            "annotation files the same list of categories."
        )
    masks = [
        annotation.get("segmentation")
        for content in contents
        for annotation in content["annotations"]
        if not annotation.get("iscrowd", 0)
    ]
    return CocoFolder(
        *splits,
        classes=tuple(name for _, name in sorted(train.items())),
        has_masks=all(masks),
        has_encoded_masks=any(isinstance(mask, dict) for mask in masks),
    )


def _register_split(folder, split):
    pattern = os.path.join(glob.escape(folder), "annotations", f"instances_{split}*.json")
    found = sorted(glob.glob(pattern))
    if len(found) != 1:
        there = f"{len(found)} files" if found else "no file"
        raise InputError(
            f"{folder} has {there} annotations/instances_{split}*.json: expected one, in COCO's "
            f"format, and its images in a folder named like what follows instances_."
        )
    base = os.path.splitext(os.path.basename(found[0]))[0]
    images = os.path.join(folder, base[len("instances_") :])
    if images in DatasetCatalog.list():
        DatasetCatalog.pop(images)
        MetadataCatalog.pop(images)
    register_coco_instances(images, {}, found[0], images)
    return images
