"""KN and GKN, and GroupNorm of any number of groups, as norm types of detectron2's ``get_norm``."""

import logging
import math
import re
import sys
from typing import Callable

import detectron2.layers
from torch import nn

from .errors import InputError
from .layers import GroupKalmanNorm2d, KalmanNorm2d

__all__ = ["register_norms", "unregister_norms"]

logger = logging.getLogger(__name__)

_original_get_norm = detectron2.layers.get_norm


_NUMBERED_GN = re.compile(r"GN(\d+)")


def _group_norm(groups: int, channels: int) -> nn.GroupNorm:
    if groups == 0 or channels % groups:
        raise InputError(
            f"the norm GN{groups} cannot divide {channels} channels into {groups} groups: name a "
            "number of groups that divides all widths of the network"
        )
    return nn.GroupNorm(groups, channels)


_GROUPS = 32  # detectron2's number for GN


def _group_head(channels: int) -> nn.Module:
    if channels % _GROUPS:
        raise InputError(
            f"GKN without a prior is GroupNorm of {_GROUPS} groups, which do not divide a layer of "
            f'{channels} channels: take "GN<n>" there, such as "GN{math.gcd(_GROUPS, channels)}"'
        )
    return GroupKalmanNorm2d(_GROUPS, channels, gain=None)


_NORMS = {"KN": lambda channels: KalmanNorm2d(channels, gain=None), "GKN": _group_head}

# What each is where nothing passes it a prior.
WITHOUT_PRIORS = {"KN": "BatchNorm", "GKN": "GroupNorm"}
_told = set()


def get_norm(norm, out_channels):
    """detectron2's ``get_norm`` with the names ``"KN"``, ``"GKN"`` and ``"GN<n>"``, as in "GN8".

    ``"GN<n>"`` is GroupNorm with n groups. detectron2's "GN" has 32, which do not divide the widths
    of slim networks.

    The module that uses such a layer knows nothing of beliefs and passes it no prior. So the layer
    is the head of its own chain, which is plain BatchNorm (GroupNorm for GKN). The log says so once
    for each module of detectron2 that asks for one. The backbones and heads of
    :mod:`kn_detectron.modeling` build layers with a prior.

    Args:
        norm (str or callable): as for detectron2's ``get_norm``, or "KN", "GKN" or "GN<n>".
        out_channels (int): the number of channels.

    Returns:
        nn.Module or None: the normalisation layer.

    Raises:
        InputError: there is no such norm, or the groups of "GN<n>", or the 32 of "GKN", do not
            divide the channels.
    """
    groups = _NUMBERED_GN.fullmatch(norm) if isinstance(norm, str) else None
    if groups:
        return _group_norm(int(groups[1]), out_channels)
    if norm not in ("KN", "GKN"):
        try:
            return _original_get_norm(norm, out_channels)
        except KeyError as error:
            if norm != (error.args or [None])[0]:
                raise
            raise InputError(
                f"the norm {norm!r} is unknown: take one of detectron2's, such as BN, SyncBN, "
                "FrozenBN or GN, or KN, GKN or GN<n>, or none by an empty name"
            ) from error
    asking = sys._getframe(1).f_globals["__name__"]
    if (norm, asking) not in _told:
        _told.add((norm, asking))
        logger.warning(
            f"{asking} builds layers with norm={norm!r} where nothing passes them a prior: each is "
            f"the head of its own chain, that is {WITHOUT_PRIORS[norm]}. The backbones, FPNs and "
            "heads whose names have KN in them build chains: see MODEL.META_ARCHITECTURE, "
            "MODEL.BACKBONE.NAME, MODEL.ROI_HEADS.NAME, MODEL.ROI_BOX_HEAD.NAME and "
            "MODEL.ROI_MASK_HEAD.NAME."
        )
    return _NORMS[norm](out_channels)


def _rebind(old: Callable, new: Callable) -> None:
    # A dozen modules of detectron2, and any plugin, hold their own binding of the function.
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get("get_norm") is old and module.__name__ != __name__:
            module.get_norm = new


def register_norms() -> None:
    """Makes "KN", "GKN" and "GN<n>" known to ``get_norm``, also where it was imported before.

    It may be called any number of times.
    """
    _rebind(_original_get_norm, get_norm)


def unregister_norms() -> None:
    """Undoes :func:`register_norms`."""
    _rebind(get_norm, _original_get_norm)
