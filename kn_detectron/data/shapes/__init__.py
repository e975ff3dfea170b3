"""The generated shapes: one dataset for detection, and one for classification."""

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
