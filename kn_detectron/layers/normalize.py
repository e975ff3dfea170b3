"""One autograd node that measures, filters and normalises features.

Composed of torch's own nodes, the same computation would keep several tensors of the size of the
features, and would pass over them three times more in the backward. Here the features go through
the passes of :mod:`.passes` only, and everything between two passes is arithmetic on vectors::

    forward     moments of x  ->  Filter.forward (Eq. 7)  ->  transform, which makes y
    backward    gradient sums of dy and x  ->  Filter.backward  ->  the pass that makes dx
"""

from typing import Optional, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import passes
from .belief import Belief
from .filter import Running, Spec, Vectors, filter_belief, track
from .filter_gradient import Filter, scale_of
from .introspection import is_traced
from .triton import fastest

__all__ = ["filter_and_normalize"]


class _Normalized(torch.autograd.Function):
    """Saves x and vectors. The forward reads x twice and writes y once. The backward reads x and dy
    twice, and writes dx once or twice (see :mod:`~kn_detectron.layers.passes`)."""

    @staticmethod
    def forward(ctx, x, spec, running, *vectors):
        v, sets = Vectors(*vectors), spec.sets
        ctx.spec, ctx.count = spec, x.numel() // (sets.rows * sets.groups)
        measured = Belief(*sets.moments(x)) if spec.measures else None
        arguments = v, measured, spec, running, ctx.count
        ctx.filter = fastest(Filter, *arguments)
        found, ctx.kept = ctx.filter.forward(*arguments)
        bias = None if v.bias is None else sets.repeat(v.bias)
        y = sets.run(passes.transform, [x], [found.mean, found.scale, bias])
        ctx.save_for_backward(x, found.mean, found.scale, *(measured or (None, None)), *vectors)
        ctx.set_materialize_grads(False)
        return y, *found.belief

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, *d_belief):
        x, mean, scale, *small = ctx.saved_tensors
        spec, sets = ctx.spec, ctx.spec.sets
        measured = Belief(*small[:2]) if spec.measures else None
        v = Vectors(*small[2:])
        dx = None
        if dy is None:
            dy = torch.zeros_like(x)
        if spec.measures:
            sums = sets.run(passes.gradient_sums, [dy, x], [mean])
        else:
            dx, *sums = sets.run(passes.frozen_gradient, [dy, x], [mean, scale])
        if not spec.measures and not any(ctx.needs_input_grad[3:]):
            return dx, None, None, *[None] * len(v)
        d_vectors, input_pass, input_vectors = ctx.filter.backward(
            ctx.kept, v, measured, spec, sums, d_belief, ctx.count
        )
        if input_pass is not None and ctx.needs_input_grad[0]:
            dx = sets.run(input_pass, [dy, x], input_vectors)
        return dx, None, None, *d_vectors


def filter_and_normalize(
    x: Tensor, v: Vectors, spec: Spec, running: Optional[Running] = None
) -> Tuple[Tensor, Belief]:
    """Measures features, filters them (Eq. 7), and normalises them with the posterior.

    While the computation is traced, and for an empty batch, it is composed of torch's own nodes.

    Args:
        x: features of shape (N, C, H, W), in any floating dtype.
        v: the layer's vectors, in the dtype of the statistics.
        spec: what kind of filter the layer is.
        running: the moving statistics to be updated, or None.

    Returns:
        y, like x, and the belief to pass on.
    """
    if x.numel() == 0 or is_traced(x):
        return _composed(x, v, spec, running)
    y, mean, var = _Normalized.apply(x, spec, running, *v)
    return y, Belief(mean, var)


def _composed(
    x: Tensor, v: Vectors, spec: Spec, running: Optional[Running]
) -> Tuple[Tensor, Belief]:
    """:func:`filter_and_normalize` by torch's own nodes, which a compiler sees and fuses."""
    sets = spec.sets
    values, measured = x.to(passes.statistics_dtype(x)), None
    if spec.measures:
        per_row, per_group = sets.images // sets.rows, sets.channels // sets.groups
        by_set = values.reshape(sets.rows, per_row, sets.groups, per_group, -1)
        var, mean = torch.var_mean(by_set, (1, 3, 4), unbiased=False)
        measured = Belief(mean, var)
    filtered = filter_belief(v, measured, spec)
    if running is not None:
        track(running, filtered, measured, values.numel() // (sets.rows * sets.groups))

    def per_channel(numbers: Tensor) -> Tensor:
        return numbers.view(1 if sets.is_batch else sets.images, sets.channels, 1, 1)

    mean, scale = sets.spread(filtered.posterior.mean), scale_of(filtered, v, spec)
    y = (values - per_channel(mean)) * per_channel(scale)
    if v.bias is not None:
        y = y + v.bias.view(-1, 1, 1)
    return y.to(x.dtype), filtered.belief
