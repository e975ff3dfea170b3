"""A belief through a convolution in one node of the graph, without the filter's sums.

sum W m over taps and channels is the product of the filter as a matrix with m repeated for each tap:
the filter is read as it is, and no sum over its taps is made or kept.
"""

from typing import Optional

import torch
from torch import Tensor

from .belief import Belief, conv2d

__all__ = ["predict"]


def _repeat(v: Tensor, taps: int) -> Tensor:
    """(rows, C) -> (rows, C taps): each channel's number for each of its taps."""
    return v if taps == 1 else v.repeat_interleave(taps, 1)


def _collect(v: Tensor, taps: int) -> Tensor:
    """The transpose of :func:`_repeat`."""
    return v if taps == 1 else v.view(v.shape[0], v.shape[1] // taps, taps).sum(2)


class _Predict(torch.autograd.Function):
    """mean = W m and var = (W * W) v, with gradients, for weights of shape (C_out, C_in, kH, kW).

    d_m and d_v are the transposed products, and d_W = d_mean m^T + 2 W * (d_var v^T).
    """

    @staticmethod
    def forward(ctx, mean, var, weight):
        ctx.save_for_backward(mean, var, weight)
        taps = weight[0, 0].numel()
        with torch.autocast(mean.device.type, enabled=False):
            filters = weight.to(mean.dtype).flatten(1)
            out_mean = _repeat(mean, taps) @ filters.t()
            return out_mean, _repeat(var, taps) @ filters.square().t()

    @staticmethod
    def backward(ctx, d_out_mean, d_out_var):
        mean, var, weight = ctx.saved_tensors
        taps = weight[0, 0].numel()
        d_mean = d_var = d_weight = None
        with torch.autocast(mean.device.type, enabled=False):
            filters = weight.to(mean.dtype).flatten(1)
            if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
                d_mean = _collect(d_out_mean @ filters, taps)
                d_var = _collect(d_out_var @ filters.square(), taps)
            if ctx.needs_input_grad[2]:
                d_weight = (d_out_var.t() @ _repeat(var, taps)).mul_(filters)
                d_weight = d_weight.addmm_(d_out_mean.t(), _repeat(mean, taps), beta=2)
                d_weight = d_weight.view_as(weight).to(weight.dtype)
        return d_mean, d_var, d_weight


def predict(
    belief: Belief, weight: Tensor, bias: Optional[Tensor] = None, groups: int = 1
) -> Belief:
    """:func:`~kn_detectron.layers.belief.conv2d`, faster: same arguments, result, and errors."""
    if groups > 1 or belief.mean.shape[-1] != weight.shape[1]:
        return conv2d(belief, weight, bias, groups)
    mean, var = _Predict.apply(belief.mean, belief.var, weight)
    return Belief(mean if bias is None else mean + bias.to(mean.dtype), var)
