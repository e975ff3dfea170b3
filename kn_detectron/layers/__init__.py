"""The normalisation layers, and the beliefs that chain them. Knows nothing of detectron2."""

from .belief import Belief
from .convert import KalmanNetwork, convert_kalman_norm
from .kalman_norm import (
    GroupKalmanNorm2d,
    KalmanNorm2d,
    kalman_layers,
    set_gain_scale,
    set_norm_batch_size,
)
from .mixin import KN_STATE
from .transition import ClosedFormTransition, MonteCarloTransition, Transition, build_transition

__all__ = [
    "Belief",
    "ClosedFormTransition",
    "GroupKalmanNorm2d",
    "KN_STATE",
    "KalmanNetwork",
    "KalmanNorm2d",
    "MonteCarloTransition",
    "Transition",
    "build_transition",
    "convert_kalman_norm",
    "kalman_layers",
    "set_gain_scale",
    "set_norm_batch_size",
]
