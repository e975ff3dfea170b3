"""Transitions: they carry the belief about the features of one layer to the next layer.

A transition has no state, so the blocks of a network share one. Between two normalised layers the
prior is ``transition.conv(transition.activation(belief, x, "relu"), conv)``. The inner call returns
a *source*, which is a belief or a feature map sampled from it. Several convolutions can read the
same source.
"""

from typing import Union, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import belief as closed_form
from .activations import ACTIVATIONS
from .belief import Belief
from .modes import without_autocast

__all__ = [
    "ClosedFormTransition",
    "MonteCarloTransition",
    "PREDICTIONS",
    "Source",
    "Transition",
    "build_transition",
    "check_transition",
]

PREDICTIONS = ("closed_form", "monte_carlo")

Source = Union[Belief, Tensor]


class ClosedFormTransition:
    """Computes the moments in closed form (:mod:`kn_detectron.layers.belief`).

    They have no noise, and the cost does not depend on the image size.
    """

    def source(self, belief: Belief, x: Tensor) -> Belief:
        """The source if there is no activation in between, as behind the image."""
        return belief

    def activation(self, belief: Belief, x: Tensor, name: str, *parameters) -> Belief:
        """The source behind the activation that made the features ``x``.

        Args:
            belief: about the features in front of it.
            name: a key of :data:`~kn_detectron.layers.activations.ACTIVATIONS`.
            parameters: of the activation, in the order that they have there.
        """
        return ACTIVATIONS[name].moments(belief, *parameters)

    def conv(self, source: Belief, conv: nn.Conv2d) -> Belief:
        """The prior behind a convolution, shape (rows, C_out)."""
        return closed_form.conv2d(source, conv.weight, conv.bias, conv.groups)

    def moments(self, source: Belief) -> Belief:
        """The belief that a source stands for, which is the source itself."""
        return source

    def __repr__(self) -> str:
        return "ClosedFormTransition()"


class MonteCarloTransition:
    """Measures the moments on a sampled feature map (Sec. 3.2): y ~ N(mean, var), ReLU, conv.

    One map is drawn per row of the belief, from torch's global generator. It costs one more
    convolution per layer. The smaller the map, the noisier the prior.

    Args:
        size: side of the sampled map in pixels; 0 for the feature map's own height and width, as
            the released code has it.
    """

    def __init__(self, size: int = 0):
        self.size = size

    def source(self, belief: Belief, x: Tensor) -> Tensor:
        """Samples a feature map from the belief: shape (rows, C, H, W)."""
        height, width = (self.size, self.size) if self.size else x.shape[-2:]
        mean, std = belief.mean, belief.var.clamp_min(torch.finfo(belief.var.dtype).tiny).sqrt()
        noise = torch.randn(*mean.shape, height, width, device=mean.device, dtype=mean.dtype)
        return mean[:, :, None, None] + std[:, :, None, None] * noise

    def activation(self, belief: Belief, x: Tensor, name: str, *parameters) -> Tensor:
        """Samples a feature map from the belief and applies an activation."""
        return ACTIVATIONS[name].function(self.source(belief, x), *parameters)

    def conv(self, source: Tensor, conv: nn.Conv2d) -> Belief:
        """Convolves the sampled map as the network does, and measures it."""
        with without_autocast(source):
            y = F.conv2d(
                source,
                conv.weight.to(source.dtype),
                None if conv.bias is None else conv.bias.to(source.dtype),
                conv.stride,
                conv.padding,
                conv.dilation,
                conv.groups,
            )
        return self.moments(y)

    def moments(self, source: Source) -> Belief:
        """Mean and biased variance per row and channel of a sampled map; a belief as it is."""
        if isinstance(source, Belief):
            return source
        var, mean = torch.var_mean(source, dim=(2, 3), unbiased=False)
        return Belief(mean, var)

    def __repr__(self) -> str:
        return f"MonteCarloTransition(size={self.size})"


Transition = Union[ClosedFormTransition, MonteCarloTransition]


def check_transition(transition: Transition) -> None:
    """Checks that a transition is one, and not for instance the name of one.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(transition, get_args(Transition)):
        raise ValueError(
            f"transition is what kn_detectron.layers.build_transition returns, not {transition!r}"
        )


def build_transition(prediction: str, size: int = 0) -> Transition:
    """The transition named ``prediction``: ``"closed_form"`` or ``"monte_carlo"``.

    Raises:
        ValueError: for any other name.
    """
    if prediction == "closed_form":
        return ClosedFormTransition()
    if prediction == "monte_carlo":
        return MonteCarloTransition(size)
    raise ValueError(f"prediction is one of {PREDICTIONS}, not {prediction!r}")
