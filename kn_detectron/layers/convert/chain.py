"""The module that computes the beliefs in a converted network."""

import copy
from typing import NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn

from ...errors import InputError
from .. import belief as closed_form
from ..belief import Belief
from ..image import ImageBelief
from ..introspection import forward_of, has_hooks
from ..kalman_norm import KalmanNorm2d
from ..passes import pooled_moments
from ..transition import ClosedFormTransition, Source, Transition, check_transition

__all__ = ["Chain", "ConvArguments"]


class ConvArguments(NamedTuple):
    """The arguments of a functional convolution, named as the attributes of a module."""

    weight: Tensor
    bias: Optional[Tensor] = None
    stride: Union[int, Tuple[int, int]] = 1
    padding: Union[int, str, Tuple[int, int]] = 0
    dilation: Union[int, Tuple[int, int]] = 1
    groups: int = 1


class Chain(nn.Module):
    """Carries beliefs from norm to norm. The generated code calls its methods.

    A belief has the shape of its feature without height and width: (1, C) or (N, C), with one more
    dimension if the code has split the channels into groups.

    Args:
        image_mean, image_std: mean and standard deviation of the images that the network gets, C
            numbers each.
        transition: how a belief crosses activations and convolutions.
        variant: the variant of the layers, ``"network"`` or ``"paper"``.
        in_evaluation: whether the layers need priors in evaluation too. It may be changed later.

    Raises:
        InputError: mean and standard deviation are about different numbers of channels, or a
            standard deviation is not positive.
        ValueError: ``transition`` is none, such as the name of one.
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
        if len(image_mean) != len(image_std):
            raise InputError(
                f"image_mean has {len(image_mean)} numbers and image_std has {len(image_std)}: give "
                "one number for each channel of the images."
            )
        check_transition(transition)
        self.transition = transition
        self.variant = variant
        self.in_evaluation = in_evaluation
        if not all(number > 0 for number in image_std):
            raise InputError(
                f"image_std is {list(image_std)}: give positive numbers, one for each channel of the "
                "images."
            )
        self.image = ImageBelief(image_mean, image_std)

    def in_closed_form(self) -> "Chain":
        """A copy that does not sample, for calibration."""
        chain = copy.copy(self)
        chain.transition = ClosedFormTransition()
        return chain

    def start(self) -> Belief:
        """The belief about the images."""
        return self.image.belief()

    def frozen(self, norm: nn.Module) -> Belief:
        """The belief behind a frozen BatchNorm: its running statistics are the posterior."""
        return closed_form.frozen(norm, self.variant)

    def nothing(self, channels: int) -> Tensor:
        """The features of an empty batch."""
        return self.image.var.new_zeros(0, channels, 1, 1)

    def of_batch(self, belief: Belief) -> Belief:
        """The belief about all images together, for a KN in a network that has GKN too."""
        return Belief(*(v[None] for v in pooled_moments(*belief, 0)))

    def conv_norm(
        self, x: Tensor, conv: nn.Module, norm: nn.Module, source: Source, grouped: bool
    ) -> Tuple[Tensor, Belief]:
        """A convolution and its norm, which are one convolution if nothing is measured.

        Args:
            x: the convolution's input, shape (N, C_in, H, W).
            conv, norm: the modules.
            source: the transition's source for the belief about x.
            grouped: whether the prior is that of all images together (:meth:`of_batch`).
        """
        is_plain = forward_of(conv) is nn.Conv2d.forward and not has_hooks(conv)
        # A hook may make the filter that the prediction needs, as torch's pruning does.
        y = None if is_plain else conv(x)
        prior = self.conv(source, conv)
        if grouped:
            prior = self.of_batch(prior)
        if is_plain and isinstance(norm, KalmanNorm2d) and norm.can_be_absorbed(x, prior):
            return norm.absorbed(conv, x, prior)
        return norm(conv(x) if is_plain else y, prior=prior)

    # Through the transition.

    def source(self, belief: Belief, x: Tensor) -> Source:
        """The transition's source for the belief about x, if no activation made x."""
        return self.transition.source(belief, x)

    def activation(self, belief: Belief, x: Tensor, name: str, *parameters) -> Source:
        """The transition's source behind the activation that made x."""
        return self.transition.activation(belief, x, name, *parameters)

    def moments(self, source: Source) -> Belief:
        """The belief that a source stands for."""
        return self.transition.moments(source)

    def conv(self, source: Source, conv: nn.Module) -> Belief:
        """The belief behind a convolution, given as a module."""
        return self.transition.conv(source, conv)

    def conv2d(self, source: Source, *arguments) -> Belief:
        """The belief behind a convolution, given by its arguments."""
        return self.conv(source, ConvArguments(*arguments))

    # The same for every transition.

    def add(self, a: Belief, b: Belief) -> Belief:
        """The belief behind a sum of two features, which are taken to be independent."""
        return closed_form.add(a, b)

    def product(self, a: Belief, b: Belief) -> Belief:
        """The belief behind a product of two features, which are taken to be independent."""
        return closed_form.product(a, b)

    def scale(self, belief: Belief, factor) -> Belief:
        """The belief behind a product with a number, or with a tensor of one value per channel."""
        return closed_form.scale(belief, self._constant(factor))

    def shift(self, belief: Belief, offset) -> Belief:
        """The belief behind a sum with a number, or with a tensor of one value per channel."""
        return belief._replace(mean=belief.mean + self._constant(offset))

    def divide(self, belief: Belief, divisor) -> Belief:
        """The belief behind a division by what :meth:`scale` multiplies by."""
        return self.scale(belief, 1.0 / divisor)

    def subtract(self, belief: Belief, offset) -> Belief:
        """The belief behind a subtraction of what :meth:`shift` adds."""
        return self.shift(belief, -offset)

    @staticmethod
    def _constant(value):
        # Its shape fits a feature: (C, 1, 1), (1, C, 1, 1) or (1, ..., 1).
        if isinstance(value, Tensor) and value.dim() > 2:
            return value[..., 0, 0]
        return value

    def cat(self, beliefs: Sequence[Belief]) -> Belief:
        """The belief behind a concatenation of channels."""
        rows = max(belief.mean.shape[0] for belief in beliefs)
        return Belief(*(torch.cat([v.expand(rows, -1) for v in vs], 1) for vs in zip(*beliefs)))

    def pad(self, belief: Belief, channels: Sequence[int]) -> Belief:
        """The belief behind a padding with channels of zeros before and after the others."""
        return Belief(*(nn.functional.pad(v, tuple(channels)) for v in belief))

    def index(self, belief: Belief, index: tuple) -> Belief:
        """The belief behind a selection of channels."""
        return Belief(*(v[index] for v in belief))

    def reshape(self, belief: Belief, channels: Sequence[int]) -> Belief:
        """The belief behind a split of the channels into groups, or behind a merge."""
        return Belief(*(v.reshape(v.shape[0], *channels) for v in belief))

    def permute(self, belief: Belief, order: Sequence[int]) -> Belief:
        """The belief behind a new order of the dimensions between batch and height."""
        return Belief(*(v.permute(order) for v in belief))
