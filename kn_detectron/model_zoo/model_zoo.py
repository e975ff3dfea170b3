"""Configs, weights and models by the name of a config, as detectron2's ``model_zoo`` has them."""

from pathlib import Path
from typing import Optional

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from torch import nn

from ..checkpoint import KNCheckpointer
from ..config import add_kn_config
from ..errors import InputError
from .weights import released_weights

__all__ = ["get", "get_checkpoint_file", "get_config", "get_config_file"]

_CONFIGS = Path(__file__).parent / "configs"


def _config_names():
    names = sorted(path.relative_to(_CONFIGS).as_posix() for path in _CONFIGS.rglob("*.yaml"))
    return [name for name in names if "Base-" not in name]


def get_config_file(config_path: str) -> str:
    """The path of a shipped config.

    Args:
        config_path: relative to the folder of configs, such as ``"mask_rcnn_R50_C4_KN.yaml"``.

    Raises:
        InputError: there is no config of that name; the message lists the shipped ones.
    """
    path = _CONFIGS / config_path
    if not path.is_file():
        raise InputError(
            f"there is no config {config_path}: the shipped ones are {', '.join(_config_names())}"
        )
    return str(path)


def get_checkpoint_file(config_path: str) -> str:
    """The path of the released weights that were trained with a shipped config.

    Args:
        config_path: as for :func:`get_config_file`.

    Raises:
        InputError: there is no such config, or no weights were released for it.
    """
    return PathManager.get_local_path(_released_name(config_path))


def _released_name(config_path):
    get_config_file(config_path)
    name = Path(config_path).with_suffix(".pth").name
    if name not in released_weights():
        trained = [
            n for n in _config_names() if Path(n).with_suffix(".pth").name in released_weights()
        ]
        raise InputError(
            f"no weights were released that were trained with {config_path}: there are some for "
            f"{', '.join(trained)}"
        )
    return f"kn://{name}"


def get_config(config_path: str, trained: bool = False) -> CfgNode:
    """A shipped config, as a config that can be changed.

    Args:
        config_path: as for :func:`get_config_file`.
        trained: whether MODEL.WEIGHTS is the file of weights that were trained with this config,
            instead of the weights that a training starts from.

    Raises:
        InputError: there is no such config, or no weights were released for it.
    """
    cfg = get_cfg()
    add_kn_config(cfg)
    cfg.merge_from_file(get_config_file(config_path))
    if trained:
        cfg.MODEL.WEIGHTS = _released_name(config_path)
    return cfg


def get(config_path: str, trained: bool = False, device: Optional[str] = None) -> nn.Module:
    """Builds the model of a shipped config and loads its weights.

    Args:
        config_path: as for :func:`get_config_file`.
        trained: as for :func:`get_config`; otherwise MODEL.WEIGHTS of the config is loaded.
        device: overrides MODEL.DEVICE. None takes the CPU where there is no GPU.

    Returns:
        nn.Module: a detectron2 model, in training mode.

    Raises:
        InputError: there is no such config, or its weights are missing or do not fit.
    """
    cfg = get_config(config_path, trained)
    if device is not None:
        cfg.MODEL.DEVICE = device
    elif not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    KNCheckpointer(model).load(cfg.MODEL.WEIGHTS, checkpointables=[], strict=trained)
    return model
