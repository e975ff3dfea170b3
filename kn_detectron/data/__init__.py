"""Datasets and loaders: importing this registers `shapes_train` and `shapes_val`."""

from .coco_folder import CocoFolder, register_coco_folder
from .loader import TrainLoader, build_test_loader, build_train_loader
from .mapper import CheckedMapper, first_sentence
from .register import prepare_dataset, register_shapes, register_shapes_lazily
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
from .validate import check_dataset

__all__ = [
    "CATEGORIES",
    "CheckedMapper",
    "CocoFolder",
    "ShapesSpec",
    "SingleShapesSpec",
    "TrainLoader",
    "build_test_loader",
    "build_train_loader",
    "check_dataset",
    "draw_image",
    "draw_single_shape",
    "first_sentence",
    "generate_single_shapes",
    "generate_shapes",
    "prepare_dataset",
    "register_coco_folder",
    "register_shapes",
    "register_shapes_lazily",
    "shapes_paths",
]

register_shapes_lazily()
