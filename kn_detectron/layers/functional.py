"""The arithmetic of Kalman Normalization: measure, update (Eq. 7), normalise.

Rows are batches or images: a batch is one row of C channels, GroupNorm's statistics are N rows of
G groups. Statistics are computed in float32 (float64 for float64 features) whatever the dtype of
the features: in float16 x^2 overflows at 256 and E[x^2] - E[x]^2 loses everything.
"""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .belief import Belief

__all__ = ["gate", "group_belief", "measure", "measure_groups", "normalize", "update"]


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


def gate(prior: Belief, measurement: Belief, limit: float) -> Belief:
    """Drops a prior that is far too wide (released code): returns the measurement in its place.

    A row's prior is dropped if the mean over its channels of var_prior / var_measured reaches
    ``limit``. The posterior of a dropped prior is the measurement, whatever the gain.
    """
    ratio = (prior.var / measurement.var).detach().mean(1, keepdim=True)
    keep = ~(ratio >= limit)
    return Belief(
        torch.where(keep, prior.mean, measurement.mean),
        torch.where(keep, prior.var, measurement.var),
    )


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
