"""The belief behind an activation (ours): the mean and variance of f(x) for x ~ N(m, v).

ReLU itself is in :mod:`~kn_detectron.layers.belief`. For an activation that consists of straight
lines, the moments follow from ReLU's in closed form. For any other f they are one-dimensional
integrals::

    E f(x) = integral of f(m + s z) pdf(z) dz,   s = sqrt(v)

Gauss-Legendre quadrature computes them on the pieces between the points at which f bends.
Gauss-Hermite quadrature would need no pieces. But it converges slowly if f has a corner
(hard-swish), and not at all if f changes within a small part of the belief (at s = 30 a sigmoid is
a step). The backward pass holds the nodes fixed, because the derivative of the integral is the
integral of the derivative.
"""

import functools
import math
from typing import Any, Callable, Dict, NamedTuple, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .belief import Belief, relu
from .introspection import is_traced

__all__ = ["ACTIVATIONS", "Activation", "clip", "leaky_relu", "quadrature"]


def clip(belief: Belief, low: float, high: float) -> Belief:
    """The belief behind min(max(x, low), high): ReLU6, hardtanh.

    With U = relu(x - low), W = relu(x - high) and h = high - low the result is low + U - W. Since
    U = W + h wherever W > 0::

        mean = low + E U - E W        var = Var U - Var W - 2 E W (h - E U + E W)

    If m is nearer to the upper bound, the mirror image is computed, so that W stays small. With one
    bound only it is the ReLU, shifted or mirrored.

    In float32 the error of the variance is some 1e-7 v. So it is exact enough for standard deviations
    of up to a hundred times h, and meaningless beyond a thousand.

    Args:
        belief: in front of it, any shape.
        low, high: the bounds, low <= high. An infinite one is none.

    Returns:
        Belief: of the same shape.
    """
    if math.isinf(low) and math.isinf(high):
        return belief
    if math.isinf(high):
        mean, var = relu(Belief(belief.mean - low, belief.var))
        return Belief(low + mean, var)
    if math.isinf(low):
        mean, var = relu(Belief(high - belief.mean, belief.var))
        return Belief(high - mean, var)
    height = high - low
    mirrored = belief.mean > 0.5 * (low + high)
    from_bound = torch.where(mirrored, high - belief.mean, belief.mean - low)
    upper = relu(Belief(from_bound, belief.var))
    lower = relu(Belief(from_bound - height, belief.var))
    inside = upper.mean - lower.mean
    var = upper.var - lower.var - 2.0 * lower.mean * (height - inside)
    mean = torch.where(mirrored, high - inside, low + inside)
    # In float32 the difference cancels for a very wide belief. No variance inside is larger.
    return Belief(mean, var.clamp(0.0, 0.25 * height * height))


def leaky_relu(belief: Belief, slope: float) -> Belief:
    """The belief behind max(x, 0) + slope min(x, 0): leaky ReLU.

    With x+ = relu(x), x- = relu(-x) and the slope a the result is x+ - a x-. Since one of x+ and x-
    is always 0::

        mean = E x+ - a E x-        var = Var x+ + a^2 Var x- + 2 a E x+ E x-

    Args:
        belief: in front of it, any shape.
        slope: a number.

    Returns:
        Belief: of the same shape.
    """
    above = relu(belief)
    below = relu(Belief(-belief.mean, belief.var))
    mean = above.mean - slope * below.mean
    both = 2.0 * slope * above.mean * below.mean
    return Belief(mean, (above.var + slope * slope * below.var + both).clamp_min(0.0))


# Only 1e-15 of a Gaussian lies beyond 8 standard deviations.
_REACH = 8.0
_POINTS = 32  # per piece


_LEGENDRE = torch.from_numpy(np.stack(np.polynomial.legendre.leggauss(_POINTS)))


@functools.lru_cache(maxsize=None)
def _legendre(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The nodes and weights on a device. Copying them in every step would wait for the device."""
    with torch.inference_mode(False):
        return _LEGENDRE.to(device, dtype)


@torch.no_grad()
def _nodes(belief: Belief, std: Tensor, bends: Tuple[float, ...]) -> Tuple[Tensor, Tensor]:
    """The nodes z and their weights, times the density, along a new last dimension."""
    mean = belief.mean
    # What is recorded must not be kept.
    legendre = _LEGENDRE.to(mean) if is_traced(mean) else _legendre(mean.dtype, mean.device)
    nodes, weights = legendre
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

    A variance below 1e-12 counts as 1e-12 and gets no gradient.

    Args:
        function: takes and returns a tensor of any shape.
        belief: in front of it, any shape.
        bends: the points at which the function or a derivative of it changes quickly, ascending.

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
        parameters: the names of its parameters, which module and function share, with torch's
            defaults, in the order in which ``function`` and ``moments`` take them.
        moments: makes the belief behind the activation from a belief and the parameters.
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


# The keys are the names of the functions in torch.
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
