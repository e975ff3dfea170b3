"""Writing and reading checkpoints, and fitting a chain to BatchNorm's."""

from .calibration import calibrate
from .checkpointer import KNCheckpointer

__all__ = ["KNCheckpointer", "calibrate"]
