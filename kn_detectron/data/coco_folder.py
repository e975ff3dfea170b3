"""Registering a folder of one's own data in COCO's layout."""

import fnmatch
import os

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from ..errors import InputError

__all__ = ["register_coco_folder"]


def register_coco_folder(folder, splits=("train", "val")):
    """Registers the splits of a folder that is laid out as COCO is.

    The images of ``annotations/instances_train.json`` are in ``train/``, and those of
    ``annotations/instances_val.json`` in ``val/``. If the file is called
    ``instances_train2017.json``, the images are in ``train2017/``. The splits are registered under
    the absolute paths of their image folders. Doing it again registers them anew, since the
    annotations may have changed.

    Args:
        folder (str): the folder. The files are not read.
        splits (tuple[str]): the splits that have to be there.

    Returns:
        tuple[str]: their names as datasets.

    Raises:
        InputError: the folder or an annotation file is missing.
    """
    folder = os.path.abspath(os.path.expanduser(folder))
    if not os.path.isdir(folder):
        wanted = " and ".join(f"annotations/instances_{s}.json with its {s}/" for s in splits)
        raise InputError(f"--dataset {folder} is not a folder: give one with {wanted} in it.")
    return tuple(_register_split(folder, split) for split in splits)


def _register_split(folder, split):
    annotations = os.path.join(folder, "annotations")
    names = os.listdir(annotations) if os.path.isdir(annotations) else []
    found = sorted(fnmatch.filter(names, f"instances_{split}*.json"))
    if f"instances_{split}.json" in found:
        found = [f"instances_{split}.json"]
    if len(found) != 1:
        there = f"{len(found)} files" if found else "no file"
        raise InputError(
            f"{folder} has {there} annotations/instances_{split}*.json: expected one, in COCO's "
            f"format, and its images in a folder with the name that follows instances_."
        )
    base = os.path.splitext(found[0])[0]
    images = os.path.join(folder, base[len("instances_") :])
    if images in DatasetCatalog.list():
        DatasetCatalog.pop(images)
        MetadataCatalog.pop(images)
    register_coco_instances(images, {}, os.path.join(annotations, found[0]), images)
    return images
