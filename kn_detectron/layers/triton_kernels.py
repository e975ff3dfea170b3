"""The arithmetic per channel on a GPU: one launch for what is dozens of tiny operations otherwise.

Each function computes, on float32 vectors, what a plain one does, which its docstring names; that
one is the reference, and what runs wherever these cannot (:mod:`kn_detectron.layers.fused`).
"""

from typing import NamedTuple, Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "Inputs",
    "filter_backward",
    "filter_forward",
    "predict_backward",
    "predict_forward",
    "relu_backward",
    "relu_forward",
]

_BLOCK = 1024  # channels for each program of the ReLU's kernels
_ROWS, _COLUMNS = 4, 256  # of the filter, that a program of predict_forward reads at once
_BACK_ROWS, _BACK_COLUMNS, _BACK_WARPS = 256, 16, 8  # the same of predict_backward


@triton.jit
def _rectified(m, v):
    """What belief._RectifiedMoments has: mean, var, cdf(a), cdf(-a), pdf(a) / s, closed to |a| = 40.

    erfcx(z) is t exp(p(t)) with t = 2 / (2 + z) and p a polynomial fitted to it, relative error
    4e-7 in float32.
    """
    std = tl.sqrt(v)
    z = tl.minimum(tl.abs(m) / tl.maximum(std * 1.4142135623730951, 1.1754943508222875e-38), 28.0)
    t = 2.0 / (2.0 + z)
    p = -0.859972963 + t * 0.178717211
    p = 1.56556114 + t * p
    p = -1.22145309 + t * p
    p = 0.336652265 + t * p
    p = -0.209938321 + t * p
    p = 0.102570276 + t * p
    p = 0.373300938 + t * p
    p = 1.00007605 + t * p
    p = -1.26551342 + t * p
    mills = t * tl.exp(p)
    bell = tl.exp(-z * z)
    h = tl.maximum(1.0 - 1.7724538509055159 * z * mills, 0.0) * bell * 0.3989422804014327
    tail = 0.5 * bell * mills
    cdf = tl.where(m < 0, tail, 1.0 - tail)
    cdf_of_minus = tl.where(m < 0, 1.0 - tail, tail)
    mean = tl.maximum(m, 0.0) + std * h
    var = v * tl.maximum(cdf - h * (h + 1.4142135623730951 * z), 0.0)
    slope = tl.where(
        v > 1.1754943508222875e-38,
        bell * 0.3989422804014327 / tl.maximum(std, 1.1754943508222875e-38),
        0.0,
    )
    return mean, var, cdf, cdf_of_minus, slope


@triton.jit
def _relu_forward(mean, var, out_mean, out_var, size, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    m = tl.load(mean + i, mask=inside, other=0.0)
    v = tl.load(var + i, mask=inside, other=1.0)
    new_m, new_v, _, _, _ = _rectified(m, v)
    tl.store(out_mean + i, new_m, mask=inside)
    tl.store(out_var + i, new_v, mask=inside)


@triton.jit
def _relu_backward(mean, var, d_out_mean, d_out_var, d_mean, d_var, size, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    m = tl.load(mean + i, mask=inside, other=0.0)
    v = tl.load(var + i, mask=inside, other=1.0)
    g_m = tl.load(d_out_mean + i, mask=inside, other=0.0)
    g_v = tl.load(d_out_var + i, mask=inside, other=0.0)
    new_m, _, cdf, cdf_of_minus, slope = _rectified(m, v)
    tl.store(d_mean + i, g_m * cdf + g_v * (2.0 * new_m * cdf_of_minus), mask=inside)
    tl.store(d_var + i, g_m * 0.5 * slope + g_v * (cdf - new_m * slope), mask=inside)


def relu_forward(mean: Tensor, var: Tensor) -> Tuple[Tensor, Tensor]:
    """:func:`~kn_detectron.layers.belief.relu`."""
    mean, var = mean.contiguous(), var.contiguous()
    out_mean, out_var = torch.empty_like(mean), torch.empty_like(var)
    grid = (triton.cdiv(mean.numel(), _BLOCK),)
    _relu_forward[grid](mean, var, out_mean, out_var, mean.numel(), BLOCK=_BLOCK)
    return out_mean, out_var


def relu_backward(
    mean: Tensor, var: Tensor, d_out_mean: Tensor, d_out_var: Tensor
) -> Tuple[Tensor, Tensor]:
    """The gradient of :func:`relu_forward`."""
    given = [v.contiguous() for v in (mean, var, d_out_mean, d_out_var)]
    d_mean, d_var = torch.empty_like(given[0]), torch.empty_like(given[1])
    grid = (triton.cdiv(mean.numel(), _BLOCK),)
    _relu_backward[grid](*given, d_mean, d_var, mean.numel(), BLOCK=_BLOCK)
    return d_mean, d_var


@triton.jit
def _predict_forward(
    mean,
    var,
    weight,
    out_mean,
    out_var,
    outputs,
    size,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    o = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sum_m = tl.zeros((ROWS, COLUMNS), tl.float32)
    sum_v = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, size, COLUMNS):
        k = start + tl.arange(0, COLUMNS)
        m = tl.load(mean + k // TAPS, mask=k < size, other=0.0)
        v = tl.load(var + k // TAPS, mask=k < size, other=0.0)
        inside = (o[:, None] < outputs) & (k[None, :] < size)
        w = tl.load(weight + o[:, None] * size + k[None, :], mask=inside, other=0.0).to(tl.float32)
        sum_m += w * m[None, :]
        sum_v += w * w * v[None, :]
    tl.store(out_mean + o, tl.sum(sum_m, 1), mask=o < outputs)
    tl.store(out_var + o, tl.sum(sum_v, 1), mask=o < outputs)


@triton.jit
def _predict_backward(
    mean,
    var,
    weight,
    d_out_mean,
    d_out_var,
    d_mean,
    d_var,
    d_weight,
    outputs,
    inputs,
    TAPS: tl.constexpr,
    TAPS_2: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    # A program has some channels with all of their taps, and goes through the rows of the filter.
    i = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    tap = tl.arange(0, TAPS_2)
    m = tl.load(mean + i, mask=i < inputs, other=0.0)
    v = tl.load(var + i, mask=i < inputs, other=0.0)
    column = i[:, None] * TAPS + tap[None, :]
    inside = (i[:, None] < inputs) & (tap[None, :] < TAPS)
    sum_m = tl.zeros((CHANNELS, TAPS_2), tl.float32)
    sum_v = tl.zeros((CHANNELS, TAPS_2), tl.float32)
    for start in range(0, outputs, ROWS):
        o = start + tl.arange(0, ROWS)
        g_m = tl.load(d_out_mean + o, mask=o < outputs, other=0.0)[:, None, None]
        g_v = tl.load(d_out_var + o, mask=o < outputs, other=0.0)[:, None, None]
        place = o[:, None, None] * (inputs * TAPS) + column[None, :, :]
        here = (o[:, None, None] < outputs) & inside[None, :, :]
        w = tl.load(weight + place, mask=here, other=0.0).to(tl.float32)
        sum_m += tl.sum(w * g_m, 0)
        sum_v += tl.sum(w * w * g_v, 0)
        d_w = g_m * m[None, :, None] + 2.0 * w * g_v * v[None, :, None]
        tl.store(d_weight + place, d_w.to(d_weight.dtype.element_ty), mask=here)
    tl.store(d_mean + i, tl.sum(sum_m, 1), mask=i < inputs)
    tl.store(d_var + i, tl.sum(sum_v, 1), mask=i < inputs)


def predict_forward(mean: Tensor, var: Tensor, weight: Tensor) -> Tuple[Tensor, Tensor]:
    """:func:`~kn_detectron.layers.prediction.predict` of one row, one group and no bias."""
    mean, var, weight = mean.contiguous(), var.contiguous(), weight.contiguous()
    outputs, inputs, taps = weight.shape[0], weight.shape[1], weight[0, 0].numel()
    out_mean, out_var = mean.new_empty(1, outputs), var.new_empty(1, outputs)
    _predict_forward[(triton.cdiv(outputs, _ROWS),)](
        *(mean, var, weight, out_mean, out_var, outputs, inputs * taps),
        TAPS=taps,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
    )
    return out_mean, out_var


def predict_backward(
    mean: Tensor, var: Tensor, weight: Tensor, d_out_mean: Tensor, d_out_var: Tensor
) -> Tuple[Tensor, Tensor, Tensor]:
    """The gradients of :func:`predict_forward`: of mean, var and weight."""
    given = [v.contiguous() for v in (mean, var, weight, d_out_mean, d_out_var)]
    outputs, inputs, taps = weight.shape[0], weight.shape[1], weight[0, 0].numel()
    d_mean, d_var, d_weight = (torch.empty_like(v) for v in given[:3])
    taps_2 = triton.next_power_of_2(taps)
    channels = max(_BACK_COLUMNS // taps_2, 1)
    _predict_backward[(triton.cdiv(inputs, channels),)](
        *(*given, d_mean, d_var, d_weight, outputs, inputs),
        TAPS=taps,
        TAPS_2=taps_2,
        ROWS=_BACK_ROWS * _BACK_COLUMNS // (channels * taps_2),
        CHANNELS=channels,
        num_warps=_BACK_WARPS,
    )
    return d_mean, d_var, d_weight


@triton.jit
def _filtered(
    i,
    inside,
    measured_mean,
    measured_var,
    given_mean,
    given_var,
    first,
    second,
    logit,
    scale,
    channels,
    NETWORK: tl.constexpr,
    PROCESS: tl.constexpr,
    MEASURING: tl.constexpr,
):
    """Gain, prior and measurement, the gate's verdict, and what the process model multiplies by."""
    sigmoid = 1.0 / (1.0 + tl.exp(-tl.load(logit)))
    q = tl.load(scale) * sigmoid
    m = tl.load(given_mean + i, mask=inside, other=0.0)
    v = tl.load(given_var + i, mask=inside, other=1.0)
    std = tl.sqrt(tl.maximum(v, 1.1754943508222875e-38))
    growth = std
    if PROCESS and NETWORK:
        m = m + tl.load(first + i, mask=inside, other=0.0) * std
        growth = tl.exp(tl.load(second + i, mask=inside, other=0.0))
        v = v * growth
    if PROCESS and not NETWORK:
        noise = tl.load(first + i, mask=inside, other=0.0)
        # softplus, and its slope, without overflow
        v = v + tl.maximum(noise, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(noise)))
        growth = 1.0 / (1.0 + tl.exp(-noise))
    x_m, x_v, fits = m, v, m == m
    if MEASURING:
        x_m = tl.load(measured_mean + i, mask=inside, other=0.0)
        x_v = tl.load(measured_var + i, mask=inside, other=1.0)
    if MEASURING and not NETWORK:
        ratio = tl.sum(tl.where(inside, v / x_v, 0.0), 0) / channels
        fits = (ratio < 100.0) | (ratio != ratio)
        m = tl.where(fits, m, x_m)
        v = tl.where(fits, v, x_v)
    return sigmoid, q, m, v, x_m, x_v, std, growth, fits


@triton.jit
def _filter_forward(
    measured_mean,
    measured_var,
    given_mean,
    given_var,
    first,
    second,
    logit,
    scale,
    weight,
    bias,
    running_mean,
    running_var,
    tracked,
    out_mean,
    out_std,
    out_scale,
    belief_mean,
    belief_var,
    channels,
    eps,
    momentum,
    bessel,
    NETWORK: tl.constexpr,
    PROCESS: tl.constexpr,
    MEASURING: tl.constexpr,
    TRACK: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.arange(0, BLOCK)
    inside = i < channels
    _, q, m, v, x_m, x_v, _, _, _ = _filtered(
        i,
        inside,
        measured_mean,
        measured_var,
        given_mean,
        given_var,
        first,
        second,
        logit,
        scale,
        channels,
        NETWORK,
        PROCESS,
        MEASURING,
    )
    w = tl.load(weight + i, mask=inside, other=0.0)
    b = tl.load(bias + i, mask=inside, other=0.0)
    if MEASURING:
        innovation = x_m - m
        m = m + q * innovation
        v = (1.0 - q) * v + q * x_v
        if not NETWORK:
            v = v + (1.0 - q) * q * innovation * innovation
    inv_std = 1.0 / tl.sqrt(v + eps)
    tl.store(out_mean + i, m, mask=inside)
    tl.store(out_std + i, inv_std, mask=inside)
    tl.store(out_scale + i, w * inv_std, mask=inside)
    if NETWORK:
        tl.store(belief_mean + i, b, mask=inside)
        tl.store(belief_var + i, w * w, mask=inside)
    else:
        tl.store(belief_mean + i, m, mask=inside)
        tl.store(belief_var + i, v, mask=inside)
    if TRACK:
        if MEASURING:
            v = v + q * x_v * bessel
        # Finite, all of them: a NaN or an infinity is one in the sum too.
        total = tl.sum(tl.where(inside, m + v, 0.0), 0)
        finite = tl.abs(total) < float("inf")
        count = tl.load(tracked) + finite.to(tl.int64)
        tl.store(tracked, count)
        rate = 1.0 * momentum
        if CUMULATIVE:
            rate = 1.0 / tl.maximum(count.to(tl.float32), 1.0)
        if not MEASURING:
            rate = rate * 0.0 + 1.0  # nothing random to average out
        r_m = tl.load(running_mean + i, mask=inside, other=0.0)
        r_v = tl.load(running_var + i, mask=inside, other=0.0)
        new_m = tl.where(finite, r_m * (1.0 - rate) + m * rate, r_m)
        new_v = tl.where(finite, r_v * (1.0 - rate) + v * rate, r_v)
        tl.store(running_mean + i, new_m, mask=inside)
        tl.store(running_var + i, new_v, mask=inside)


@triton.jit
def _filter_backward(
    measured_mean,
    measured_var,
    given_mean,
    given_var,
    first,
    second,
    logit,
    scale,
    weight,
    inv_std,
    dy_x,
    dy_sum,
    d_belief_mean,
    d_belief_var,
    d_given_mean,
    d_given_var,
    d_first,
    d_second,
    d_logit,
    d_weight,
    d_bias,
    slope,
    offset,
    one,
    channels,
    count,
    NETWORK: tl.constexpr,
    PROCESS: tl.constexpr,
    MEASURING: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_VAR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.arange(0, BLOCK)
    inside = i < channels
    sigmoid, q, m, v, x_m, x_v, std, growth, fits = _filtered(
        i,
        inside,
        measured_mean,
        measured_var,
        given_mean,
        given_var,
        first,
        second,
        logit,
        scale,
        channels,
        NETWORK,
        PROCESS,
        MEASURING,
    )
    w = tl.load(weight + i, mask=inside, other=0.0)
    s = tl.load(inv_std + i, mask=inside, other=0.0)
    sum_x = tl.load(dy_x + i, mask=inside, other=0.0)
    sum_1 = tl.load(dy_sum + i, mask=inside, other=0.0)
    g_m = -w * s * sum_1
    g_v = -0.5 * w * s * s * s * sum_x
    g_w = sum_x * s
    if HAS_MEAN:
        more = tl.load(d_belief_mean + i, mask=inside, other=0.0)
        if NETWORK:
            sum_1 += more
        else:
            g_m += more
    if HAS_VAR:
        more = tl.load(d_belief_var + i, mask=inside, other=0.0)
        if NETWORK:
            g_w += 2.0 * w * more
        else:
            g_v += more
    tl.store(d_weight + i, g_w, mask=inside)
    tl.store(d_bias + i, sum_1, mask=inside)

    g_q = tl.zeros((BLOCK,), tl.float32)
    if MEASURING:
        innovation = x_m - m
        g_q = g_m * innovation + g_v * (x_v - v)
        x_g_m, x_g_v = q * g_m, q * g_v
        p_g_m, p_g_v = g_m - x_g_m, g_v - x_g_v
        if not NETWORK:
            g_q += g_v * (1.0 - 2.0 * q) * innovation * innovation
            through_mixture = 2.0 * (1.0 - q) * x_g_v * innovation
            p_g_m -= through_mixture
            x_g_m += through_mixture
            # What stands in for a dropped prior is the measurement.
            x_g_m = tl.where(fits, x_g_m, x_g_m + p_g_m)
            x_g_v = tl.where(fits, x_g_v, x_g_v + p_g_v)
            p_g_m = tl.where(fits, p_g_m, 0.0)
            p_g_v = tl.where(fits, p_g_v, 0.0)
        if NETWORK:
            tl.store(slope + i, q * sum_x / count, mask=inside)
            tl.store(
                offset + i, q * tl.load(dy_sum + i, mask=inside, other=0.0) / count, mask=inside
            )
        else:
            tl.store(slope + i, 2.0 * x_g_v / count, mask=inside)
            tl.store(offset + i, x_g_m / count, mask=inside)
        g_m, g_v = p_g_m, p_g_v
    tl.store(
        d_logit, tl.sum(tl.where(inside, g_q, 0.0), 0) * tl.load(scale) * sigmoid * (1.0 - sigmoid)
    )
    if PROCESS and NETWORK:
        tl.store(d_first + i, g_m * std, mask=inside)
        tl.store(d_second + i, g_v * v, mask=inside)
        given = tl.load(given_var + i, mask=inside, other=1.0)
        b = tl.load(first + i, mask=inside, other=0.0)
        g_v = g_v * growth + tl.where(given >= 1.1754943508222875e-38, g_m * 0.5 * b / std, 0.0)
    if PROCESS and not NETWORK:
        tl.store(d_first + i, g_v * growth, mask=inside)
    tl.store(one, 1)
    tl.store(d_given_mean + i, g_m, mask=inside)
    tl.store(d_given_var + i, g_v, mask=inside)


class Inputs(NamedTuple):
    """The vectors of a KN layer with weight and bias, and of its prior: float32, shape (C,) or (1, C).

    Attributes:
        measured_mean, measured_var: None if nothing is measured.
        given_mean, given_var: the prior before the process model.
        first, second: ``mean_offset`` and ``log_var_scale``, or ``process_noise`` and None, or None.
        logit, scale: of the gain, of one element.
        network: the variant.
    """

    measured_mean: Optional[Tensor]
    measured_var: Optional[Tensor]
    given_mean: Tensor
    given_var: Tensor
    first: Optional[Tensor]
    second: Optional[Tensor]
    logit: Tensor
    scale: Tensor
    network: bool

    def _arguments(self) -> Tuple:
        """For a kernel: pointers (of anything where there is nothing to read), and switches."""
        pointers = [self.given_mean if v is None else v for v in self[:-1]]
        block = triton.next_power_of_2(self.given_mean.numel())
        switches = dict(
            NETWORK=self.network,
            PROCESS=self.first is not None,
            MEASURING=self.measured_mean is not None,
            BLOCK=block,
            # 4 channels to a thread, so that all of them stay in registers.
            num_warps=min(max(block // 128, 4), 32),
        )
        return pointers, switches


def filter_forward(
    inputs: Inputs,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    running: Optional[Tuple[Tensor, Tensor, Tensor]],
    momentum: Optional[float],
    count: int,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`~.functional.process`, ``gate``, ``update``, and the tracking of the posterior.

    Args:
        inputs, weight, bias, eps: of the layer.
        running: ``running_mean``, ``running_var`` and ``num_batches_tracked``, updated in place as
            by ``KalmanNorm2d``, or None.
        momentum: of the layer.
        count: the number of values per channel.

    Returns:
        The posterior's mean, 1 / sqrt(var + eps) and weight / sqrt(var + eps), of shape (C,), and
        mean and var of the belief to pass on, of shape (1, C).
    """
    pointers, switches = inputs._arguments()
    channels = weight.numel()
    mean, inv_std, scale = weight.new_empty(3, channels).unbind()
    belief_mean, belief_var = weight.new_empty(1, channels), weight.new_empty(1, channels)
    _filter_forward[(1,)](
        *(*pointers, weight, bias, *(running or pointers[:3])),
        *(mean, inv_std, scale, belief_mean, belief_var, channels, eps),
        *(0.0 if momentum is None else momentum, 1.0 / max(count - 1, 1)),
        TRACK=running is not None,
        CUMULATIVE=momentum is None,
        **switches,
    )
    return mean, inv_std, scale, belief_mean, belief_var


def filter_backward(
    inputs: Inputs,
    weight: Tensor,
    inv_std: Tensor,
    dy_x: Tensor,
    dy_sum: Tensor,
    d_belief_mean: Optional[Tensor],
    d_belief_var: Optional[Tensor],
    count: int,
) -> Tuple[Tensor, ...]:
    """The gradients of all vectors, from the sums over the features and those of the belief.

    Returns:
        Gradients of given mean and var, (1, C); of first and second; of the logit; of weight and
        bias; and what the gradient of the features takes: slope and offset of
        :func:`~.passes.input_gradient` for the paper's variant, b, a and one of
        :func:`~.passes.network_gradient` for the network variant.
    """
    pointers, switches = inputs._arguments()
    channels = weight.numel()
    d_given_mean, d_given_var = weight.new_empty(1, channels), weight.new_empty(1, channels)
    vectors = [torch.empty_like(weight) for _ in range(6)]
    d_first, d_second, d_weight, d_bias, slope, offset = vectors
    d_logit, one = torch.empty_like(inputs.logit), weight.new_empty(1, dtype=torch.int32)
    d_beliefs = [None if v is None else v.contiguous() for v in (d_belief_mean, d_belief_var)]
    _filter_backward[(1,)](
        *(*pointers, weight, inv_std, dy_x, dy_sum),
        *(weight if v is None else v for v in d_beliefs),
        *(d_given_mean, d_given_var, d_first, d_second, d_logit, d_weight, d_bias),
        *(slope, offset, one, channels, float(count)),
        HAS_MEAN=d_belief_mean is not None,
        HAS_VAR=d_belief_var is not None,
        **switches,
    )
    d_given = d_given_mean, d_given_var
    return *d_given, d_first, d_second, d_logit, d_weight, d_bias, slope, offset, one
