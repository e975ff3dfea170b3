"""Kalman Normalization for detectron2."""

from .compat import prepare_detectron2, without_notices

# Before anything of detectron2 is imported, here or by a module of this package.
prepare_detectron2()

# Registers datasets, released weights, backbones and heads.
with without_notices():
    from . import checkpoint, data, engine, layers, model_zoo, modeling  # noqa: E402
from .config import add_kn_config, check_config  # noqa: E402
from .errors import InputError  # noqa: E402
from .layers import Belief, GroupKalmanNorm2d, KalmanNorm2d  # noqa: E402
from .registration import register_norms, unregister_norms  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "Belief",
    "GroupKalmanNorm2d",
    "InputError",
    "KalmanNorm2d",
    "add_kn_config",
    "check_config",
    "checkpoint",
    "data",
    "engine",
    "layers",
    "model_zoo",
    "modeling",
    "register_norms",
    "unregister_norms",
]

register_norms()
