"""The filter of a layer by torch's operators, and its derivative by autograd.

Both are arithmetic on vectors. The passes over the features in front of them and behind them are in
:mod:`.normalize`, and in :mod:`.absorb` where nothing is measured.
"""

from typing import Callable, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from . import passes
from .belief import Belief
from .filter import Filtered, Running, Spec, Vectors, filter_belief, track

__all__ = ["Filter", "Gradients", "Statistics", "scale_of"]


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
    """The filter of a layer.

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
