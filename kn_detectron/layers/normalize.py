"""One autograd node that measures, filters and normalises features.

Composed of torch's own nodes, the same computation would keep several tensors of the size of the
features, and would pass over them three times more in the backward. Here the features go through
the passes of :mod:`.passes` only, and everything between two passes is arithmetic on vectors::

    forward     moments of x  ->  Filter.forward (Eq. 7)  ->  transform, which makes y
    backward    gradient sums of dy and x  ->  Filter.backward  ->  the pass that makes dx
"""

from typing import Callable, NamedTuple, Optional, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import passes
from .belief import Belief
from .filter import (
    Filtered,
    Running,
    Spec,
    Vectors,
    filter_belief,
    track,
)
from .introspection import is_traced
from .triton import fastest

__all__ = ["Filter", "Gradients", "Statistics", "filter_and_normalize", "scale_of"]


class Statistics(NamedTuple):
    """What the filter of a layer finds.

    Attributes:
        mean, scale: of y = scale (x - mean) + bias, one number for each channel of the unfolded
            features (see :class:`~kn_detectron.layers.sets.Sets`).
        belief: to pass on, shape (1, C) or (rows, C).
    """

    mean: Tensor
    scale: Tensor
    belief: Belief


class Gradients(NamedTuple):
    """The derivative of a filter.

    Attributes:
        vectors: the gradients of the vectors; None for a vector without a gradient.
        input_pass: the function of :mod:`~kn_detectron.layers.passes` that makes dx from dy and x;
            None if nothing was measured. It is ``input_gradient``, or ``batch_norm_gradient``,
            for which a GPU has one operator, where Triton's kernels find that only y depends on the
            moments.
        input_vectors: its further arguments.
    """

    vectors: Vectors
    input_pass: Optional[Callable] = None
    input_vectors: Tuple = ()


class Kept(NamedTuple):
    """The inputs and outputs of a filter, in an autograd graph of their own.

    Attributes:
        vectors: the layer's vectors, as leaves of the graph.
        measured: the measurement, as leaves of the graph, or None.
        mean, scale: what the features are normalised with, for each unfolded channel.
        belief: the belief to pass on.
    """

    vectors: Vectors
    measured: Optional[Belief]
    mean: Tensor
    scale: Tensor
    belief: Belief


class Filter:
    """The filter of a layer by torch's operators, and its derivative by autograd.

    Triton has a class of the same name (:func:`~kn_detectron.layers.triton.fastest`).
    """

    @staticmethod
    def forward(
        v: Vectors, measured: Optional[Belief], spec: Spec, running: Optional[Running], count: int
    ) -> Tuple[Statistics, Kept]:
        """Filters what was measured, and updates the moving statistics.

        Args:
            v: the layer's vectors.
            measured: mean and biased variance of each set, or None.
            spec: what kind of filter the layer is.
            running: the moving statistics, or None if there are none to be updated.
            count: the number of values in each set.

        Returns:
            The statistics to normalise with, and the first argument of :meth:`backward`.
        """
        v = Vectors(*(None if t is None else t.detach().requires_grad_(t.requires_grad) for t in v))
        if measured is not None:
            measured = Belief(*(t.detach().requires_grad_() for t in measured))
        with torch.enable_grad():
            filtered = filter_belief(v, measured, spec)
            mean = spec.sets.spread(filtered.posterior.mean)
            scale = scale_of(filtered, v, spec)
        if running is not None:
            track(running, filtered, measured, count)
        kept = Kept(v, measured, mean, scale, filtered.belief)
        # Cloned, because the belief may be one of the inputs.
        belief = Belief(*(b.detach().clone() for b in filtered.belief))
        return Statistics(mean.detach(), scale.detach(), belief), kept

    @staticmethod
    def backward(
        kept: Kept,
        v: Vectors,
        measured: Optional[Belief],
        spec: Spec,
        sums: Tuple[Tensor, Tensor],
        d_belief: Tuple[Optional[Tensor], Optional[Tensor]],
        count: int,
    ) -> Gradients:
        """The gradients of the vectors, and the pass that computes dx.

        In y = scale (x - mean) + bias the gradients of scale, bias and mean are ``sum_dy_xmu``,
        ``sum_dy`` and -scale ``sum_dy``. From these and from the gradient of the belief, autograd
        goes on to the vectors and to the measurement.

        Args:
            kept: the second result of :meth:`forward`.
            v, measured, spec, count: as in :meth:`forward`.
            sums: ``sum_dy`` and ``sum_dy_xmu`` of each unfolded channel.
            d_belief: the gradients of the belief's mean and variance, or None.
        """
        vectors, moments = kept.vectors, kept.measured
        with torch.enable_grad():
            bias = None if vectors.bias is None else spec.sets.repeat(vectors.bias)
        sum_dy, sum_dy_xmu = sums
        scale = kept.scale.detach()
        pairs = [
            (kept.mean, scale * -sum_dy),
            (kept.scale, sum_dy_xmu),
            (bias, sum_dy),
            *zip(kept.belief, d_belief),
        ]
        pairs = [(out, d) for out, d in pairs if d is not None and out is not None]
        pairs = [(out, d) for out, d in pairs if out.requires_grad]
        outputs, d_outputs = zip(*pairs)
        wanted = [t for t in (*vectors, *(moments or ())) if t is not None and t.requires_grad]
        # The graph is kept, because a caller may keep the graph around this node for a second pass.
        options = dict(allow_unused=True, retain_graph=True)
        found = iter(torch.autograd.grad(outputs, wanted, d_outputs, **options))
        d_vectors = Vectors(
            *(next(found) if t is not None and t.requires_grad else None for t in vectors)
        )
        if moments is None:
            return Gradients(d_vectors)
        d_mean, d_var = (spec.sets.spread(d) for d in found)
        center = spec.sets.spread(measured.mean)
        return Gradients(d_vectors, passes.input_gradient, (scale, center, d_mean, d_var, count))


def scale_of(filtered: Filtered, v: Vectors, spec: Spec) -> Tensor:
    """weight / sqrt(var + eps) of the posterior, for each unfolded channel."""
    invstd = spec.sets.spread(filtered.invstd)
    return invstd if v.weight is None else invstd * spec.sets.repeat(v.weight)


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
