"""RetinaNet with class and box towers that continue the chain of the FPN.

All levels of the pyramid share the convolutions of the towers, and scale and shift. Each level has
statistics and beliefs of its own.
"""

from typing import Dict, Iterator, List, Tuple, Union

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.retinanet import RetinaNet, RetinaNetHead
from torch import Tensor, nn

from ..errors import InputError
from ..layers.belief import affine
from ..layers.introspection import has_hooks
from .chain import (
    TRAIN_ALL,
    ChainConfig,
    ChainConv2d,
    as_source,
    build_norm,
    normalized,
    normalized_convolution,
    rectified,
)
from .features import Feature, Features, WithBelief, value_of

__all__ = ["KNRetinaNet", "KNRetinaNetHead", "LevelNorms"]

_TOWERS = ("cls_subnet", "bbox_subnet")


class LevelNorms(nn.ModuleList):
    """The KN or GKN layers behind a convolution that all levels of a pyramid share.

    Each level has a layer of its own, with its statistics, gain and process model. All levels share
    scale and shift. These have the same names as in detectron2's BatchNorm per level. As there,
    their weight decay is SOLVER.WEIGHT_DECAY and not SOLVER.WEIGHT_DECAY_NORM.

    Args:
        chain: the settings of the layers.
        channels: C.
        levels: the number of levels.
    """

    def __init__(self, chain: ChainConfig, channels: int, levels: int):
        super().__init__(build_norm(chain, channels, affine=False) for _ in range(levels))
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(
        self, x: Union[Tensor, Feature], level: int, conv: ChainConv2d
    ) -> Union[Tensor, Feature]:
        """Convolves the features of a level, normalises them, and scales and shifts them.

        Args:
            x: shape (N, C_in, H, W), as a feature whose belief is a source of the transition, or as
                a tensor.
            level: the number of the level; 0 is the finest.
            conv: the convolution, which has no norm of its own.

        Returns:
            Shape (N, C, H, W), in front of the activation, with the belief to pass on if x has one.
        """
        norm = self[level]
        if isinstance(x, Tensor):
            return self._scaled(norm(conv(x)))
        if has_hooks(conv):  # they see the convolution, as in evaluation
            y = normalized(*conv(x), norm, conv.chain)
        else:
            y = normalized_convolution(x, conv, norm, conv.chain)
        belief = y.belief
        # The paper variant passes on the belief about the feature in front of its normalisation.
        if conv.chain.variant == "network":
            belief = affine(belief, self.weight, self.bias)
        return Feature(self._scaled(y.value), belief)

    def _scaled(self, y: Tensor) -> Tensor:
        weight, bias = (p.to(y.dtype)[:, None, None] for p in (self.weight, self.bias))
        return torch.addcmul(bias, y, weight)


class KNRetinaNetHead(RetinaNetHead):
    """detectron2's ``RetinaNetHead`` with Kalman Normalization in its two towers.

    Use it in :class:`KNRetinaNet`, which gives it the beliefs about the levels.
    """

    @configurable
    def __init__(self, *, input_shape: List[ShapeSpec], chain: ChainConfig, **kwargs):
        """
        Args:
            input_shape: the shapes of the levels, from the finest on.
            chain: the settings of its layers, which it shares with the backbone.
            num_classes, num_anchors, conv_dims, prior_prob: as in ``RetinaNetHead``.
        """
        # nn.Identity keeps the places of the norms. detectron2 would build one for all levels.
        super().__init__(input_shape=input_shape, norm=nn.Identity, **kwargs)
        self.chain = chain
        for name in _TOWERS:
            tower = getattr(self, name)
            for i in range(0, len(tower), 3):
                tower[i] = ChainConv2d.from_conv(tower[i], chain)
                tower[i + 1] = LevelNorms(chain, tower[i].out_channels, len(input_shape))

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: List[ShapeSpec]):
        """Reads the config as ``RetinaNetHead`` does.

        MODEL.RETINANET.NORM must equal MODEL.RESNETS.NORM.

        Raises:
            InputError: the two norms differ.
        """
        options = super().from_config(cfg, input_shape)
        del options["norm"]
        return dict(options, chain=ChainConfig.from_config(cfg, "RETINANET"))

    def forward(self, features: List[Union[Tensor, Feature]]) -> Tuple[List[Tensor], List[Tensor]]:
        """
        Args:
            features: the levels, from the finest on, each of shape (N, C, H, W). All have a belief
                of shape (1, C) or (N, C), or none has.

        Returns:
            logits and box deltas, as ``RetinaNetHead`` returns them.

        Raises:
            InputError: the towers need beliefs, and there are none.
        """
        logits, deltas = [], []
        for level, feature in enumerate(features):
            x = self._as_source(feature)
            logits.append(self.cls_score(self._run(self.cls_subnet, x, level)))
            deltas.append(self.bbox_pred(self._run(self.bbox_subnet, x, level)))
        return logits, deltas

    def _as_source(self, x: Union[Tensor, Feature]) -> Union[Tensor, Feature]:
        if isinstance(x, Feature):
            return as_source(x, self.chain.transition)
        if self.training or self.chain.predicts_in_evaluation:
            raise InputError(
                "The priors of RetinaNet's towers start from the beliefs about the levels, of which "
                'there are none: set MODEL.META_ARCHITECTURE "KNRetinaNet", MODEL.BACKBONE.NAME '
                '"build_kn_retinanet_resnet_fpn_backbone", and MODEL.FPN.NORM to the norm of '
                'MODEL.RESNETS.NORM or to "", or, if only the backbone is in evaluation mode, '
                f"{TRAIN_ALL}"
            )
        return x

    def _run(self, tower: nn.Sequential, x: Union[Tensor, Feature], level: int) -> Tensor:
        layers = list(tower)
        for conv, norms in zip(layers[::3], layers[1::3]):
            x = norms(x, level, conv)
            x = F.relu_(x) if isinstance(x, Tensor) else rectified(x, self.chain.transition)
        return value_of(x)

    def adopt(self, state: Dict[str, Tensor], prefix: str) -> None:
        """Gives the towers of other RetinaNets the names of this head, in place.

        If all levels share their statistics, as in detectron2 0.4 and 0.5, each level gets a copy.
        If a tower has no norms, its convolutions get other numbers.

        Args:
            state: tensors by name.
            prefix: the prefix of this head's names.
        """
        for name in _TOWERS:
            tower = f"{prefix}{name}."
            self._renumber(state, tower)
            for i in range(1, len(getattr(self, name)), 3):
                for statistic in ("running_mean", "running_var", "num_batches_tracked"):
                    shared = state.pop(f"{tower}{i}.{statistic}", None)
                    if shared is not None:
                        for level in range(len(getattr(self, name)[i])):
                            state[f"{tower}{i}.{level}.{statistic}"] = shared.clone()

    @staticmethod
    def _renumber(state: Dict[str, Tensor], tower: str) -> None:
        """Gives convolution k the number 3 k if it has 2 k, as in a tower without norms."""
        numbers = sorted(_convolutions(state, tower))
        if numbers == list(range(0, 2 * len(numbers), 2)):
            for i in reversed(numbers):
                for part in ("weight", "bias"):
                    if f"{tower}{i}.{part}" in state:
                        state[f"{tower}{i // 2 * 3}.{part}"] = state.pop(f"{tower}{i}.{part}")

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        self.adopt(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _convolutions(state: Dict[str, Tensor], tower: str) -> Iterator[int]:
    """The numbers of the convolutions of a tower."""
    for name, tensor in state.items():
        number, _, part = name[len(tower) :].partition(".")
        if name.startswith(tower) and part == "weight" and tensor.dim() == 4:
            yield int(number)


@META_ARCH_REGISTRY.register()
class KNRetinaNet(RetinaNet):
    """detectron2's ``RetinaNet`` for a head with Kalman Normalization.

    With MODEL.RETINANET.NORM "KN" or "GKN" it has a :class:`KNRetinaNetHead`. The priors of this
    head start from the beliefs that :class:`~kn_detectron.modeling.KNFPN` hands on. With any other
    norm it has detectron2's head.
    """

    @configurable
    def __init__(self, *, head: nn.Module, head_in_features: List[str], **kwargs):
        """
        Args:
            head: a :class:`KNRetinaNetHead`, or a head that takes tensors.
            head_in_features: the names of the levels, from the finest on.
            kwargs: as in ``RetinaNet``.
        """
        if isinstance(head, KNRetinaNetHead):
            head_in_features = [WithBelief(name) for name in head_in_features]
        super().__init__(head=head, head_in_features=head_in_features, **kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode):
        """Reads the config as ``RetinaNet`` does."""
        if cfg.MODEL.RETINANET.NORM not in ("KN", "GKN"):
            return super().from_config(cfg)
        plain = cfg.clone()
        plain.defrost()
        plain.MODEL.RETINANET.NORM = ""  # for the head that is replaced
        options = super().from_config(plain)
        shapes = options["backbone"].output_shape()
        shapes = [shapes[name] for name in cfg.MODEL.RETINANET.IN_FEATURES]
        return dict(options, head=KNRetinaNetHead(cfg, shapes))

    def pass_beliefs(self, features: Features) -> None:
        """Runs the chains of the head on given features, for calibration."""
        if isinstance(self.head, KNRetinaNetHead):
            self.head([features[name] for name in self.head_in_features])
