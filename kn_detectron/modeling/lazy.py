"""Kalman Normalization for detectron2's LazyConfig (detectron2 0.5 or newer).

The module is imported on its own, since older versions of detectron2 have no LazyConfig::

    from kn_detectron.modeling.lazy import with_kalman_norm
"""

import copy
from typing import Any, Callable, Iterator, NamedTuple, Sequence, Tuple, Union

from detectron2.config import LazyCall
from detectron2.layers import FrozenBatchNorm2d, get_norm
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock, ResNet
from detectron2.modeling.meta_arch.retinanet import RetinaNet, RetinaNetHead
from detectron2.modeling.roi_heads import (
    CascadeROIHeads,
    FastRCNNConvFCHead,
    MaskRCNNConvUpsampleHead,
    Res5ROIHeads,
    StandardROIHeads,
)
from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from ..config import IMAGE_STD
from ..errors import InputError
from .chain import ChainConfig, build_norm
from .fpn import KNFPN
from .heads import KNFastRCNNConvFCHead, KNMaskRCNNConvUpsampleHead
from .resnet import KNBasicBlock, KNBasicStem, KNBottleneckBlock, KNResNet
from .retinanet import KNRetinaNet, KNRetinaNetHead
from .roi_heads import KNCascadeROIHeads, KNRes5ROIHeads, KNStandardROIHeads

__all__ = ["with_kalman_norm"]

# What only hands beliefs on, whatever norms are around it.
_CARRIERS = {
    CascadeROIHeads: KNCascadeROIHeads,
    Res5ROIHeads: KNRes5ROIHeads,
    RetinaNet: KNRetinaNet,
    StandardROIHeads: KNStandardROIHeads,
}

# What gets the norm if it has BatchNorm, and the name of that argument.
_HEADS = {
    FastRCNNConvFCHead: (KNFastRCNNConvFCHead, "conv_norm"),
    MaskRCNNConvUpsampleHead: (KNMaskRCNNConvUpsampleHead, "conv_norm"),
    RetinaNetHead: (KNRetinaNetHead, "norm"),
}

_BatchNorm = nn.modules.batchnorm._BatchNorm

_BLOCKS = {BasicBlock: KNBasicBlock, BottleneckBlock: KNBottleneckBlock}


class _Call(NamedTuple):
    path: Tuple[Union[str, int], ...]  # the keys that lead to it
    node: DictConfig
    target: Callable


def with_kalman_norm(
    model: DictConfig, *, image_std: Sequence[float] = IMAGE_STD, **settings
) -> DictConfig:
    """Puts Kalman Normalization into the lazy config of one of detectron2's detectors.

    All norms of the ResNet, and of its res5 in the ROI heads, become KN. So do those of FPN, of box
    and mask heads, and of RetinaNet's towers, where these have BatchNorm (any of detectron2's
    kinds, also frozen). A GroupNorm there stays. With ``norm="GKN"`` it is GroupNorm that becomes
    GKN there, and BatchNorm stays. The result has one node ``chain`` at the ResNet, which all parts
    refer to, so that ``backbone.bottom_up.chain.gain=0.02`` on a command line changes all layers.

    The weights are those that the model had before. Load them with
    :class:`~kn_detectron.checkpoint.KNCheckpointer`, which calibrates the priors to BatchNorm.

    Args:
        model: the config of the detector, with detectron2's ``ResNet`` in its backbone. It stays as
            it is.
        image_std: standard deviation of the pixels of the training images in 0 to 255, one per
            channel; the default is ImageNet's.
        settings: the fields of :class:`~kn_detectron.modeling.ChainConfig`, such as ``gain=0.0,
            learn_gain=False``.

    Returns:
        DictConfig: a copy of ``model``, changed.

    Raises:
        InputError: ``model`` is no detector's config with ``pixel_std``, has no ResNet or several,
            or blocks through which KN cannot predict; or ``image_std`` has a wrong length.
        TypeError, ValueError: a setting is unknown or out of range.

    Examples::

        >>> model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
        >>> model = with_kalman_norm(model, gain=0.0, learn_gain=False)
    """
    chain = ChainConfig(**settings)
    if chain.norm not in ("KN", "GKN"):
        raise ValueError(f"norm is 'KN' or 'GKN', not {chain.norm!r}")
    build_norm(chain, chain.num_groups)  # refuses settings now, and not when the model is built
    if not isinstance(model, DictConfig) or "pixel_std" not in model:
        raise InputError(
            "with_kalman_norm takes the lazy config of a detector, which has pixel_std: give the "
            "node `model` of the config."
        )
    if len(image_std) != len(model.pixel_std):
        raise InputError(
            f"image_std has {len(image_std)} values, but must have as many as pixel_std: "
            f"{len(model.pixel_std)}."
        )
    model = copy.deepcopy(model)
    calls = list(_calls(model))
    resnets = [call for call in calls if call.target is ResNet]
    if len(resnets) != 1:
        raise InputError(
            f"The lazy config has {len(resnets)} of detectron2's ResNets, but with_kalman_norm takes "
            "one: for other networks there is kn_detectron.layers.convert_kalman_norm."
        )
    for call in calls:
        # A relative reference, which holds wherever the model is in a config: as many dots as there
        # are nodes from this one up to the model.
        dots = "." * (len(call.path) + 1)
        _rewrite(
            call, chain.norm, "${" + dots + ".".join(map(str, (*resnets[0].path, "chain"))) + "}"
        )
    resnet = resnets[0].node
    resnet.image_std = [float(i / p) for i, p in zip(image_std, model.pixel_std)]
    # By name, since OmegaConf takes a dataclass for a schema of its own.
    resnet.chain = LazyCall(f"{ChainConfig.__module__}.{ChainConfig.__name__}")(**settings)
    return model


def _calls(node: Any, path: Tuple = ()) -> Iterator[_Call]:
    """The calls in a config, from the outside in."""
    if isinstance(node, DictConfig):
        keys = list(node.keys())
        if "_target_" in node:
            target = node["_target_"]
            yield _Call(path, node, locate(target) if isinstance(target, str) else target)
    elif isinstance(node, ListConfig):
        keys = list(range(len(node)))
    else:
        return
    for key in keys:
        # What is referred to is found where it is.
        if not OmegaConf.is_interpolation(node, key) and not OmegaConf.is_missing(node, key):
            yield from _calls(node[key], (*path, key))


def _rewrite(call: _Call, norm: str, chain: str) -> None:
    """Makes a call one of this package's, if it has one. ``chain`` refers to the settings."""
    node, target = call.node, call.target
    if target is ResNet:
        node["_target_"] = KNResNet  # its chain is the one that is referred to
    elif target in _CARRIERS:
        node["_target_"] = _CARRIERS[target]
    elif target is BasicStem:
        node["_target_"], node.chain = KNBasicStem, chain
        node.pop("norm", None)
    elif target in (ResNet.make_stage, ResNet.make_default_stages):
        node.block_class, node.chain = _block(call), chain
        node.pop("norm", None)
    elif target is FPN and (not node.get("norm") or _is_replaced(node.norm, norm)):
        node["_target_"], node.chain = KNFPN, chain
        node.normalize = bool(node.pop("norm", None))
    elif target in _HEADS:
        replacement, argument = _HEADS[target]
        if _is_replaced(node.get(argument), norm):
            node["_target_"], node.chain = replacement, chain
            del node[argument]


def _block(call: _Call) -> type:
    block = call.node.get("block_class")
    if block is None:  # make_default_stages goes by the depth
        block = BasicBlock if call.node.depth < 50 else BottleneckBlock
    block = locate(block) if isinstance(block, str) else block
    if block not in _BLOCKS:
        raise InputError(
            f"{'.'.join(map(str, call.path))}.block_class is {block.__name__}, but Kalman "
            f"Normalization predicts through {' and '.join(b.__name__ for b in _BLOCKS)} only: take "
            "one of these."
        )
    return _BLOCKS[block]


def _is_replaced(given: Any, norm: str) -> bool:
    """Whether a norm, as ``get_norm`` takes it, is one that KN (GKN) takes the place of."""
    kinds = (_BatchNorm, FrozenBatchNorm2d) if norm == "KN" else nn.GroupNorm
    return given == norm or isinstance(get_norm(given, 32), kinds)
