"""The arithmetic of Kalman Normalization: measure, update (Eq. 7), normalise.

Rows are batches or images: a batch is one row of C channels, GroupNorm's statistics are N rows of
G groups. Statistics are computed in float32 (float64 for float64 features) whatever the dtype of
the features: in float16 x^2 overflows at 256 and E[x^2] - E[x]^2 loses everything.
"""

from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .belief import Belief

__all__ = [
    "filter_and_normalize",
    "gate",
    "group_belief",
    "measure",
    "measure_groups",
    "normalize",
    "update",
]


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the statistics of features ``x``: float32, or float64 if they are."""
    return torch.promote_types(x.dtype, torch.float32)


def measure(x: Tensor) -> Belief:
    """Mean and biased variance per channel over the batch: BatchNorm's statistics (Eq. 1).

    Args:
        x: features of shape (N, C, H, W), not empty.

    Returns:
        Belief: of shape (1, C).
    """
    var, mean = torch.var_mean(x.to(statistics_dtype(x)), dim=(0, 2, 3), unbiased=False)
    return Belief(mean[None], var[None])


def measure_groups(x: Tensor, num_groups: int) -> Belief:
    """Mean and biased variance per image and group of channels: GroupNorm's (Eq. 8).

    Args:
        x: features of shape (N, C, H, W), not empty.
        num_groups: G, a divisor of C.

    Returns:
        Belief: of shape (N, G).
    """
    x = x.to(statistics_dtype(x)).reshape(x.shape[0], num_groups, -1)
    var, mean = torch.var_mean(x, dim=2, unbiased=False)
    return Belief(mean, var)


def group_belief(belief: Belief, num_groups: int) -> Belief:
    """The belief about a pixel of a group whose channels are believed to be ``belief``.

    By the law of total variance the group's variance is the mean of its channels' variances plus
    the variance of their means.

    Args:
        belief: shape (N, C) or (1, C).
        num_groups: G, a divisor of C.

    Returns:
        Belief: of shape (N, G) or (1, G).
    """
    rows, channels = belief.mean.shape  # written out: an empty belief cannot infer a size
    mean, var = (v.reshape(rows, num_groups, channels // num_groups) for v in belief)
    return Belief(mean.mean(2), var.mean(2) + mean.var(2, unbiased=False))


def update(prior: Belief, measurement: Belief, gain: Tensor, mixture: bool = False) -> Belief:
    """Blends prior and measurement (Eq. 7): the posterior.

    With p = 1 - q::

        mean = p mean_prior + q mean_measured
        var  = p var_prior  + q var_measured  [+ p q (mean_measured - mean_prior)^2]

    The term in brackets makes ``var`` the variance of the mixture of the two. The paper does not
    have it, the released code does.

    Args:
        prior: shape (1, C) or (N, C).
        measurement: the same shape, or one that broadcasts with it.
        gain: q in [0, 1], a tensor of one element.
        mixture: whether to add the mixture term.
    """
    innovation = measurement.mean - prior.mean
    mean = prior.mean + gain * innovation
    var = (1 - gain) * prior.var + gain * measurement.var
    if mixture:
        var = var + (1 - gain) * gain * innovation.square()
    return Belief(mean, var)


def _fits(prior: Belief, measurement: Belief, limit: float) -> Tensor:
    """Whether a row's prior is not far too wide, shape (rows, 1)."""
    ratio = (prior.var / measurement.var).detach().mean(1, keepdim=True)
    return ~(ratio >= limit)


def gate(prior: Belief, measurement: Belief, limit: float) -> Belief:
    """Drops a prior that is far too wide (released code): returns the measurement in its place.

    A row's prior is dropped if the mean over its channels of var_prior / var_measured reaches
    ``limit``. The posterior of a dropped prior is the measurement, whatever the gain.
    """
    fits = _fits(prior, measurement, limit)
    return Belief(*(torch.where(fits, p, m) for p, m in zip(prior, measurement)))


def normalize(
    x: Tensor, belief: Belief, weight: Optional[Tensor], bias: Optional[Tensor], eps: float
) -> Tensor:
    """y = weight (x - mean) / sqrt(var + eps) + bias, differentiable in all of its arguments.

    Args:
        x: features of shape (N, C, H, W).
        belief: shape (1, C) or (N, C).
        weight, bias: scale and shift of shape (C,), or None for 1 and 0.
        eps: added to the variance.

    Returns:
        Tensor: in the dtype and memory format of ``x``.
    """
    scale = (belief.var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -belief.mean * scale
    if bias is not None:
        shift = shift + bias
    y = x.to(scale.dtype) * scale[:, :, None, None] + shift[:, :, None, None]
    return y.to(x.dtype)


def batch_norm(x: Tensor, mean: Tensor, var: Tensor, weight, bias, eps: float) -> Tensor:
    """:func:`normalize` with constant statistics of shape (C,): torch's fused operator."""
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)


def _measure_fast(x: Tensor) -> Belief:
    """:func:`measure`, without gradient, by the operator that BatchNorm uses."""
    if x.is_cuda:
        return measure(x)
    # torch's var_mean over these dimensions takes three times as long on a CPU.
    mean, var = torch.batch_norm_update_stats(x.to(statistics_dtype(x)), None, None, 0.0)
    return Belief(mean[None], var[None])


class _FilterAndNormalize(torch.autograd.Function):
    """:func:`measure`, :func:`gate`, :func:`update` and :func:`normalize` in one node of the graph.

    Composed of their own nodes they keep several tensors of the size of x and pass over it three
    times more in the backward. This keeps x and vectors. With s = 1/sqrt(var + eps), n values per
    channel, and the sums over them g_b = sum dy and g_w = sum dy (x - mean) s, the gradients of the
    posterior are::

        d_mean = -weight s g_b              d_var = -1/2 weight s^2 g_w

    plus those that come down the chain. They reach x through the measurement, whose share is q::

        dx = dy weight s + q d_mean / n + 2 q d_var (x - mean_measured) / n

    (with the mixture term, q d_mean + 2 p q (mean_measured - mean_prior) d_var for q d_mean).
    """

    @staticmethod
    def forward(ctx, x, prior_mean, prior_var, gain, weight, bias, eps, mixture, limit):
        measured = _measure_fast(x)
        fits = None
        if prior_mean is None:
            prior = posterior = measured
        else:
            prior = Belief(prior_mean, prior_var)
            if limit is not None:
                fits = _fits(prior, measured, limit)
                prior = gate(prior, measured, limit)
            posterior = update(prior, measured, gain, mixture)
        mean, var = posterior
        y = F.batch_norm(x, mean[0], var[0], weight, bias, False, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, var, *measured, *prior, gain, fits)
        ctx.eps, ctx.mixture, ctx.has_bias = eps, mixture, bias is not None
        measured_var = measured.var.clone()
        ctx.mark_non_differentiable(measured_var)
        return y, mean.clone(), var.clone(), measured_var

    @staticmethod
    def backward(ctx, dy, d_mean, d_var, _):
        x, weight, mean, var, measured_mean, measured_var, prior_mean, prior_var, gain, fits = (
            ctx.saved_tensors
        )
        # dy weight s and the two sums: what is left where statistics are constant.
        dx, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, mean[0], var[0], None, None, False, ctx.eps, [True, True, True]
        )
        inv_std = (var + ctx.eps).rsqrt()
        scale = inv_std if weight is None else inv_std * weight
        d_mean = d_mean - scale * d_bias
        d_var = d_var - 0.5 * scale * inv_std * d_weight
        d_prior_mean = d_prior_var = d_gain = None
        if gain is not None:
            innovation = measured_mean - prior_mean
            d_gain = d_mean * innovation + d_var * (measured_var - prior_var)
            d_prior_mean, d_prior_var = (1 - gain) * d_mean, (1 - gain) * d_var
            d_posterior_var = d_var
            d_mean, d_var = gain * d_mean, gain * d_var
            if ctx.mixture:
                d_gain = d_gain + d_posterior_var * (1 - 2 * gain) * innovation.square()
                through_mixture = 2 * (1 - gain) * d_var * innovation
                d_prior_mean, d_mean = d_prior_mean - through_mixture, d_mean + through_mixture
            d_gain = d_gain.sum()
            if fits is not None:  # what stands in for a dropped prior is the measurement
                d_mean = d_mean + torch.where(fits, 0.0, d_prior_mean)
                d_var = d_var + torch.where(fits, 0.0, d_prior_var)
                d_prior_mean = torch.where(fits, d_prior_mean, 0.0)
                d_prior_var = torch.where(fits, d_prior_var, 0.0)
        count = x.numel() // x.shape[1]
        slope = d_var * (2.0 / count)
        offset = d_mean / count - slope * measured_mean
        # In the statistics' precision: divided by the count, half precision may be left with 0.
        dx = torch.addcmul(dx.to(slope.dtype), x.to(slope.dtype), slope[:, :, None, None])
        dx = dx.add_(offset[:, :, None, None]).to(x.dtype)
        if weight is None:
            d_weight = None
        if not ctx.has_bias:
            d_bias = None
        return dx, d_prior_mean, d_prior_var, d_gain, d_weight, d_bias, None, None, None


def filter_and_normalize(
    x: Tensor,
    prior: Optional[Belief],
    gain: Optional[Tensor],
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    eps: float,
    mixture: bool = False,
    limit: Optional[float] = None,
) -> Tuple[Tensor, Belief, Tensor]:
    """Measures a batch, updates the prior and normalises, at about BatchNorm's time and memory.

    The same as :func:`measure`, :func:`gate` (if there is a ``limit``), :func:`update` and
    :func:`normalize` one after the other, in one node of the graph.

    Args:
        x: features of shape (N, C, H, W), not empty.
        prior: shape (1, C), or None for the measurement alone.
        gain: q, a tensor of one element; None if there is no prior.
        weight, bias, eps: as for :func:`normalize`.
        mixture: as for :func:`update`.
        limit: as for :func:`gate`.

    Returns:
        y, the posterior of shape (1, C), and the measured variance of shape (1, C), without
        gradient.
    """
    mean, var = (None, None) if prior is None else prior
    y, mean, var, measured_var = _FilterAndNormalize.apply(
        x, mean, var, gain, weight, bias, eps, mixture, limit
    )
    return y, Belief(mean, var), measured_var
