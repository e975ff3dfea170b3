"""ResNets whose features travel together with the belief about them.

The networks are detectron2's own, parameter by parameter and key by key. Only KN's parameters are
added.
"""

import functools
from typing import Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock, ResNet
from torch import Tensor

from ..errors import InputError
from ..layers.belief import max_pool2d
from ..layers.image import ImageBelief
from .chain import (
    ChainConfig,
    ChainConv2d,
    as_source,
    build_norm,
    link_convolutions,
    normalized_image_std,
    rectified,
    residual_sum,
)
from .features import Feature, Features

__all__ = [
    "KNBasicBlock",
    "KNBasicStem",
    "KNBottleneckBlock",
    "KNResNet",
    "build_kn_resnet_backbone",
    "make_kn_stage",
]


class KNBasicStem(BasicStem):
    """detectron2's stem, a 7x7 convolution and a max-pool, where the chain begins.

    With ``variant="network"`` it begins at the image: the stem has a prior. With
    ``variant="paper"`` the stem's norm is the head of the chain, as released.
    """

    def __init__(self, in_channels: int, out_channels: int, chain: ChainConfig):
        head = chain.variant == "paper"
        super().__init__(in_channels, out_channels, norm=lambda c: build_norm(chain, c, head))
        self.chain = chain
        self.conv1 = ChainConv2d.from_conv(self.conv1, chain)

    def forward(self, x: Union[Tensor, Feature]) -> Union[Tensor, Feature]:
        """The image with the belief about it, or the image alone."""
        if isinstance(x, Tensor):
            return super().forward(x)
        value, belief = rectified(self.conv1(x), self.chain.transition)
        value = F.max_pool2d(value, kernel_size=3, stride=2, padding=1)
        return Feature(value, max_pool2d(belief))


class _KNBlock(CNNBlockBase):
    """Makes a residual block of detectron2 a part of a chain."""

    chain: ChainConfig
    branch: Tuple[str, ...]  # names of the convolutions of the residual branch

    def __init__(self, in_channels: int, out_channels: int, *, chain: ChainConfig, **kwargs):
        norm = functools.partial(build_norm, chain)
        super().__init__(in_channels, out_channels, norm=norm, **kwargs)
        self.chain = chain
        convs = (getattr(self, name) for name in (*self.branch, "shortcut"))
        link_convolutions(self, [conv for conv in convs if conv is not None], chain)

    def forward(self, x: Union[Tensor, Feature]) -> Union[Tensor, Feature]:
        """A feature with the belief about it, or a feature alone."""
        if isinstance(x, Tensor):
            return super().forward(x)
        transition = self.chain.transition
        y = x
        for name in self.branch[:-1]:
            y = rectified(getattr(self, name)(y), transition)
        y = getattr(self, self.branch[-1])(y)
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return rectified(residual_sum(y, shortcut, transition), transition)


class KNBasicBlock(_KNBlock, BasicBlock):
    """The residual block of ResNet-18 and 34; see detectron2's BasicBlock."""

    branch = ("conv1", "conv2")


class KNBottleneckBlock(_KNBlock, BottleneckBlock):
    """The residual block of ResNet-50, 101, 152 and ResNeXt; see detectron2's BottleneckBlock."""

    branch = ("conv1", "conv2", "conv3")


class KNResNet(ResNet):
    """A ResNet that starts a chain at the image and hands on the beliefs about its outputs.

    Args:
        stem: a :class:`KNBasicStem`.
        stages: lists of :class:`KNBasicBlock` or :class:`KNBottleneckBlock`.
        image_std: standard deviation of the normalised images, one number per channel.
        chain: what the layers of ``stem`` and ``stages`` were built with.
        num_classes, out_features, freeze_at: as in detectron2's ResNet.
    """

    def __init__(self, stem, stages, *, image_std: Sequence[float], chain: ChainConfig, **kwargs):
        super().__init__(stem, stages, **kwargs)
        self.chain = chain
        # Pixel normalisation takes the mean away.
        self.image = ImageBelief([0.0] * len(image_std), image_std)

    def forward(self, x: Tensor) -> Features:
        """
        Args:
            x: images, normalised, shape (N, C, H, W).

        Returns:
            Features: the output features by name, as detectron2's ResNet returns them. Where
            beliefs are kept, its ``beliefs`` are about the outputs of stem and stages, shape (1, C)
            or (N, C).
        """
        if not (self.training or self.chain.predicts_in_evaluation):
            return Features(super().forward(x))
        transition = self.chain.transition
        feature = as_source(Feature(x, self.image.belief()), transition)
        outputs = Features()
        for name in ("stem", *self.stage_names):
            feature = getattr(self, name)(feature)
            if name in self._out_features:
                outputs[name] = feature.value
                outputs.beliefs[name] = transition.moments(feature.belief)
        if self.num_classes is not None and "linear" in self._out_features:
            outputs["linear"] = self.linear(torch.flatten(self.avgpool(feature.value), 1))
        return outputs

    def pass_beliefs(self) -> Features:
        """Runs the chain on no images, for calibration."""
        weight = next(self.parameters())  # of the first convolution
        return self(weight.new_zeros(0, weight.shape[1], 64, 64))


NUM_BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


def make_kn_stage(
    cfg: CfgNode,
    stage: int,
    num_blocks: int,
    chain: ChainConfig,
    first_stride: int,
    dilation: int = 1,
) -> list:
    """The blocks of res2 (``stage=0``) to res5 (``stage=3``) of the ResNet in ``cfg``."""
    resnets = cfg.MODEL.RESNETS
    out_channels = resnets.RES2_OUT_CHANNELS * 2**stage
    options = dict(
        num_blocks=num_blocks,
        in_channels=resnets.STEM_OUT_CHANNELS if stage == 0 else out_channels // 2,
        out_channels=out_channels,
        stride_per_block=[first_stride] + [1] * (num_blocks - 1),
        chain=chain,
    )
    if resnets.DEPTH in (18, 34):
        return ResNet.make_stage(KNBasicBlock, **options)
    return ResNet.make_stage(
        KNBottleneckBlock,
        bottleneck_channels=resnets.NUM_GROUPS * resnets.WIDTH_PER_GROUP * 2**stage,
        num_groups=resnets.NUM_GROUPS,
        stride_in_1x1=resnets.STRIDE_IN_1X1,
        dilation=dilation,
        **options,
    )


def _check_resnet(cfg: CfgNode) -> None:
    if cfg.MODEL.KN.NETWORK_WEIGHTS:
        raise InputError(
            f"MODEL.KN.NETWORK_WEIGHTS is {cfg.MODEL.KN.NETWORK_WEIGHTS}, but is only for "
            f"build_kn_network_backbone and its FPN: give the weights of MODEL.BACKBONE.NAME "
            f"{cfg.MODEL.BACKBONE.NAME} in MODEL.WEIGHTS"
        )
    resnets = cfg.MODEL.RESNETS
    if resnets.DEPTH not in NUM_BLOCKS:
        raise InputError(
            f"MODEL.RESNETS.DEPTH is {resnets.DEPTH}, but must be one of "
            f"{', '.join(str(d) for d in NUM_BLOCKS)}"
        )
    if any(resnets.DEFORM_ON_PER_STAGE):
        raise InputError(
            "MODEL.RESNETS.DEFORM_ON_PER_STAGE asks for deformable convolutions, but Kalman "
            "Normalization cannot predict through them, because where they read depends on the "
            "image: set it to [False, False, False, False]"
        )
    if resnets.RES5_DILATION not in (1, 2):
        raise InputError(
            f"MODEL.RESNETS.RES5_DILATION is {resnets.RES5_DILATION}, but must be 1 or 2"
        )
    if resnets.DEPTH in (18, 34):
        for key, value in (("RES2_OUT_CHANNELS", 64), ("RES5_DILATION", 1), ("NUM_GROUPS", 1)):
            if resnets[key] != value:
                raise InputError(
                    f"MODEL.RESNETS.{key} is {resnets[key]}, but must be {value} with "
                    f"MODEL.RESNETS.DEPTH {resnets.DEPTH}"
                )


@BACKBONE_REGISTRY.register()
def build_kn_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> KNResNet:
    """Creates a ResNet with Kalman Normalization from a config.

    It reads MODEL.RESNETS and MODEL.BACKBONE.FREEZE_AT as detectron2's ``build_resnet_backbone``
    does, with MODEL.RESNETS.NORM "KN" or "GKN", and MODEL.KN.

    Raises:
        InputError: the config asks for something that KN does not support, or a value is out of
            range.
    """
    chain = ChainConfig.from_config(cfg)
    _check_resnet(cfg)
    resnets = cfg.MODEL.RESNETS
    stem = KNBasicStem(input_shape.channels, resnets.STEM_OUT_CHANNELS, chain)
    stages = []
    for stage, num_blocks in enumerate(NUM_BLOCKS[resnets.DEPTH]):
        dilation = resnets.RES5_DILATION if stage == 3 else 1
        first_stride = 1 if stage == 0 or dilation == 2 else 2
        stages.append(make_kn_stage(cfg, stage, num_blocks, chain, first_stride, dilation))
    return KNResNet(
        stem,
        stages,
        image_std=normalized_image_std(cfg.MODEL.KN.IMAGE_STD, cfg.MODEL.PIXEL_STD),
        chain=chain,
        out_features=resnets.OUT_FEATURES,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )
