"""Feature pyramids that continue the chain of the backbone below them.

They are detectron2's own, parameter by parameter and key by key. Only KN's parameters are added.
"""

import functools
from typing import List

import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import Tensor, nn

from ..errors import InputError
from ..layers import Belief
from ..layers.belief import add, scale
from .chain import TRAIN_ALL, ChainConfig, as_source, build_norm, link_convolutions
from .features import Feature, Features, feature_of, value_of
from .network import build_kn_network_backbone
from .resnet import build_kn_resnet_backbone

__all__ = [
    "KNFPN",
    "build_kn_network_fpn_backbone",
    "build_kn_resnet_fpn_backbone",
    "build_kn_retinanet_resnet_fpn_backbone",
]


class KNFPN(FPN):
    """detectron2's FPN, whose convolutions get priors and whose levels have beliefs.

    The chains start from the beliefs about the features of ``bottom_up``. Lateral and output
    convolutions predict like any others. Nearest upsampling leaves a belief as it is. The two maps
    of a sum are taken to be independent, so their means and variances add. ``fuse_type="avg"``
    halves the sum.

    Args:
        chain: the settings of its layers, which it shares with ``bottom_up``.
        normalize: whether the convolutions have the norm of the chain. Without a norm a level hands
            on the prediction as its belief.
        bottom_up, in_features, out_channels, top_block, fuse_type: as in detectron2's FPN.
    """

    def __init__(self, *args, chain: ChainConfig, normalize: bool = True, **kwargs):
        norm = functools.partial(build_norm, chain) if normalize else ""
        super().__init__(*args, norm=norm, **kwargs)
        self.chain = chain
        self.lateral_convs = link_convolutions(self, self.lateral_convs, chain)
        self.output_convs = link_convolutions(self, self.output_convs, chain)

    def forward(self, x: Tensor) -> Features:
        """
        Args:
            x: images, normalised, shape (N, C, H, W).

        Returns:
            Features: the levels by name, as detectron2's FPN returns them, from the finest on.
            Where beliefs are kept, its ``beliefs`` are about the levels, shape (1, C) or (N, C). A
            P6 that is subsampled from P5 has the belief of P5. RetinaNet's P6 and P7, which are
            convolutions without norms, have the predictions.

        Raises:
            InputError: beliefs are needed, and there is none about a feature of ``bottom_up``.
        """
        if not (self.training or self.chain.predicts_in_evaluation):
            return Features(super().forward(x))
        return self.fuse(self.bottom_up(x))

    def fuse(self, bottom_up: Features) -> Features:
        """Makes the levels, with beliefs, of the features of ``bottom_up``; see :meth:`forward`."""
        transition = self.chain.transition
        levels, fused = [], None
        for name, lateral, output in zip(
            reversed(self.in_features), self.lateral_convs, self.output_convs
        ):
            feature = feature_of(bottom_up, name)
            if isinstance(feature, Tensor):
                raise InputError(
                    f"The chain of the backbone ends before {name}, so the FPN has no belief to "
                    'start from: set MODEL.FPN.NORM to one without priors, such as "GN", or take '
                    f"another feature, or, if only bottom_up is in evaluation mode, {TRAIN_ALL}"
                )
            below = lateral(as_source(feature, transition))
            fused = below if fused is None else self._fuse(below, fused)
            levels.insert(0, output(as_source(fused, transition)))
        outputs = Features()
        for name, level in zip(self._out_features, levels):
            outputs[name], outputs.beliefs[name] = level
        if self.top_block is not None:
            self._add_top_levels(outputs, bottom_up)
        return outputs

    def _fuse(self, lateral: Feature, above: Feature) -> Feature:
        upsampled = F.interpolate(above.value, scale_factor=2.0, mode="nearest")
        # Not in place: a hook may have kept the lateral feature.
        value = lateral.value + upsampled
        belief = add(lateral.belief, above.belief)
        if self._fuse_type == "sum":
            return Feature(value, belief)
        return Feature(value / 2, scale(belief, 0.5))

    def _add_top_levels(self, outputs: Features, bottom_up: Features) -> None:
        name = self.top_block.in_feature
        below = feature_of(bottom_up if name in bottom_up else outputs, name)
        names, values = self._out_features[len(outputs) :], self.top_block(value_of(below))
        outputs.update(zip(names, values))
        if isinstance(below, Feature):
            outputs.beliefs.update(zip(names, self._top_beliefs(below, values)))

    def _top_beliefs(self, below: Feature, values: List[Tensor]) -> List[Belief]:
        """The beliefs about the levels of the top block, if it is one of detectron2's."""
        if isinstance(self.top_block, LastLevelMaxPool):
            return [below.belief]
        if not isinstance(self.top_block, LastLevelP6P7):
            return []
        transition = self.chain.transition
        p6 = transition.conv(transition.source(below.belief, below.value), self.top_block.p6)
        p7 = transition.conv(transition.activation(p6, values[0], "relu"), self.top_block.p7)
        return [p6, p7]


def _build(cfg: CfgNode, bottom_up: Backbone, top_block: nn.Module) -> FPN:
    options = dict(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
    norm = cfg.MODEL.FPN.NORM
    if norm == "" and cfg.MODEL.RESNETS.NORM in ("KN", "GKN"):
        return KNFPN(chain=ChainConfig.from_config(cfg), normalize=False, **options)
    if norm in ("KN", "GKN"):
        return KNFPN(chain=ChainConfig.from_config(cfg, "FPN"), **options)
    return FPN(norm=norm, **options)


@BACKBONE_REGISTRY.register()
def build_kn_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """An FPN on top of :func:`build_kn_resnet_backbone`, with P6 subsampled from P5.

    With MODEL.FPN.NORM "KN" or "GKN", which must equal MODEL.RESNETS.NORM, and with "" it is a
    :class:`KNFPN`, which hands beliefs on to the heads. With any other norm it is detectron2's FPN.

    Raises:
        InputError: as for the backbone, or the two norms differ.
    """
    return _build(cfg, build_kn_resnet_backbone(cfg, input_shape), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_kn_retinanet_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """As :func:`build_kn_resnet_fpn_backbone`, with P6 and P7 of RetinaNet, convolved from res5."""
    bottom_up = build_kn_resnet_backbone(cfg, input_shape)
    in_channels = bottom_up.output_shape()["res5"].channels
    return _build(cfg, bottom_up, LastLevelP6P7(in_channels, cfg.MODEL.FPN.OUT_CHANNELS))


@BACKBONE_REGISTRY.register()
def build_kn_network_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """As :func:`build_kn_resnet_fpn_backbone`, on :func:`build_kn_network_backbone`.

    On a network with BatchNorm it is detectron2's FPN.
    """
    return _build(cfg, build_kn_network_backbone(cfg, input_shape), LastLevelMaxPool())
