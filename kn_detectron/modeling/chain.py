"""The layers of a chain in detectron2's networks: norms, and convolutions with their norms.

Stem, blocks and stages take and return a :class:`~.features.Feature`, which is a feature map with
the belief about it. In evaluation with moving statistics no beliefs are kept. The same modules then
take and return tensors, as detectron2's do.
"""

import math
from dataclasses import dataclass
from typing import Any, Dict, Iterable, List, Optional, Sequence, Union

import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn

from ..config import check_config
from ..errors import InputError
from ..layers import Belief, GroupKalmanNorm2d, KalmanNorm2d, build_transition
from ..layers.belief import add, frozen
from ..layers.kalman_norm import check_takes_prior
from ..layers.transition import Transition
from .features import Feature
from .stock_names import STOCK_NAMES

__all__ = [
    "ChainConfig",
    "ChainConv2d",
    "TRAIN_ALL",
    "as_source",
    "build_norm",
    "link_convolutions",
    "normalized",
    "normalized_convolution",
    "normalized_image_std",
    "rectified",
    "residual_sum",
]


# What to do if a part of a model is in evaluation mode and keeps no beliefs for the rest.
TRAIN_ALL = (
    "call train() of the whole model, and then eval() of those norms or stages that should keep "
    "their statistics"
)


def normalized_image_std(image_std: Sequence[float], pixel_std: Sequence[float]) -> List[float]:
    """The standard deviation of the training images behind pixel normalisation, per channel."""
    return [float(image / pixel) for image, pixel in zip(image_std, pixel_std)]


@dataclass(frozen=True)
class ChainConfig:
    """The settings that all layers of a chain share.

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
    def from_config(cls, cfg: CfgNode, part: str = "RESNETS") -> "ChainConfig":
        """Reads MODEL.RESNETS.NORM and MODEL.KN.

        Args:
            cfg: the config.
            part: the node of MODEL that has the NORM of the layers, such as "FPN". The layers
                continue the chain of the backbone, and must have the same norm.

        Raises:
            InputError: a value of MODEL.KN is unknown or out of range, the norm of the backbone is
                neither "KN" nor "GKN", or the norm of the part differs from it.
        """
        check_config(cfg)
        kn = cfg.MODEL.KN
        if cfg.MODEL.RESNETS.NORM not in ("KN", "GKN"):
            names = (cfg.MODEL.BACKBONE.NAME, cfg.MODEL.ROI_HEADS.NAME)
            others = [STOCK_NAMES[name] for name in names if name in STOCK_NAMES]
            raise InputError(
                f"MODEL.RESNETS.NORM is {cfg.MODEL.RESNETS.NORM!r}, but the KN backbones and heads "
                'build "KN" and "GKN" only: set one of them, or use detectron2\'s '
                f"{' and '.join(others) or 'own'}"
            )
        if cfg.MODEL[part].NORM != cfg.MODEL.RESNETS.NORM:
            raise InputError(
                f"MODEL.{part}.NORM is {cfg.MODEL[part].NORM!r}, but its layers continue the "
                f"chain of MODEL.RESNETS.NORM {cfg.MODEL.RESNETS.NORM!r}: set both to the same "
                "norm, or use detectron2's module there, which is not part of the chain"
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

    @property
    def layer_options(self) -> Dict[str, Any]:
        """The arguments that KN and GKN layers share."""
        return dict(
            gain=self.gain,
            learn_gain=self.learn_gain,
            variant=self.variant,
            process_model=self.process_model,
            prior_gradient=self.prior_gradient,
        )


def build_norm(
    chain: ChainConfig, channels: int, head: bool = False, affine: bool = True
) -> nn.Module:
    """Builds a KN or GKN layer of a chain.

    Args:
        chain: the settings of the chain.
        channels: C.
        head: whether the layer is the head of the chain, which has no prior.
        affine: whether it scales and shifts.

    Raises:
        InputError: if the groups of GKN do not divide the channels.
    """
    options = dict(chain.layer_options, affine=affine)
    if head:
        options["gain"] = None
    if chain.norm == "KN":
        return KalmanNorm2d(channels, eval_statistics=chain.eval_statistics, **options)
    if channels % chain.num_groups:
        raise InputError(
            f"MODEL.KN.NUM_GROUPS is {chain.num_groups}, which does not divide a layer of "
            f"{channels} channels: set a divisor of all the widths of the network, such as "
            f"{math.gcd(chain.num_groups, channels)} for this one"
        )
    return GroupKalmanNorm2d(chain.num_groups, channels, **options)


class ChainConv2d(Conv2d):
    """detectron2's Conv2d, with its norm, as a link of a chain.

    A tensor goes through it as through any Conv2d. With a :class:`Feature`, the prior is predicted
    from its belief and goes to the norm, and the belief about the norm's output is handed on. A
    FrozenBatchNorm2d needs no prior, since its running statistics are the posterior. Without a
    norm, the prediction is handed on. The activation is None or a ReLU. :meth:`from_conv` makes one;
    the constructor is detectron2's, and knows no ``chain``.
    """

    chain: ChainConfig

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, chain: ChainConfig) -> "ChainConv2d":
        """Makes a link of a chain from a convolution, with its parameters.

        Norm and activation are those of detectron2's Conv2d; torch's has none.

        Raises:
            TypeError: its activation is not a ReLU.
        """
        activation = getattr(conv, "activation", None)
        if not isinstance(activation, (nn.ReLU, type(None))):
            raise TypeError(f"a link of a chain has a ReLU or no activation, not {activation}")
        link = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
            device="meta",
            norm=getattr(conv, "norm", None),
            activation=activation,
        )
        link.weight, link.bias, link.chain = conv.weight, conv.bias, chain
        return link

    def forward(self, x: Union[Tensor, Feature]) -> Union[Tensor, Feature]:
        """Convolves and normalises a feature map, with the belief about it or alone.

        Raises:
            TypeError: the norm was replaced by one that takes no prior.
            InputError: the layer is in training, but the module where its chain starts is not.
        """
        if isinstance(x, Tensor):
            if isinstance(self.norm, KalmanNorm2d) and self.norm.needs_prior:
                raise InputError(
                    "A KN layer is in training mode, but the backbone, where its chain starts, is "
                    f"in evaluation mode and keeps no beliefs: {TRAIN_ALL}"
                )
            return super().forward(x)
        y = normalized_convolution(x, self, self.norm, self.chain)
        return y if self.activation is None else rectified(y, self.chain.transition)


def normalized_convolution(
    x: Feature, conv: nn.Conv2d, norm: Optional[nn.Module], chain: ChainConfig
) -> Feature:
    """Convolves and normalises a feature, without the activation.

    At gain 0 the two are one convolution. Hooks on the convolution are not called here:
    :class:`ChainConv2d` calls this from its own forward pass, around which its hooks are.

    Args:
        x: the feature. Its belief is a source of the transition.
        conv: the convolution.
        norm: KN, GKN, FrozenBatchNorm2d or None, as for :class:`ChainConv2d`.
        chain: the settings of the chain.

    Raises:
        TypeError: the norm is of another kind.
    """
    needs_no_prior = isinstance(norm, FrozenBatchNorm2d) or getattr(norm, "is_head", False)
    prior = None if needs_no_prior else chain.transition.conv(x.belief, conv)
    if isinstance(norm, KalmanNorm2d) and norm.can_be_absorbed(x.value, prior):
        return Feature(*norm.absorbed(conv, x.value, prior))
    y = nn.Conv2d.forward(conv, x.value)
    return Feature(y, prior) if norm is None else normalized(y, prior, norm, chain)


def normalized(x: Tensor, prior: Optional[Belief], norm: nn.Module, chain: ChainConfig) -> Feature:
    """Normalises a feature map, and makes the belief about it.

    A KN layer in evaluation mode, in a network that trains, counts as frozen.

    Args:
        x: the feature map.
        prior: the predicted belief about it; None for a FrozenBatchNorm2d and for the head of a
            chain.
        norm: KN, GKN or FrozenBatchNorm2d.
        chain: the settings of the chain.

    Raises:
        TypeError: the norm is of another kind.
    """
    if isinstance(norm, FrozenBatchNorm2d):
        return Feature(norm(x), frozen(norm, chain.variant))
    check_takes_prior(norm)
    return Feature(*norm(x, prior=prior))


def link_convolutions(
    module: nn.Module, convs: Iterable[Conv2d], chain: ChainConfig
) -> List[ChainConv2d]:
    """Replaces convolutions of a module by links of a chain, in place and under the same names.

    Args:
        module: the module that has the convolutions as children.
        convs: detectron2's convolutions, with their norms.
        chain: the settings of the chain.

    Returns:
        the links, in the order of ``convs``.

    Raises:
        TypeError: an activation is not a ReLU.
    """
    links = {conv: ChainConv2d.from_conv(conv, chain) for conv in convs}
    for name, child in list(module.named_children()):
        if child in links:
            setattr(module, name, links[child])
    return list(links.values())


def as_source(x: Feature, transition: Transition) -> Feature:
    """Makes the belief about a feature a source for convolutions."""
    return Feature(x.value, transition.source(x.belief, x.value))


def rectified(x: Feature, transition: Transition) -> Feature:
    """Applies a ReLU to a feature, in place, and to its belief."""
    value = F.relu_(x.value)
    return Feature(value, transition.activation(x.belief, value, "relu"))


def residual_sum(x: Feature, shortcut: Feature, transition: Transition) -> Feature:
    """Adds the shortcut to a residual branch, in place, and their beliefs."""
    value = x.value
    value += shortcut.value
    return Feature(value, add(x.belief, transition.moments(shortcut.belief)))
