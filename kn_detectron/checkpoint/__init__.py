"""Reading weights of any source, fitting a chain to BatchNorm's, and writing checkpoints."""

from .calibration import calibrate, fit_process_noise
from .checkpointer import KNCheckpointer
from .conventions import Conventions
from .conversion import convert_weights
from .folding import fold, fold_into, fold_network, fold_weights
from .sources import Weights, read_weights

__all__ = [
    "Conventions",
    "KNCheckpointer",
    "Weights",
    "calibrate",
    "convert_weights",
    "fit_process_noise",
    "fold",
    "fold_into",
    "fold_network",
    "fold_weights",
    "read_weights",
]
