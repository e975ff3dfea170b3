"""ResNets whose features travel together with the belief about them.

The networks are detectron2's own, parameter by parameter and key by key; only KN's parameters are
added. In training, stem, blocks and stages take and return ``(feature, belief)``, where the belief
is about the feature *in front of* the ReLU that ends the block: what comes next rectifies it. In
evaluation with moving statistics no belief is needed, and the features travel alone through
detectron2's own forward functions.
"""

from dataclasses import dataclass
from typing import Dict, NamedTuple, Tuple, Union

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, Conv2d, FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock, ResNet
from torch import Tensor, nn

from ..config import check_config
from ..errors import InputError
from ..layers import Belief, GroupKalmanNorm2d, KalmanNorm2d, build_transition
from ..layers.belief import add, max_pool2d, normalized
from ..layers.transition import Transition

__all__ = [
    "ChainConfig",
    "Feature",
    "KNBasicBlock",
    "KNBasicStem",
    "KNBottleneckBlock",
    "KNResNet",
    "build_kn_resnet_backbone",
    "build_kn_resnet_fpn_backbone",
    "make_kn_stage",
]


class Feature(NamedTuple):
    """A feature map and the belief about it, in front of its last ReLU.

    Attributes:
        value: shape (N, C, H, W), rectified.
        belief: shape (1, C) or (N, C), not rectified.
    """

    value: Tensor
    belief: Belief


@dataclass(frozen=True)
class ChainConfig:
    """What all layers of a chain have in common.

    Attributes:
        norm: "KN" or "GKN".
        variant, gain, learn_gain, process_model, prior_gradient, eval_statistics: see
            :class:`~kn_detectron.layers.KalmanNorm2d`.
        num_groups: groups of GKN.
        transition: how beliefs go from layer to layer.
    """

    norm: str = "KN"
    variant: str = "network"
    gain: float = 0.1
    learn_gain: bool = True
    process_model: bool = True
    prior_gradient: bool = True
    eval_statistics: str = "moving"
    num_groups: int = 32
    transition: Transition = build_transition("closed_form")

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "ChainConfig":
        """Reads MODEL.RESNETS.NORM and MODEL.KN.

        Raises:
            InputError: if a value of MODEL.KN is unknown or out of range, or the norm is neither.
        """
        check_config(cfg)
        kn = cfg.MODEL.KN
        if cfg.MODEL.RESNETS.NORM not in ("KN", "GKN"):
            raise InputError(
                f"MODEL.RESNETS.NORM is {cfg.MODEL.RESNETS.NORM!r}, but the KN backbones and heads "
                'build "KN" and "GKN" only: set one of them, or use detectron2\'s '
                "build_resnet_backbone and Res5ROIHeads"
            )
        return cls(
            norm=cfg.MODEL.RESNETS.NORM,
            variant=kn.VARIANT,
            gain=float(kn.GAIN),
            learn_gain=kn.LEARN_GAIN,
            process_model=kn.PROCESS_MODEL,
            prior_gradient=kn.PRIOR_GRADIENT,
            eval_statistics=kn.EVAL_STATISTICS,
            num_groups=kn.NUM_GROUPS,
            transition=build_transition(kn.PREDICTION, kn.MONTE_CARLO_SIZE),
        )

    @property
    def predicts_in_evaluation(self) -> bool:
        """Whether the layers need priors in evaluation too."""
        return self.norm == "GKN" or self.eval_statistics == "batch"

    def build_norm(self, channels: int, head: bool = False) -> nn.Module:
        """A KN or GKN layer; ``head`` makes it one without prior."""
        options = dict(
            gain=None if head else self.gain,
            learn_gain=self.learn_gain,
            variant=self.variant,
            process_model=self.process_model,
            prior_gradient=self.prior_gradient,
        )
        if self.norm == "KN":
            return KalmanNorm2d(channels, eval_statistics=self.eval_statistics, **options)
        if channels % self.num_groups:
            raise InputError(
                f"MODEL.KN.NUM_GROUPS is {self.num_groups}, which does not divide a layer of "
                f"{channels} channels: set a divisor of all the widths of the network"
            )
        return GroupKalmanNorm2d(self.num_groups, channels, **options)

    def frozen_belief(self, norm: FrozenBatchNorm2d) -> Belief:
        """The belief behind a frozen BatchNorm: its running statistics are the posterior."""
        if self.variant == "network":
            return normalized(norm.weight, norm.bias)
        return Belief(norm.running_mean[None], norm.running_var[None])

    def apply(self, conv: Conv2d, x: Tensor, source) -> Tuple[Tensor, Belief]:
        """A convolution and its norm, on a feature and on the belief about it.

        Args:
            conv: detectron2's Conv2d, with a norm and no activation.
            x: its input.
            source: the belief about ``x``, from ``transition.start`` or ``transition.relu``.

        Returns:
            The normalised feature and the belief to pass on.

        Raises:
            TypeError: if something put a norm there that takes no prior.
        """
        norm = conv.norm
        if isinstance(norm, FrozenBatchNorm2d):
            return conv(x), self.frozen_belief(norm)
        if not isinstance(norm, (KalmanNorm2d, GroupKalmanNorm2d)):
            raise TypeError(
                f"a {type(norm).__name__} stands in a chain of Kalman Normalization, where only "
                "KN, GKN and FrozenBatchNorm2d layers can: nn.SyncBatchNorm.convert_sync_batchnorm "
                "must not be applied to a KN model (its priors are the same on every GPU anyway)"
            )
        x = F.conv2d(
            x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
        )
        prior = self.transition.conv(source, conv) if norm.needs_prior else None
        return norm(x, prior=prior, return_belief=True)


BlockInput = Union[Tensor, Feature]


class KNBasicStem(BasicStem):
    """detectron2's stem, a 7x7 convolution and a max-pool, where the chain begins.

    With ``variant="network"`` it begins at the image: the stem has a prior. With
    ``variant="paper"`` the stem's norm is the head of the chain, as released.
    """

    def __init__(self, in_channels: int, out_channels: int, chain: ChainConfig):
        head = chain.variant == "paper"
        super().__init__(in_channels, out_channels, norm=lambda c: chain.build_norm(c, head))
        self.chain = chain

    def forward(self, x: BlockInput) -> BlockInput:
        """The image with the belief about it, or the image alone."""
        if isinstance(x, Tensor):
            return super().forward(x)
        x, belief = x
        x, belief = self.chain.apply(self.conv1, x, self.chain.transition.start(belief, x))
        x = F.max_pool2d(F.relu_(x), kernel_size=3, stride=2, padding=1)
        return Feature(x, max_pool2d(belief))


class _KNBlock(CNNBlockBase):
    """The forward function of residual blocks with beliefs, on top of a detectron2 block."""

    chain: ChainConfig
    branch: Tuple[str, ...]  # names of the convolutions of the residual branch

    def forward(self, x: BlockInput) -> BlockInput:
        """A feature with the belief about it, or a feature alone."""
        if isinstance(x, Tensor):
            return super().forward(x)
        transition = self.chain.transition
        x, belief = x
        source = transition.relu(belief, x)
        if self.shortcut is not None:
            shortcut, shortcut_belief = self.chain.apply(self.shortcut, x, source)
        else:
            shortcut, shortcut_belief = x, transition.moments(source)
        for name in self.branch[:-1]:
            x, belief = self.chain.apply(getattr(self, name), x, source)
            x = F.relu_(x)
            source = transition.relu(belief, x)
        x, belief = self.chain.apply(getattr(self, self.branch[-1]), x, source)
        x += shortcut
        return Feature(F.relu_(x), add(belief, shortcut_belief))


class KNBasicBlock(_KNBlock, BasicBlock):
    """The residual block of ResNet-18 and 34; see detectron2's BasicBlock."""

    branch = ("conv1", "conv2")

    def __init__(self, in_channels: int, out_channels: int, *, chain: ChainConfig, **kwargs):
        BasicBlock.__init__(self, in_channels, out_channels, norm=chain.build_norm, **kwargs)
        self.chain = chain


class KNBottleneckBlock(_KNBlock, BottleneckBlock):
    """The residual block of ResNet-50, 101, 152 and ResNeXt; see detectron2's BottleneckBlock."""

    branch = ("conv1", "conv2", "conv3")

    def __init__(self, in_channels: int, out_channels: int, *, chain: ChainConfig, **kwargs):
        BottleneckBlock.__init__(self, in_channels, out_channels, norm=chain.build_norm, **kwargs)
        self.chain = chain


def belief_keys(name: str) -> Tuple[str, str]:
    """The keys under which the belief about feature ``name`` stands beside it in a feature dict."""
    return f"{name}.belief_mean", f"{name}.belief_var"


class KNResNet(ResNet):
    """A ResNet that starts a chain at the image and hands on the beliefs about its outputs.

    Args:
        stem: a :class:`KNBasicStem`.
        stages: lists of :class:`KNBasicBlock` or :class:`KNBottleneckBlock`.
        image_var: variance of the normalised image per channel, shape (C,).
        chain: what the layers of ``stem`` and ``stages`` were built with.
        num_classes, out_features, freeze_at: as in detectron2's ResNet.
    """

    def __init__(self, stem, stages, *, image_var: Tensor, chain: ChainConfig, **kwargs):
        super().__init__(stem, stages, **kwargs)
        self.chain = chain
        # Part of the config, not of the weights: out of the checkpoint.
        self.register_buffer("image_var", image_var.float(), persistent=False)

    def forward(self, x: Tensor) -> Dict[str, Tensor]:
        """
        Args:
            x: images, normalised, shape (N, C, H, W).

        Returns:
            dict: the output features by name, as detectron2's ResNet returns them. Where beliefs
            are computed, also those about the outputs of stem and stages, in front of their last
            ReLU, shape (1, C) or (N, C), under the names of :func:`belief_keys`.
        """
        if not (self.training or self.chain.predicts_in_evaluation):
            return super().forward(x)
        image_var = self.image_var[None]
        outputs = {}
        x = Feature(x, Belief(torch.zeros_like(image_var), image_var))
        for name in ("stem", *self.stage_names):
            x = getattr(self, name)(x)
            if name in self._out_features:
                outputs[name] = x.value
                outputs.update(zip(belief_keys(name), x.belief))
        if self.num_classes is not None:
            outputs["linear"] = self.linear(torch.flatten(self.avgpool(x.value), 1))
        return outputs


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
    resnets = cfg.MODEL.RESNETS
    if resnets.DEPTH not in NUM_BLOCKS:
        raise InputError(
            f"MODEL.RESNETS.DEPTH is {resnets.DEPTH}, but must be one of "
            f"{', '.join(str(d) for d in NUM_BLOCKS)}"
        )
    if any(resnets.DEFORM_ON_PER_STAGE):
        raise InputError(
            "MODEL.RESNETS.DEFORM_ON_PER_STAGE asks for deformable convolutions, through which "
            "Kalman Normalization cannot predict (where they read depends on the image): set it to "
            "[False, False, False, False]"
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
        InputError: for what KN does not do, and for values out of range.
    """
    _check_resnet(cfg)
    chain = ChainConfig.from_config(cfg)
    resnets = cfg.MODEL.RESNETS
    stem = KNBasicStem(input_shape.channels, resnets.STEM_OUT_CHANNELS, chain)
    stages = []
    for stage, num_blocks in enumerate(NUM_BLOCKS[resnets.DEPTH]):
        dilation = resnets.RES5_DILATION if stage == 3 else 1
        first_stride = 1 if stage == 0 or dilation == 2 else 2
        stages.append(make_kn_stage(cfg, stage, num_blocks, chain, first_stride, dilation))
    image_std = torch.tensor(cfg.MODEL.KN.IMAGE_STD) / torch.tensor(cfg.MODEL.PIXEL_STD)
    return KNResNet(
        stem,
        stages,
        image_var=image_std.square(),
        chain=chain,
        out_features=resnets.OUT_FEATURES,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )


@BACKBONE_REGISTRY.register()
def build_kn_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """detectron2's FPN on top of :func:`build_kn_resnet_backbone`.

    The convolutions of the FPN itself have the norm MODEL.FPN.NORM, without priors.
    """
    return FPN(
        bottom_up=build_kn_resnet_backbone(cfg, input_shape),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
