"""The shipped configs and the released weights, by name."""

from .model_zoo import get, get_checkpoint_file, get_config, get_config_file
from .weights import released_weights

__all__ = ["get", "get_checkpoint_file", "get_config", "get_config_file", "released_weights"]
