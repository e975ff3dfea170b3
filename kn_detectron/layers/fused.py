"""Relu, convolution and norm of a chain with their arithmetic in single launches, on a GPU.

What they compute is that of :mod:`kn_detectron.layers.belief`, :mod:`~.prediction` and
:mod:`~.functional`, which is also what runs wherever Triton's kernels cannot: on a CPU, in double
precision, with micro-batches, and while torch.compile traces (it fuses the plain ones itself). Set
the environment variable KN_DETECTRON_TRITON=0 to have it everywhere.
"""

import functools
import logging
import math
import os
from typing import NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from . import passes
from .belief import Belief

__all__ = ["LARGEST_CHANNELS", "filter_batch", "kernels_for", "predict", "relu"]

logger = logging.getLogger(__name__)

LARGEST_CHANNELS = 4096  # those of a layer: its kernels hold all of them at once

# Triton's interpreter runs the kernels on a CPU, slowly: for tests.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def kernels_for(*tensors: Optional[Tensor]):
    """The module of Triton's kernels if they can work on these tensors, else None."""
    first = tensors[0]
    if not (first.is_cuda or _INTERPRETED) or passes.is_compiling():
        return None
    if first.is_cuda and first.device.index != torch.cuda.current_device():
        return None  # Triton launches on the current one
    if any(t is not None and t.dtype != torch.float32 for t in tensors):
        return None
    return _usable_kernels(str(first.device))


@functools.lru_cache(maxsize=None)
def _usable_kernels(device: str):
    if os.environ.get("KN_DETECTRON_TRITON", "1") == "0":
        return None
    try:
        from . import triton_kernels

        _check(triton_kernels, device)
    except Exception as error:  # no Triton, no C compiler, a GPU that it does not know
        logger.warning(
            f"Beliefs are computed without Triton's kernels on {device}, which takes more launches "
            f"but gives the same results: {type(error).__name__}: {error}"
        )
        return None
    return triton_kernels


def _check(kernels, device: str) -> None:
    """Raises unless the kernels compile on a device and agree with torch's operators there."""
    from . import belief, functional, prediction  # they import this file

    def numbers(*shape, start=-1.0, end=1.0):
        values = torch.linspace(start, end, math.prod(shape), device=device)
        return values.view(shape).requires_grad_()

    leaves = [numbers(1, 3), numbers(1, 3, start=0.5, end=2.0), numbers(5, 3, 3, 3)]
    leaves += [
        numbers(5, start=0.5),
        numbers(5, end=0.5),
        numbers(),
        numbers(5),
        numbers(5, end=2),
    ]
    x = numbers(2, 5, 2, 3, end=3.0)

    def chain(fused: bool):
        mean, var, filters, offset, log_scale, logit, weight, bias = leaves
        options = dict(network=True, measuring=True)
        if fused:
            source = relu(Belief(mean, var), kernels)
            prior = predict(source, filters, kernels)
            y, passed_on = filter_batch(
                x,
                prior,
                logit,
                torch.ones_like(logit),
                weight,
                bias,
                1e-5,
                (offset, log_scale),
                kernels,
                **options,
            )
        else:
            prior = prediction.predict(belief.relu(Belief(mean, var)), filters)
            y, passed_on, _, _ = functional.filter_batch(
                x,
                prior,
                logit.sigmoid(),
                weight,
                bias,
                1e-5,
                layout=passes.Layout(1, 5),
                model=(offset, log_scale, None),
                passes_on_y=True,
            )
        loss = y.square().sum() + passed_on.var.sum() + passed_on.mean.sum()
        return [y.detach(), *torch.autograd.grad(loss, [x, *leaves])]

    with torch.enable_grad(), torch.autocast(torch.device(device).type, enabled=False):
        for got, want in zip(chain(True), chain(False)):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


class _Relu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mean, var, kernels):
        ctx.save_for_backward(mean, var)
        ctx.kernels = kernels
        return kernels.relu_forward(mean, var)

    @staticmethod
    def backward(ctx, d_mean, d_var):
        return *ctx.kernels.relu_backward(*ctx.saved_tensors, d_mean, d_var), None


class _Predict(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mean, var, weight, kernels):
        ctx.save_for_backward(mean, var, weight)
        ctx.kernels = kernels
        return kernels.predict_forward(mean, var, weight)

    @staticmethod
    def backward(ctx, d_mean, d_var):
        return *ctx.kernels.predict_backward(*ctx.saved_tensors, d_mean, d_var), None


class _Options(NamedTuple):
    eps: float
    network: bool
    measuring: bool
    running: Optional[Tuple[Tensor, Tensor, Tensor]]
    momentum: Optional[float]


class _FilterAndNormalize(torch.autograd.Function):
    """See the class of this name in :mod:`~.functional`, which has the maths."""

    @staticmethod
    def forward(
        ctx, x, given_mean, given_var, first, second, logit, scale, weight, bias, options, kernels
    ):
        measured = passes.moments(x) if options.measuring else (None, None)
        inputs = kernels.Inputs(
            *measured, given_mean, given_var, first, second, logit, scale, options.network
        )
        count = x.numel() // x.shape[1]
        mean, inv_std, slope, *belief = kernels.filter_forward(
            inputs, weight, bias, options.eps, options.running, options.momentum, count
        )
        ctx.save_for_backward(x, weight, mean, inv_std, slope, *inputs[:-1])
        ctx.options, ctx.kernels = options, kernels
        ctx.set_materialize_grads(False)
        return passes.transform(x, mean, slope, bias), *belief

    @staticmethod
    def backward(ctx, dy, d_belief_mean, d_belief_var):
        x, weight, mean, inv_std, scale, *inputs = ctx.saved_tensors
        options, kernels = ctx.options, ctx.kernels
        inputs = kernels.Inputs(*inputs, options.network)
        if dy is None:
            dy = torch.zeros_like(x)
        dx, dy_x, dy_sum = passes.gradient_sums(dy, x, mean, scale, not options.measuring)
        *gradients, slope, offset, one = kernels.filter_backward(
            *(inputs, weight, inv_std, dy_x, dy_sum, d_belief_mean, d_belief_var),
            count=x.numel() // x.shape[1],
        )
        d_given_mean, d_given_var, d_first, d_second, d_logit, d_weight, d_bias = gradients
        center = inputs.measured_mean
        if options.measuring and options.network:
            vectors = scale, center, weight, inv_std, slope, offset, one
            dx = passes.network_gradient(dy, x, *vectors)
        elif options.measuring:
            dx = passes.input_gradient(dy, x, scale, center, slope, offset)
        d_first, d_second = (
            None if v is None else g
            for v, g in ((inputs.first, d_first), (inputs.second, d_second))
        )
        d_given = d_given_mean, d_given_var
        return dx, *d_given, d_first, d_second, d_logit, None, d_weight, d_bias, None, None


def relu(belief: Belief, kernels) -> Belief:
    """:func:`~kn_detectron.layers.belief.relu`."""
    return Belief(*_Relu.apply(belief.mean, belief.var, kernels))


def predict(belief: Belief, weight: Tensor, kernels) -> Belief:
    """:func:`~kn_detectron.layers.prediction.predict` of a belief of one row."""
    return Belief(*_Predict.apply(belief.mean, belief.var, weight, kernels))


def filter_batch(
    x: Tensor,
    prior: Belief,
    logit: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    model: Sequence[Optional[Tensor]],
    kernels,
    *,
    network: bool,
    measuring: bool,
    running: Optional[Tuple[Tensor, Tensor, Tensor]] = None,
    momentum: Optional[float] = None,
) -> Tuple[Tensor, Belief]:
    """:func:`~kn_detectron.layers.functional.filter_batch` of a layer in one of the two variants.

    Args:
        x: features of shape (N, C, H, W), not empty; of any floating dtype. All else is float32.
        prior: shape (1, C).
        logit, scale: the gain is scale sigmoid(logit).
        weight, bias, eps: as there.
        model: ``mean_offset`` and ``log_var_scale``, or ``process_noise`` and None, or None twice.
        network: whether the variant is that, rather than the paper's.
        measuring: as there.
        running: ``running_mean``, ``running_var`` and ``num_batches_tracked`` to be updated, or None.
        momentum: what for, as in BatchNorm.

    Returns:
        y and the belief to pass on.
    """
    options = _Options(eps, network, measuring, running, momentum)
    y, mean, var = _FilterAndNormalize.apply(
        x,
        prior.mean.contiguous(),
        prior.var.contiguous(),
        *model,
        logit,
        scale,
        weight,
        bias,
        options,
        kernels,
    )
    return y, Belief(mean, var)
