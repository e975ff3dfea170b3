"""Datasets and loaders.

Importing this registers `shapes_train`, `shapes_val`, `photos_train` and `photos_val`, unless the
names are taken.
"""

from detectron2.data import DatasetCatalog

from .coco_folder import register_coco_folder
from .image_files import read_rgb
from .loader import TrainLoader, build_test_loader, build_train_loader
from .mapper import CheckedMapper, first_sentence
from .named_folders import register_named_folders
from .photos import PHOTOS, register_photos
from .register import prepare_dataset, register_shapes, register_shapes_lazily
from .requirements import check_requirements
from .shapes import (
    CATEGORIES,
    ShapesSpec,
    SingleShapesSpec,
    draw_image,
    draw_single_shape,
    generate_shapes,
    generate_single_shapes,
    shapes_paths,
)
from .validate import check_dataset, check_datasets, check_datasets_once, use_checked_datasets

__all__ = [
    "CATEGORIES",
    "CheckedMapper",
    "PHOTOS",
    "ShapesSpec",
    "SingleShapesSpec",
    "TrainLoader",
    "build_test_loader",
    "build_train_loader",
    "check_dataset",
    "check_datasets",
    "check_datasets_once",
    "check_requirements",
    "draw_image",
    "draw_single_shape",
    "first_sentence",
    "generate_single_shapes",
    "generate_shapes",
    "prepare_dataset",
    "read_rgb",
    "register_coco_folder",
    "register_named_folders",
    "register_photos",
    "register_shapes",
    "register_shapes_lazily",
    "shapes_paths",
    "use_checked_datasets",
]

if not {"shapes_train", "shapes_val"} & set(DatasetCatalog.list()):  # or they are the user's
    register_shapes_lazily()
register_photos()
