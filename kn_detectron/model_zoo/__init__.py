"""The shipped configs, by name."""

from pathlib import Path

from detectron2.config import CfgNode, get_cfg

from ..config import add_kn_config
from ..errors import InputError

__all__ = ["get_config", "get_config_file"]

_CONFIGS = Path(__file__).parent / "configs"


def get_config_file(config_path: str) -> str:
    """The path of a shipped config.

    Args:
        config_path: relative to the folder of configs, such as ``"mask_rcnn_R50_C4_KN.yaml"``.

    Raises:
        InputError: if there is none of that name; the message lists those there are.
    """
    path = _CONFIGS / config_path
    if not path.is_file():
        names = sorted(p.relative_to(_CONFIGS).as_posix() for p in _CONFIGS.rglob("*.yaml"))
        names = [name for name in names if "Base-" not in name]
        raise InputError(
            f"there is no config {config_path}: the shipped ones are {', '.join(names)}"
        )
    return str(path)


def get_config(config_path: str) -> CfgNode:
    """A shipped config, as a config that can be changed.

    Args:
        config_path: as for :func:`get_config_file`.
    """
    cfg = get_cfg()
    add_kn_config(cfg)
    cfg.merge_from_file(get_config_file(config_path))
    return cfg
