"""Datasets that a config names by the paths of their image folders, as --dataset makes it do."""

import os

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

__all__ = ["register_named_folders"]


def register_named_folders(cfg):
    """Registers the folders in DATASETS.TRAIN and DATASETS.TEST, with the names of their classes.

    A name that is an absolute path, ``<folder>/<split>``, is a folder of images with the
    annotations ``<folder>/annotations/instances_<split>.json``; see
    :func:`~kn_detectron.data.register_coco_folder`. The files need not exist, since a predictor
    does not use them. Other names, and names that are registered, are left alone.

    Args:
        cfg (CfgNode): with DATASETS.CLASS_NAMES, which may be empty.
    """
    for name in dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)):
        if not os.path.isabs(name) or name in DatasetCatalog.list():
            continue
        folder, split = os.path.split(name)
        json_file = os.path.join(folder, "annotations", f"instances_{split}.json")
        register_coco_instances(name, {}, json_file, name)
        if cfg.DATASETS.CLASS_NAMES:
            MetadataCatalog.get(name).thing_classes = list(cfg.DATASETS.CLASS_NAMES)
