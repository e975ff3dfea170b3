"""A norm that measures nothing, absorbed by the convolution in front of it (ours).

At gain 0 the posterior is known before the convolution. The two are then one convolution, whose
filters are scaled. It makes no pass over the features for the norm, and keeps none for the backward
pass. What remains is the arithmetic on vectors, and a scaled copy of the filters.
"""

from typing import Optional, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .belief import Belief
from .filter import Running, Spec, Vectors, filter_belief, track
from .filter_gradient import Filter, scale_of
from .introspection import is_traced
from .triton import fastest

__all__ = ["absorb"]

# The number of values in a set is not read where nothing is measured.
_COUNT = 1


def absorb(
    weight: Tensor,
    bias: Optional[Tensor],
    v: Vectors,
    spec: Spec,
    running: Optional[Running] = None,
) -> Tuple[Tensor, Tensor, Belief]:
    """The parameters of a convolution that normalises its output with the posterior (ours).

    With the posterior (mu, Sigma), scale = gamma / sqrt(Sigma + eps), and W and c of the
    convolution::

        W' = scale W        c' = beta + scale (c - mu)

    Args:
        weight: W, shape (C, C_in / groups, kH, kW).
        bias: c, shape (C,), or None.
        v: the vectors of a layer with a prior of one row, in the dtype of the statistics.
        spec: the settings of its filter, which measures nothing.
        running: the moving statistics to be updated, or None.

    Returns:
        W', c' and the belief to pass on.
    """
    compute = _composed if is_traced(weight) else _Absorb.apply
    weight, bias, *belief = compute(weight, bias, spec, running, *v)
    return weight, bias, Belief(*belief)


def _scaled(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight * scale.view(-1, 1, 1, 1)).to(weight.dtype)


def _shift(offset: Tensor, scale: Tensor, bias: Optional[Tensor], dtype: torch.dtype) -> Tensor:
    shift = offset * scale
    return (shift if bias is None else shift + bias).to(dtype)


def _offset(conv_bias: Optional[Tensor], mean: Tensor) -> Tensor:
    return -mean if conv_bias is None else conv_bias - mean


class _Absorb(torch.autograd.Function):
    """Saves the filters, and vectors. The backward needs no features: with the gradients dW' and
    sum_dy of the parameters, ``sum_dy_xmu`` is <dW', W> + (c - mu) sum_dy."""

    @staticmethod
    def forward(ctx, weight, conv_bias, spec, running, *vectors):
        v = Vectors(*vectors)
        arguments = v, None, spec, running, _COUNT
        ctx.filter, ctx.spec = fastest(Filter, *arguments), spec
        found, ctx.kept = ctx.filter.forward(*arguments)
        offset = _offset(conv_bias, found.mean)
        shift = _shift(offset, found.scale, v.bias, weight.dtype)
        ctx.has_bias = conv_bias is not None
        ctx.save_for_backward(weight, found.scale, offset, *vectors)
        ctx.set_materialize_grads(False)
        return _scaled(weight, found.scale), shift, *found.belief

    @staticmethod
    @once_differentiable
    def backward(ctx, d_weight, sum_dy, *d_belief):
        weight, scale, offset, *vectors = ctx.saved_tensors
        if d_weight is None:
            d_weight = torch.zeros_like(weight)
        sum_dy = torch.zeros_like(scale) if sum_dy is None else sum_dy.to(scale.dtype)
        d_conv_bias = (scale * sum_dy).to(weight.dtype) if ctx.has_bias else None
        d_vectors = Vectors()
        if any(ctx.needs_input_grad[4:]):
            sum_dy_xmu = (d_weight * weight).sum((1, 2, 3), dtype=scale.dtype) + offset * sum_dy
            arguments = Vectors(*vectors), None, ctx.spec, (sum_dy, sum_dy_xmu), d_belief, _COUNT
            d_vectors = ctx.filter.backward(ctx.kept, *arguments).vectors
        return _scaled(d_weight, scale), d_conv_bias, None, None, *d_vectors


def _composed(weight, conv_bias, spec, running, *vectors):
    """The same by torch's own nodes, which a compiler sees and fuses."""
    v = Vectors(*vectors)
    filtered = filter_belief(v, None, spec)
    if running is not None:
        track(running, filtered, None, _COUNT)
    scale, offset = scale_of(filtered, v, spec), _offset(conv_bias, filtered.posterior.mean[0])
    shift = _shift(offset, scale, v.bias, weight.dtype)
    return _scaled(weight, scale), shift, *filtered.belief
