"""How a belief crosses an activation other than ReLU.

For x ~ N(m, v) the mean and variance of f(x). ReLU itself is in :mod:`~kn_detectron.layers.belief`,
and what is made of straight pieces follows from it in closed form. The mean and variance of any
other f are one-dimensional integrals, which are computed by Gauss-Legendre quadrature::

    E f(x) = integral of f(m + s z) pdf(z) dz,   s = sqrt(v)

on the pieces between the points at which f bends. Gauss-Hermite quadrature on the whole line would
need no pieces, but it converges slowly where f has a corner (hard-swish), and not at all where it
is narrow beside the belief (a sigmoid at s = 30 is a step). The nodes are held fixed in the
backward pass: the derivative of the integral is the integral of the derivative.
"""

import math
from typing import Any, Callable, Dict, NamedTuple, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .belief import Belief, relu

__all__ = ["ACTIVATIONS", "Activation", "clip", "leaky_relu", "quadrature"]


def clip(belief: Belief, low: float, high: float) -> Belief:
    """The belief behind min(max(x, low), high): ReLU6, hardtanh.

    With U = relu(x - low) and W = relu(x - high) the result is low + U - W, and since U = W + h
    wherever W > 0 (h = high - low)::

        mean = low + E U - E W        var = Var U - Var W - 2 E W (h - E U + E W)

    The mirror image is used where m is nearer to the upper bound, so that W is the small one.

    Args:
        belief: in front of it, any shape.
        low, high: the bounds, low <= high.

    Returns:
        Belief: of the same shape.
    """
    height = high - low
    mirrored = belief.mean > 0.5 * (low + high)
    from_bound = torch.where(mirrored, high - belief.mean, belief.mean - low)
    upper = relu(Belief(from_bound, belief.var))
    lower = relu(Belief(from_bound - height, belief.var))
    inside = upper.mean - lower.mean
    var = upper.var - lower.var - 2.0 * lower.mean * (height - inside)
    mean = torch.where(mirrored, high - inside, low + inside)
    return Belief(mean, var.clamp_min(0.0))


def leaky_relu(belief: Belief, slope) -> Belief:
    """The belief behind max(x, 0) + slope min(x, 0): leaky ReLU, PReLU.

    min(x, 0) = -relu(-x), and the two parts are never both different from 0::

        mean = E x+ - a E x-        var = Var x+ + a^2 Var x- + 2 a E x+ E x-

    where x+ = relu(x), x- = relu(-x) and a is the slope.

    Args:
        belief: in front of it, any shape.
        slope: a number, or a tensor that the belief can be multiplied by.

    Returns:
        Belief: of the same shape.
    """
    above = relu(belief)
    below = relu(Belief(-belief.mean, belief.var))
    mean = above.mean - slope * below.mean
    both = 2.0 * slope * above.mean * below.mean
    return Belief(mean, (above.var + slope * slope * below.var + both).clamp_min(0.0))


# Beyond 8 deviations there is 1e-15 of a Gaussian.
_REACH = 8.0
_POINTS = 32  # per piece


_LEGENDRE = torch.from_numpy(np.stack(np.polynomial.legendre.leggauss(_POINTS)))


@torch.no_grad()
def _nodes(belief: Belief, std: Tensor, bends: Tuple[float, ...]) -> Tuple[Tensor, Tensor]:
    """Points z and weights, with the density in them, in a new last dimension."""
    mean = belief.mean
    nodes, weights = _LEGENDRE.to(mean)
    edges = [torch.full_like(mean, -_REACH)]
    edges += [((bend - mean) / std).clamp(-_REACH, _REACH) for bend in bends]
    edges = torch.stack([*edges, torch.full_like(mean, _REACH)], dim=-1)
    half = 0.5 * edges.diff(dim=-1)[..., None]
    z = (edges[..., :-1, None] + half + half * nodes).flatten(-2)
    density = torch.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)
    return z, (half * weights).flatten(-2) * density


def quadrature(
    function: Callable[[Tensor], Tensor], belief: Belief, bends: Tuple[float, ...] = (0.0,)
) -> Belief:
    """The belief behind any elementwise function that has no jumps.

    Variances below 1e-12 count as 1e-12: where nothing varies there is no slope in the variance.

    Args:
        function: takes and returns a tensor of any shape.
        belief: in front of it, any shape.
        bends: where the function or a derivative of it changes quickly, ascending.

    Returns:
        Belief: of the same shape.
    """
    std = belief.var.clamp_min(1e-12).sqrt()
    z, weights = _nodes(belief, std, bends)
    y = function(belief.mean[..., None] + std[..., None] * z)
    mean = (weights * y).sum(-1)
    return Belief(mean, (weights * (y - mean[..., None]).square()).sum(-1))


class Activation(NamedTuple):
    """An elementwise activation.

    Attributes:
        function: the activation, of a tensor and its parameters.
        module: its class in torch.nn.
        parameters: the names of its parameters, of the module and of the function, with torch's
            defaults, in the order in which ``function`` and ``moments`` take them.
        moments: of a belief and the parameters, the belief behind it.
    """

    function: Callable
    module: type
    parameters: Dict[str, Any]
    moments: Callable


def _integrated(function: Callable, module: type, bends=(0.0,), **parameters) -> Activation:
    def moments(belief: Belief, *values) -> Belief:
        return quadrature(lambda x: function(x, *values), belief, bends)

    return Activation(function, module, parameters, moments)


def _hardsigmoid(belief: Belief) -> Belief:
    clipped = clip(belief, -3.0, 3.0)
    return Belief(clipped.mean / 6.0 + 0.5, clipped.var / 36.0)


def _gelu(x: Tensor, approximate: str) -> Tensor:
    return F.gelu(x, approximate=approximate)


# By the name that the function has in torch.
ACTIVATIONS: Dict[str, Activation] = {
    "relu": Activation(F.relu, nn.ReLU, {}, relu),
    "relu6": Activation(F.relu6, nn.ReLU6, {}, lambda belief: clip(belief, 0.0, 6.0)),
    "hardtanh": Activation(F.hardtanh, nn.Hardtanh, {"min_val": -1.0, "max_val": 1.0}, clip),
    "leaky_relu": Activation(F.leaky_relu, nn.LeakyReLU, {"negative_slope": 0.01}, leaky_relu),
    "hardsigmoid": Activation(F.hardsigmoid, nn.Hardsigmoid, {}, _hardsigmoid),
    "hardswish": _integrated(F.hardswish, nn.Hardswish, bends=(-3.0, 3.0)),
    "silu": _integrated(F.silu, nn.SiLU),
    "gelu": _integrated(_gelu, nn.GELU, approximate="none"),
    "sigmoid": _integrated(torch.sigmoid, nn.Sigmoid),
    "tanh": _integrated(torch.tanh, nn.Tanh),
    "elu": _integrated(F.elu, nn.ELU, alpha=1.0),
    "celu": _integrated(F.celu, nn.CELU, alpha=1.0),
    "selu": _integrated(F.selu, nn.SELU),
    "mish": _integrated(F.mish, nn.Mish),
    "softplus": _integrated(F.softplus, nn.Softplus, beta=1.0, threshold=20.0),
    "softsign": _integrated(F.softsign, nn.Softsign),
    "logsigmoid": _integrated(F.logsigmoid, nn.LogSigmoid),
    "tanhshrink": _integrated(F.tanhshrink, nn.Tanhshrink),
}
