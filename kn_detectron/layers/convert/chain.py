"""What a converted network asks for the beliefs beside its features."""

import copy
from typing import NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn

from .. import belief as closed_form
from ..belief import Belief
from ..passes import pooled_moments
from ..transition import ClosedFormTransition, Transition

__all__ = ["Chain", "ConvArguments"]


class ConvArguments(NamedTuple):
    """A convolution that is no module: what a transition reads of one."""

    weight: Tensor
    bias: Optional[Tensor] = None
    stride: Union[int, Tuple[int, int]] = 1
    padding: Union[int, str, Tuple[int, int]] = 0
    dilation: Union[int, Tuple[int, int]] = 1
    groups: int = 1


class Chain(nn.Module):
    """Carries beliefs from norm to norm; the methods are called from the generated code.

    A belief has the shape of its feature without height and width: (1, C) or (N, C), and one more
    dimension where the code has split the channels into groups. Where no beliefs are needed, which
    is in evaluation with moving statistics, :meth:`start` returns None, and of None every method
    makes None.

    Args:
        image_mean, image_std: of the images as the network gets them, C numbers each.
        transition: how a belief crosses activations and convolutions.
        variant: of the layers, ``"network"`` or ``"paper"``.
        in_evaluation: whether the layers need priors in evaluation too.
    """

    def __init__(
        self,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        transition: Transition,
        variant: str,
        in_evaluation: bool,
    ):
        super().__init__()
        self.transition = transition
        self.variant = variant
        self.in_evaluation = in_evaluation
        # Of the data, not of the weights: out of the checkpoint.
        self.register_buffer("image_mean", torch.tensor([image_mean]).float(), persistent=False)
        image_var = torch.tensor([image_std]).float().square()
        self.register_buffer("image_var", image_var, persistent=False)

    def in_closed_form(self) -> "Chain":
        """The same, always on, without sampling: for calibration."""
        chain = copy.copy(self)
        chain.transition = ClosedFormTransition()
        chain.in_evaluation = True
        return chain

    @property
    def is_on(self) -> bool:
        """Whether beliefs are computed."""
        return self.training or self.in_evaluation

    def start(self) -> Optional[Belief]:
        """The belief about the images."""
        if not self.is_on:
            return None
        dtype = torch.promote_types(self.image_var.dtype, torch.float32)
        return Belief(self.image_mean.to(dtype), self.image_var.to(dtype))

    def frozen(self, norm: nn.Module) -> Optional[Belief]:
        """The belief behind a frozen BatchNorm: its running statistics are the posterior."""
        if not self.is_on:
            return None
        if self.variant == "paper":
            return Belief(norm.running_mean[None], norm.running_var[None])
        if norm.weight is None:
            return Belief(
                torch.zeros_like(norm.running_mean)[None], torch.ones_like(norm.running_var)[None]
            )
        return closed_form.normalized(norm.weight, norm.bias)

    def behind_head(self, belief: Optional[Belief], norm: nn.Module) -> Optional[Belief]:
        """The belief behind the head of a chain, also where it is in evaluation in a network that
        is not, and so has none."""
        return self.frozen(norm) if belief is None else belief

    def nothing(self, channels: int) -> Tensor:
        """Features of no images."""
        return self.image_var.new_zeros(0, channels, 1, 1)

    def of_batch(self, belief: Optional[Belief]) -> Optional[Belief]:
        """The belief about all images together, for a KN in a network that has GKN too."""
        if belief is None:
            return None
        return Belief(*(v[None] for v in pooled_moments(*belief, 0)))

    # Through the transition.

    def source(self, belief: Optional[Belief], x: Tensor):
        """What :meth:`conv` reads, of a belief about x that no activation made."""
        return None if belief is None else self.transition.start(belief, x)

    def activation(self, belief: Optional[Belief], x: Tensor, name: str, *parameters):
        """What :meth:`conv` reads behind the activation that made x."""
        if belief is None:
            return None
        return self.transition.activation(belief, x, name, *parameters)

    def moments(self, source) -> Optional[Belief]:
        """The belief in what :meth:`source` or :meth:`activation` returned."""
        return None if source is None else self.transition.moments(source)

    def conv(self, source, conv: nn.Module) -> Optional[Belief]:
        """Behind a convolution."""
        return None if source is None else self.transition.conv(source, conv)

    def conv2d(self, source, *arguments) -> Optional[Belief]:
        """Behind a convolution that is no module."""
        return self.conv(source, ConvArguments(*arguments))

    # The same in all variants.

    def add(self, a: Optional[Belief], b: Optional[Belief]) -> Optional[Belief]:
        """Behind a sum of two features, held to be independent."""
        return None if a is None or b is None else closed_form.add(a, b)

    def scale(self, belief: Optional[Belief], factor) -> Optional[Belief]:
        """Behind a product with a constant: a number, or a tensor of one value per channel."""
        if belief is None:
            return None
        factor = self._constant(factor)
        return Belief(belief.mean * factor, belief.var * (factor * factor))

    def shift(self, belief: Optional[Belief], offset) -> Optional[Belief]:
        """Behind a sum with a constant: a number, or a tensor of one value per channel."""
        if belief is None:
            return None
        return belief._replace(mean=belief.mean + self._constant(offset))

    @staticmethod
    def _constant(value):
        # As it is added to a feature: (C, 1, 1) or (1, C, 1, 1), or (1, ..., 1).
        if isinstance(value, Tensor) and value.dim() > 2:
            return value[..., 0, 0]
        return value

    def cat(self, beliefs: Sequence[Optional[Belief]]) -> Optional[Belief]:
        """Behind a concatenation of channels."""
        if any(belief is None for belief in beliefs):
            return None
        rows = max(belief.mean.shape[0] for belief in beliefs)
        return Belief(*(torch.cat([v.expand(rows, -1) for v in vs], 1) for vs in zip(*beliefs)))

    def pad(self, belief: Optional[Belief], channels: Sequence[int]) -> Optional[Belief]:
        """Behind channels of zeros in front of the others and behind them."""
        if belief is None:
            return None
        return Belief(*(nn.functional.pad(v, tuple(channels)) for v in belief))

    def index(self, belief: Optional[Belief], index: tuple) -> Optional[Belief]:
        """Behind a choice of channels."""
        return None if belief is None else Belief(*(v[index] for v in belief))

    def reshape(self, belief: Optional[Belief], channels: Sequence[int]) -> Optional[Belief]:
        """Behind a split of the channels into groups, or a merge."""
        if belief is None:
            return None
        return Belief(*(v.reshape(v.shape[0], *channels) for v in belief))

    def permute(self, belief: Optional[Belief], order: Sequence[int]) -> Optional[Belief]:
        """Behind a change of the order of the dimensions between batch and height."""
        return None if belief is None else Belief(*(v.permute(order) for v in belief))
