"""Kalman Normalization written down once more, in float64 numpy and mpmath, to test against.

It follows the paper's equations and the description of the released code literally, shares no code
with the package, and makes no attempt at speed.
"""

import mpmath
import numpy as np


def rectified_moments(mean: float, var: float):
    """Textbook moments of max(x, 0), x ~ N(mean, var), with 400 digits."""
    with mpmath.workdps(400):
        m, v = mpmath.mpf(mean), mpmath.mpf(var)
        if v == 0:
            return max(m, mpmath.mpf(0)), mpmath.mpf(0)
        s = mpmath.sqrt(v)
        pdf, cdf = mpmath.npdf(m / s), mpmath.ncdf(m / s)
        first = m * cdf + s * pdf
        second = (m**2 + v) * cdf + m * s * pdf
        return first, second - first**2


def conv_moments(mean, var, weight, groups=1):
    """Sums over taps and input channels of W m and W^2 v, by loops."""
    c_out, per_group = weight.shape[:2]
    out_mean, out_var = np.zeros(c_out), np.zeros(c_out)
    for o in range(c_out):
        group = o // (c_out // groups)
        for i in range(per_group):
            c = group * per_group + i
            out_mean[o] += weight[o, i].sum() * mean[c]
            out_var[o] += (weight[o, i] ** 2).sum() * var[c]
    return out_mean, out_var


def normalize(x, mean, var, weight, bias, eps=1e-5):
    """Affine normalisation of (N, C, H, W) with statistics per channel."""
    mean, var, weight, bias = (v[None, :, None, None] for v in (mean, var, weight, bias))
    return (x - mean) / np.sqrt(var + eps) * weight + bias


def released_layer(x, sampled, weight, bias, gain=0.1, eps=1e-5):
    """One normalised layer of the released code.

    Args:
        x: its features (N, C, H, W).
        sampled: the sampled map of the layer below after ReLU and the shared conv (1, C, h, w).

    Returns:
        y, and the mean and variance that are propagated.
    """
    batch_mean, batch_var = x.mean((0, 2, 3)), x.var((0, 2, 3))
    prior_mean, prior_var = sampled.mean((0, 2, 3)), sampled.var((0, 2, 3))
    if (prior_var / batch_var).mean() >= 100:
        mean, var = batch_mean, batch_var
    else:
        p = 1 - gain
        mean = p * prior_mean + gain * batch_mean
        var = p * prior_var + gain * batch_var + p * gain * (batch_mean - prior_mean) ** 2
    return normalize(x, mean, var, weight, bias, eps), mean, var
