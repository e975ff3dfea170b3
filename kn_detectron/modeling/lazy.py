"""Kalman Normalization for detectron2's LazyConfig (detectron2 0.5 or newer).

The module is imported on its own, since older versions of detectron2 have no LazyConfig::

    from kn_detectron.modeling.lazy import with_kalman_norm
"""

import copy
import logging
from typing import Any, Callable, Iterator, NamedTuple, Optional, Sequence, Tuple, Union

from detectron2.config import LazyCall, instantiate
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
from omegaconf import DictConfig, ListConfig, OmegaConf, flag_override
from torch import nn

from ..config import IMAGE_STD
from ..errors import InputError
from ..layers.transition import check_transition
from .chain import ChainConfig, build_norm, normalized_image_std
from .fpn import KNFPN
from .heads import KNFastRCNNConvFCHead, KNMaskRCNNConvUpsampleHead
from .resnet import KNBasicBlock, KNBasicStem, KNBottleneckBlock, KNResNet
from .retinanet import KNRetinaNet, KNRetinaNetHead
from .roi_heads import KNCascadeROIHeads, KNRes5ROIHeads, KNStandardROIHeads

__all__ = ["with_kalman_norm"]

_logger = logging.getLogger(__name__)

# What hands beliefs on, whatever norms are around it.
_CARRIERS = {
    CascadeROIHeads: KNCascadeROIHeads,
    Res5ROIHeads: KNRes5ROIHeads,
    ResNet: KNResNet,
    RetinaNet: KNRetinaNet,
    StandardROIHeads: KNStandardROIHeads,
}

_STAGES = (ResNet.make_stage, ResNet.make_default_stages)

# What gets the norm if it has BatchNorm, the name of that argument, and what it has to be a part of.
_HEADS = {
    FastRCNNConvFCHead: (KNFastRCNNConvFCHead, "conv_norm", (StandardROIHeads, CascadeROIHeads)),
    MaskRCNNConvUpsampleHead: (
        KNMaskRCNNConvUpsampleHead,
        "conv_norm",
        (StandardROIHeads, CascadeROIHeads),
    ),
    RetinaNetHead: (KNRetinaNetHead, "norm", (RetinaNet,)),
}

_BatchNorm = nn.modules.batchnorm._BatchNorm

_BLOCKS = {BasicBlock: KNBasicBlock, BottleneckBlock: KNBottleneckBlock}


class _Call(NamedTuple):
    path: Tuple[Union[str, int], ...]  # the keys that lead to it
    node: DictConfig
    target: Callable
    parent: Optional[Callable]  # what is called with the result

    def __str__(self) -> str:
        return ".".join(map(str, self.path))


def with_kalman_norm(
    model: DictConfig, *, image_std: Optional[Sequence[float]] = None, **settings
) -> DictConfig:
    """Puts Kalman Normalization into the lazy config of one of detectron2's detectors.

    All norms of the ResNet become KN, and those of res5 in ``Res5ROIHeads``. So do the norms of
    detectron2's FPN, and above such an FPN those of its box and mask heads and of RetinaNet's
    towers, where these have BatchNorm, of any of detectron2's kinds. With ``norm="GKN"`` it is
    GroupNorm that becomes GKN there. Other norms stay, and so do those of classes of your own; a
    warning names a BatchNorm that has to stay because nothing would give it a prior.

    The result has one node ``chain`` at the ResNet, which all parts refer to, so that
    ``backbone.bottom_up.chain.gain=0.02`` on a command line changes all layers.

    The weights are those that the model had before. Load them with
    :class:`~kn_detectron.checkpoint.KNCheckpointer`, which calibrates the priors to BatchNorm.

    Args:
        model: the config of the detector, with detectron2's ``ResNet`` in its backbone. It stays as
            it is. Set ``pixel_std`` and ``input_format`` in it before: the prediction starts from
            images that are normalised so.
        image_std: standard deviation of the pixels of the training images in 0 to 255, one per
            channel, in the order of the model's ``input_format``. None is ImageNet's.
        settings: the fields of :class:`~kn_detectron.modeling.ChainConfig`, such as ``gain=0.0,
            learn_gain=False``.

    Returns:
        DictConfig: a copy of ``model``, changed.

    Raises:
        InputError: ``model`` is no detector's config with ``pixel_std``, has KN already, or has no
            ResNet or several; its ResNet has parts through which KN cannot predict; or
            ``image_std`` is not as many positive numbers as ``pixel_std``.
        TypeError, ValueError: a setting is unknown or out of range.

    Examples::

        >>> model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
        >>> model = with_kalman_norm(model, gain=0.0, learn_gain=False)
    """
    norm = _checked(ChainConfig(**settings)).norm
    if not isinstance(model, DictConfig) or "pixel_std" not in model:
        raise InputError(
            "with_kalman_norm takes the lazy config of a detector, which has pixel_std: give the "
            "node `model` of the config."
        )
    if image_std is None:
        image_std = IMAGE_STD[::-1] if model.get("input_format") == "RGB" else IMAGE_STD
    if len(image_std) != len(model.pixel_std) or not all(std > 0 for std in image_std):
        raise InputError(
            f"image_std is {list(image_std)}, but must be as many positive numbers as pixel_std has: "
            f"{len(model.pixel_std)}."
        )
    model = copy.deepcopy(model)
    calls = list(_calls(model))
    resnet = _resnet_of(calls)
    # Before anything is changed, since norms may refer to each other.
    replaced = [
        (call, bool(call.node.get(_norm_argument(call))))
        for call in calls
        if _is_replaced(call, norm)
    ]
    has_pyramid = any(call.target is FPN for call, _ in replaced)
    with flag_override(model, ["struct", "readonly"], False):
        for call, has_norm in replaced:
            if call.target in _HEADS and not (
                has_pyramid and call.parent in _HEADS[call.target][2]
            ):
                _logger.warning(
                    "%s keeps its norm, since nothing would give Kalman Normalization a prior there: "
                    "it takes detectron2's FPN, without a norm or with the same kind, and detectron2's "
                    "own ROI heads or RetinaNet.",
                    call,
                )
                continue
            # A relative reference, which holds wherever the model is in a config: as many dots as
            # there are nodes from this one up to the model.
            dots = "." * (len(call.path) + 1)
            chain = "${" + dots + ".".join(map(str, (*resnet.path, "chain"))) + "}"
            _rewrite(call, has_norm, chain)
        resnet.node.image_std = normalized_image_std(image_std, model.pixel_std)
        # By name, since OmegaConf takes a dataclass for a schema of its own.
        chain = LazyCall(f"{ChainConfig.__module__}.{ChainConfig.__name__}")(**settings)
        resnet.node.chain = chain
    return model


def _checked(chain: ChainConfig) -> ChainConfig:
    """Refuses settings now, and not when the model is built."""
    if chain.norm not in ("KN", "GKN"):
        raise ValueError(f"norm is 'KN' or 'GKN', not {chain.norm!r}")
    if not isinstance(chain.num_groups, int) or chain.num_groups < 1:
        raise ValueError(f"num_groups is a positive whole number, not {chain.num_groups!r}")
    if not isinstance(chain.transition, DictConfig):  # else it is built with the model
        check_transition(chain.transition)
    build_norm(chain, chain.num_groups)
    return chain


def _calls(node: Any, path: Tuple = (), parent: Optional[Callable] = None) -> Iterator[_Call]:
    """The calls in a config, from the outside in."""
    if isinstance(node, DictConfig):
        keys = list(node.keys())
        if "_target_" in node:
            target = node["_target_"]
            target = locate(target) if isinstance(target, str) else target
            yield _Call(path, node, target, parent)
            parent = target
    elif isinstance(node, ListConfig):
        keys = list(range(len(node)))
    else:
        return
    for key in keys:
        # What is referred to is found where it is.
        if not OmegaConf.is_interpolation(node, key) and not OmegaConf.is_missing(node, key):
            yield from _calls(node[key], (*path, key), parent)


def _resnet_of(calls: Sequence[_Call]) -> _Call:
    """The one ResNet in a config, all of whose parts KN can predict through."""
    if any(call.target is KNResNet for call in calls):
        raise InputError("The lazy config has Kalman Normalization already: give it without.")
    resnets = [call for call in calls if call.target is ResNet]
    if not resnets:
        raise InputError(
            "The lazy config has no ResNet of detectron2's, which is what with_kalman_norm takes: "
            "convert another backbone with BatchNorm when it is built (docs/config.md, LazyConfig); "
            "one with LayerNorm alone, such as ViT, has nothing to convert."
        )
    if len(resnets) > 1:
        raise InputError(
            f"The lazy config has {len(resnets)} of detectron2's ResNets, but with_kalman_norm takes "
            "one: give it the model of one of them."
        )
    (resnet,) = resnets
    for call in calls:
        is_part = call.path[: len(resnet.path)] == resnet.path and call.parent is ResNet
        if is_part and call.target is not BasicStem and call.target not in _STAGES:
            raise InputError(
                f"{call} is {call.target.__qualname__}, but Kalman Normalization predicts through "
                "detectron2's BasicStem, ResNet.make_stage and ResNet.make_default_stages only: take "
                "these."
            )
    return resnet


def _norm_argument(call: _Call) -> str:
    return _HEADS[call.target][1] if call.target in _HEADS else "norm"


def _is_replaced(call: _Call, norm: str) -> bool:
    """Whether a call becomes one of this package's, as far as its norm is concerned."""
    if call.target is BasicStem:
        return call.parent is ResNet
    if call.target in _STAGES:
        return call.parent in (ResNet, Res5ROIHeads)
    given = call.node.get(_norm_argument(call))
    if call.target is FPN:
        return not given or _is_kind(given, call.node.out_channels, norm)
    if call.target in _HEADS:
        widths = call.node.get("conv_dims")
        return bool(given and widths) and _is_kind(given, widths[0], norm)
    return call.target in _CARRIERS


def _is_kind(given: Any, channels: int, norm: str) -> bool:
    """Whether a norm, as ``get_norm`` takes it, is one that KN (GKN) takes the place of."""
    kinds = (_BatchNorm, FrozenBatchNorm2d) if norm == "KN" else nn.GroupNorm
    return given == norm or isinstance(get_norm(instantiate(given), channels), kinds)


def _rewrite(call: _Call, has_norm: bool, chain: str) -> None:
    """Makes a call one of this package's. ``chain`` refers to the settings."""
    node, target = call.node, call.target
    if target in _CARRIERS:
        node["_target_"] = _CARRIERS[target]
        return
    argument = _norm_argument(call)
    if argument in node.keys():
        del node[argument]
    node.chain = chain
    if target in _STAGES:
        node.block_class = _block(call)
    elif target is FPN:
        node["_target_"], node.normalize = KNFPN, has_norm
    else:
        node["_target_"] = KNBasicStem if target is BasicStem else _HEADS[target][0]


def _block(call: _Call) -> type:
    block = call.node.get("block_class")
    if block is None:  # make_default_stages goes by the depth
        block = BasicBlock if call.node.depth < 50 else BottleneckBlock
    block = locate(block) if isinstance(block, str) else block
    if block not in _BLOCKS:
        raise InputError(
            f"{call}.block_class is {block.__name__}, but Kalman Normalization predicts through "
            f"{' and '.join(b.__name__ for b in _BLOCKS)} only: take one of these."
        )
    return _BLOCKS[block]
