"""Datasets that a config names by the paths of their image folders, as a run with --dataset writes."""

import os

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

__all__ = ["register_named_folders"]


def register_named_folders(cfg):
    """Registers the folders among DATASETS.TRAIN and DATASETS.TEST, and what their classes are called.

    A name that is an absolute path, ``<folder>/<split>``, is that of a folder of images, whose
    annotations are ``<folder>/annotations/instances_<split>.json``; see
    :func:`~kn_detectron.data.register_coco_folder`. The files need not be there: a predictor has no
    use for them. Other names, and those that are registered, are left alone.

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
