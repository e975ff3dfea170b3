"""Kalman Normalization written down once more, in float64 numpy and mpmath, to test against.

It follows the paper's equations and the description of the released code literally, shares no code
with the package, and makes no attempt at speed.
"""

from typing import NamedTuple

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


def update(prior, measured, gain, paper):
    """Eq. 7; the paper's variant with gate and mixture term, as the released code has them."""
    (prior_mean, prior_var), (measured_mean, measured_var) = prior, measured
    if paper and (prior_var / measured_var).mean() >= 100:
        return measured
    p = 1 - gain
    mean = p * prior_mean + gain * measured_mean
    var = p * prior_var + gain * measured_var
    if paper:
        var = var + p * gain * (measured_mean - prior_mean) ** 2
    return mean, var


def released_layer(x, sampled, weight, bias, gain=0.1, eps=1e-5):
    """One normalised layer of the released code.

    Args:
        x: its features (N, C, H, W).
        sampled: the sampled map of the layer below after ReLU and the shared conv (1, C, h, w).

    Returns:
        y, and the mean and variance that are propagated.
    """
    prior, measured = ((v.mean((0, 2, 3)), v.var((0, 2, 3))) for v in (sampled, x))
    mean, var = update(prior, measured, gain, paper=True)
    return normalize(x, mean, var, weight, bias, eps), mean, var


class Layer(NamedTuple):
    """What a layer computes in training."""

    y: np.ndarray
    belief: tuple  # mean and variance that are handed on, each (rows, C)
    tracked: tuple  # mean and variance that the running statistics take, each (rows, C)


def kalman_norm(x, prior, state, groups, paper, eps):
    """One layer of KN, or of GKN, in training.

    Args:
        x: its features (N, C, H, W).
        prior: mean and variance of the prediction, each (1, C) or (N, C); None for a head.
        state: the arrays of its state_dict.
        groups: GKN's number of groups; None for KN.
        paper: whether it is the paper's variant.
    """
    layers = []
    for k, images in enumerate([x] if groups is None else np.split(x, len(x))):
        row = None if prior is None else [values[min(k, len(values) - 1)] for values in prior]
        layers.append(_normalized_together(images, row, state, groups, paper, eps))
    y, beliefs, tracked = zip(*layers)
    return Layer(np.concatenate(y), *(tuple(map(np.stack, zip(*v))) for v in (beliefs, tracked)))


def _normalized_together(x, prior, state, groups, paper, eps):
    channels = x.shape[1]
    weight, bias = state.get("weight", np.ones(channels)), state.get("bias", np.zeros(channels))
    of_channel = np.arange(channels) // (1 if groups is None else channels // groups)

    def by_group(function, values):
        return np.array([function(values[of_channel == g]) for g in range(of_channel[-1] + 1)])

    pixels = x.swapaxes(0, 1)
    measured = mean, var = by_group(np.mean, pixels), by_group(np.var, pixels)
    gain = 1.0
    if prior is not None:
        m, v = prior
        if "mean_offset" in state:
            m, v = m + state["mean_offset"] * np.sqrt(v), v * np.exp(state["log_var_scale"])
        if "process_noise" in state:
            v = v + np.log1p(np.exp(state["process_noise"]))
        # A pixel of a group: first its channel is drawn, then its value.
        first, second = by_group(np.mean, m), by_group(np.mean, v + m**2)
        # The sigmoid, in a form that takes any logit.
        gain = state["gain_scale"] * 0.5 * (1 + np.tanh(0.5 * state["gain_logit"]))
        mean, var = update((first, second - first**2), measured, gain, paper)
        if mean is measured[0]:  # the prior was dropped
            gain = 1.0
    # Of the variance the measured part is tracked without its bias.
    n = x.size / len(mean)
    unbiased = var + gain * measured[1] / (n - 1)
    mean, var, unbiased = mean[of_channel], var[of_channel], unbiased[of_channel]
    belief = bias, weight**2
    if paper:
        belief = mean, var
    elif groups is not None and prior is not None:
        std = np.sqrt(var + eps)
        belief = bias + weight * (m - mean) / std, weight**2 * v / std**2
    return Layer(normalize(x, mean, var, weight, bias, eps), belief, (mean, unbiased))
