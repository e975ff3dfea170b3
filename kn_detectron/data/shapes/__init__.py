"""The generated shapes: as a dataset to detect them in, and one to classify them in."""

from .classification import SingleShapesSpec, draw_single_shape, generate_single_shapes
from .detection import SPLITS, ShapesSpec, draw_image, generate_shapes, shapes_paths
from .drawing import CATEGORIES

__all__ = [
    "CATEGORIES",
    "SPLITS",
    "ShapesSpec",
    "SingleShapesSpec",
    "draw_image",
    "draw_single_shape",
    "generate_shapes",
    "generate_single_shapes",
    "shapes_paths",
]
