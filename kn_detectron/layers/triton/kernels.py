"""The arithmetic on vectors of channels in Triton: one launch instead of dozens of tiny operations.

Each class computes on float32 vectors what the class of the same name in
:mod:`~kn_detectron.layers.belief` or :mod:`~kn_detectron.layers.filter_gradient` computes with
torch's operators. The class with torch's operators is the reference, and runs wherever the kernels
cannot.
``variant`` tells which compiled form of the kernels a call would launch. It returns None if no form
fits the call.
"""

import functools
import math
from typing import Callable, Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import passes
from ..belief import Belief
from ..filter import GATE_LIMIT, Running, Spec, Vectors
from ..filter_gradient import Gradients, Statistics
from . import tensors_in

__all__ = ["Convolve", "Filter", "Rectify"]

_BLOCK = 1024  # channels for each program of the ReLU's kernels
_ROWS, _COLUMNS = 4, 256  # the part of a filter that a program of _predict_forward reads at once
_BACK_ROWS, _BACK_COLUMNS, _BACK_WARPS = 256, 16, 8  # the same for _predict_backward

# The kernels of a filter hold all channels of a layer in registers. These do not last for 4096 on
# every GPU.
LARGEST_CHANNELS = 2048

_GATE_LIMIT = tl.constexpr(GATE_LIMIT)


ALIGNED = 16


def kind_of_size(size: int) -> int:
    """What of a size changes the compiled form of a kernel: 0 for a size of 1, else gcd(size, 16).

    Triton compiles a kernel anew for sizes that are multiples of 16, and for those of 1. A size times
    the taps of a filter is a multiple of 16 or not whatever the rest of the size is.
    """
    return 0 if size == 1 else math.gcd(size, ALIGNED)


def _on_their_device(launch: Callable) -> Callable:
    """Makes a function launch on the device of its tensors. Triton launches on the current one."""

    @functools.wraps(launch)
    def on_their_device(*arguments):
        with torch.cuda.device_of(next(tensors_in(arguments))):
            return launch(*arguments)

    return on_their_device


@triton.jit
def _rectified(m, v):
    """The quantities of belief.Rectify: mean, var, cdf(a), cdf(-a) and pdf(a) / s, to |a| = 40.

    erfcx(z) is t exp(p(t)) with t = 2 / (2 + z). The polynomial p was fitted to it, with a relative
    error of 4e-7 in float32.
    """
    std = tl.sqrt(v)
    # tl.minimum and tl.maximum would hide a mean that is NaN.
    z = tl.abs(m) / tl.maximum(std * 1.4142135623730951, 1.1754943508222875e-38)
    z = tl.where(z > 28.0, 28.0, z)
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
    mean = tl.where(m < 0, 0.0, m) + std * h
    share = cdf - h * (h + 1.4142135623730951 * z)
    var = v * tl.where(share < 0.0, 0.0, share)
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


class Rectify:
    """Triton's :class:`kn_detectron.layers.belief.Rectify`."""

    @staticmethod
    def variant(mean: Tensor, var: Tensor) -> Optional[Tuple]:
        """The size as Triton sees it."""
        return (kind_of_size(mean.numel()),)

    @staticmethod
    @_on_their_device
    def forward(mean: Tensor, var: Tensor) -> Tuple[Tuple[Tensor, Tensor], Tuple[Tensor, ...]]:
        """The moments behind the ReLU, and the first arguments of :meth:`backward`."""
        mean, var = mean.contiguous(), var.contiguous()
        out_mean, out_var = torch.empty_like(mean), torch.empty_like(var)
        grid = (triton.cdiv(mean.numel(), _BLOCK),)
        _relu_forward[grid](mean, var, out_mean, out_var, mean.numel(), BLOCK=_BLOCK)
        return (out_mean, out_var), (mean, var)

    @staticmethod
    @_on_their_device
    def backward(
        mean: Tensor, var: Tensor, d_out_mean: Tensor, d_out_var: Tensor
    ) -> Tuple[Tensor, Tensor]:
        """The gradients of :meth:`forward`."""
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
    # A program has some input channels with all of their taps, and goes through the filter's rows.
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


class Convolve:
    """Triton's :class:`kn_detectron.layers.belief.Convolve`."""

    @staticmethod
    def variant(mean: Tensor, var: Tensor, weight: Tensor, groups: int) -> Optional[Tuple]:
        """Taps, outputs and inputs, if the beliefs have one row and there are no groups."""
        if groups > 1 or mean.shape[0] != 1:  # a belief about no images has no rows
            return None
        return weight.shape[2:].numel(), *(kind_of_size(size) for size in weight.shape[:2])

    @staticmethod
    @_on_their_device
    def forward(
        mean: Tensor, var: Tensor, weight: Tensor, groups: int = 1
    ) -> Tuple[Tensor, Tensor]:
        """The moments behind the convolution, shape (1, C_out)."""
        mean, var, weight = mean.contiguous(), var.contiguous(), weight.contiguous()
        outputs, inputs, taps = weight.shape[0], weight.shape[1], weight.shape[2:].numel()
        out_mean, out_var = mean.new_empty(1, outputs), var.new_empty(1, outputs)
        _predict_forward[(triton.cdiv(outputs, _ROWS),)](
            *(mean, var, weight, out_mean, out_var, outputs, inputs * taps),
            TAPS=taps,
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
        )
        return out_mean, out_var

    @staticmethod
    @_on_their_device
    def backward(
        mean: Tensor,
        var: Tensor,
        weight: Tensor,
        d_out_mean: Tensor,
        d_out_var: Tensor,
        groups: int = 1,
    ) -> Tuple[Tensor, Tensor, Tensor]:
        """The gradients of :meth:`forward`."""
        given = [v.contiguous() for v in (mean, var, weight, d_out_mean, d_out_var)]
        outputs, inputs, taps = weight.shape[0], weight.shape[1], weight.shape[2:].numel()
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
    prior_mean,
    prior_var,
    gain_logit,
    gain_scale,
    mean_offset,
    log_var_scale,
    process_noise,
    measured_mean,
    measured_var,
    channels,
    eps,
    PAPER: tl.constexpr,
    PROCESS: tl.constexpr,
    MEASURES: tl.constexpr,
):
    """The part of filter.filter_belief up to the posterior, for forward and backward.

    Returns sigmoid(gain_logit) and the gain; the prior behind process model and gate; the
    measurement; the posterior and its invstd; the std of the given prior; the derivative of the
    processed variance (exp(r), or the slope of the softplus); and whether the prior was kept.
    """
    sigmoid = 1.0 / (1.0 + tl.exp(-tl.load(gain_logit)))
    q = tl.load(gain_scale) * sigmoid
    m = tl.load(prior_mean + i, mask=inside, other=0.0)
    v = tl.load(prior_var + i, mask=inside, other=1.0)
    std = tl.sqrt(tl.maximum(v, 1.1754943508222875e-38))
    growth = std
    if PROCESS and not PAPER:
        m = m + tl.load(mean_offset + i, mask=inside, other=0.0) * std
        growth = tl.exp(tl.load(log_var_scale + i, mask=inside, other=0.0))
        v = v * growth
    if PROCESS and PAPER:
        noise = tl.load(process_noise + i, mask=inside, other=0.0)
        # softplus, and its slope, without overflow
        v = v + tl.maximum(noise, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(noise)))
        growth = 1.0 / (1.0 + tl.exp(-noise))
    x_m, x_v, fits = m, v, m == m
    if MEASURES:
        x_m = tl.load(measured_mean + i, mask=inside, other=0.0)
        x_v = tl.load(measured_var + i, mask=inside, other=1.0)
    if MEASURES and PAPER:
        ratio = tl.where(v == x_v, 1.0, v / x_v)  # 1 for 0 / 0
        ratio = tl.sum(tl.where(inside, ratio, 0.0), 0) / channels
        fits = (ratio < _GATE_LIMIT) | (ratio != ratio)
        m = tl.where(fits, m, x_m)
        v = tl.where(fits, v, x_v)
    post_m, post_v = m, v
    if MEASURES:
        post_m = m + q * (x_m - m)
        post_v = (1.0 - q) * v + q * x_v
        if PAPER:
            post_v = post_v + (1.0 - q) * q * (x_m - m) * (x_m - m)
    invstd = 1.0 / tl.sqrt(post_v + eps)
    return sigmoid, q, m, v, x_m, x_v, post_m, post_v, invstd, std, growth, fits


@triton.jit
def _filter_forward(
    prior_mean,
    prior_var,
    gain_logit,
    gain_scale,
    mean_offset,
    log_var_scale,
    process_noise,
    weight,
    bias,
    measured_mean,
    measured_var,
    running_mean,
    running_var,
    batches,
    mean,
    scale,
    belief_mean,
    belief_var,
    channels,
    eps,
    momentum,
    bessel,
    PAPER: tl.constexpr,
    PROCESS: tl.constexpr,
    MEASURES: tl.constexpr,
    TRACKS: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    AFFINE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.arange(0, BLOCK)
    inside = i < channels
    _, q, _, _, _, x_v, m, v, invstd, _, _, fits = _filtered(
        i,
        inside,
        prior_mean,
        prior_var,
        gain_logit,
        gain_scale,
        mean_offset,
        log_var_scale,
        process_noise,
        measured_mean,
        measured_var,
        channels,
        eps,
        PAPER,
        PROCESS,
        MEASURES,
    )
    w, b = tl.full((BLOCK,), 1.0, tl.float32), tl.full((BLOCK,), 0.0, tl.float32)
    if AFFINE:
        w = tl.load(weight + i, mask=inside, other=0.0)
        b = tl.load(bias + i, mask=inside, other=0.0)
    tl.store(mean + i, m, mask=inside)
    tl.store(scale + i, w * invstd, mask=inside)
    if PAPER:
        tl.store(belief_mean + i, m, mask=inside)
        tl.store(belief_var + i, v, mask=inside)
    else:
        tl.store(belief_mean + i, b, mask=inside)
        tl.store(belief_var + i, w * w, mask=inside)
    if TRACKS:
        if MEASURES:
            v = v + tl.where(fits, q, 1.0) * x_v * bessel
        # In front of the sum, behind which all threads have read it: one of them writes it then.
        count = tl.load(batches)
        r_m = tl.load(running_mean + i, mask=inside, other=0.0)
        r_v = tl.load(running_var + i, mask=inside, other=0.0)
        if MEASURES:  # otherwise there is nothing random to average out
            rate = 1.0 * momentum
            if CUMULATIVE:
                rate = 1.0 / (count + 1).to(tl.float32)
            m = r_m * (1.0 - rate) + m * rate
            v = r_v * (1.0 - rate) + v * rate
        m = m.to(running_mean.dtype.element_ty)
        v = v.to(running_var.dtype.element_ty)
        # If a number is NaN or infinite, so is the sum.
        total = tl.sum(tl.where(inside, m.to(tl.float32) + v.to(tl.float32), 0.0), 0)
        finite = tl.abs(total) < float("inf")
        tl.store(batches, count + finite.to(tl.int64))
        tl.store(running_mean + i, tl.where(finite, m, r_m), mask=inside)
        tl.store(running_var + i, tl.where(finite, v, r_v), mask=inside)


# The number of pixels, which differs from image to image, is only handed on.
@triton.jit(do_not_specialize=["count"])
def _filter_backward(
    prior_mean,
    prior_var,
    gain_logit,
    gain_scale,
    mean_offset,
    log_var_scale,
    process_noise,
    weight,
    bias,
    measured_mean,
    measured_var,
    sum_dy,
    sum_dy_xmu,
    d_belief_mean,
    d_belief_var,
    d_prior_mean,
    d_prior_var,
    d_gain_logit,
    d_mean_offset,
    d_log_var_scale,
    d_process_noise,
    d_weight,
    d_bias,
    factor,
    of_mean,
    of_var,
    count_of_pass,
    channels,
    eps,
    count,
    PAPER: tl.constexpr,
    PROCESS: tl.constexpr,
    MEASURES: tl.constexpr,
    AFFINE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.arange(0, BLOCK)
    inside = i < channels
    sigmoid, q, m, v, x_m, x_v, _, _, invstd, std, growth, fits = _filtered(
        i,
        inside,
        prior_mean,
        prior_var,
        gain_logit,
        gain_scale,
        mean_offset,
        log_var_scale,
        process_noise,
        measured_mean,
        measured_var,
        channels,
        eps,
        PAPER,
        PROCESS,
        MEASURES,
    )
    w = tl.full((BLOCK,), 1.0, tl.float32)
    if AFFINE:
        w = tl.load(weight + i, mask=inside, other=0.0)
    s_dy = tl.load(sum_dy + i, mask=inside, other=0.0)
    s_dy_xmu = tl.load(sum_dy_xmu + i, mask=inside, other=0.0)
    b_m = tl.load(d_belief_mean + i, mask=inside, other=0.0)
    b_v = tl.load(d_belief_var + i, mask=inside, other=0.0)
    # The gradients of the posterior, the weight and the bias.
    g_m = -w * invstd * s_dy
    g_v = -0.5 * w * invstd * invstd * invstd * s_dy_xmu
    g_w = s_dy_xmu * invstd
    g_b = s_dy
    if PAPER:
        g_m += b_m
        g_v += b_v
    else:
        g_w += 2.0 * w * b_v
        g_b += b_m
    if AFFINE:
        tl.store(d_weight + i, g_w, mask=inside)
        tl.store(d_bias + i, g_b, mask=inside)

    g_q = tl.zeros((BLOCK,), tl.float32)
    if MEASURES:
        innovation = x_m - m
        g_q = g_m * innovation + g_v * (x_v - v)
        x_g_m, x_g_v = q * g_m, q * g_v
        p_g_m, p_g_v = g_m - x_g_m, g_v - x_g_v
        if PAPER:
            g_q += g_v * (1.0 - 2.0 * q) * innovation * innovation
            through_mixture = 2.0 * (1.0 - q) * x_g_v * innovation
            p_g_m -= through_mixture
            x_g_m += through_mixture
            # The measurement stands in for a dropped prior, and gets its gradient.
            x_g_m = tl.where(fits, x_g_m, x_g_m + p_g_m)
            x_g_v = tl.where(fits, x_g_v, x_g_v + p_g_v)
            p_g_m = tl.where(fits, p_g_m, 0.0)
            p_g_v = tl.where(fits, p_g_v, 0.0)
            tl.store(factor + i, w * invstd, mask=inside)
            tl.store(of_mean + i, x_g_m, mask=inside)
            tl.store(of_var + i, x_g_v, mask=inside)
        else:
            tl.store(factor + i, invstd, mask=inside)
            tl.store(of_mean + i, q * s_dy, mask=inside)
            tl.store(of_var + i, q * s_dy_xmu, mask=inside)
            tl.store(count_of_pass, count)
        g_m, g_v = p_g_m, p_g_v
    d_gain = tl.sum(tl.where(inside, g_q, 0.0), 0)
    tl.store(d_gain_logit, d_gain * tl.load(gain_scale) * sigmoid * (1.0 - sigmoid))
    if PROCESS and not PAPER:
        tl.store(d_mean_offset + i, g_m * std, mask=inside)
        tl.store(d_log_var_scale + i, g_v * v, mask=inside)
        before = tl.load(prior_var + i, mask=inside, other=1.0)
        offset = tl.load(mean_offset + i, mask=inside, other=0.0)
        through_std = tl.where(before >= 1.1754943508222875e-38, g_m * 0.5 * offset / std, 0.0)
        g_v = g_v * growth + through_std
    if PROCESS and PAPER:
        tl.store(d_process_noise + i, g_v * growth, mask=inside)
    tl.store(d_prior_mean + i, g_m, mask=inside)
    tl.store(d_prior_var + i, g_v, mask=inside)


class Filter:
    """Triton's :class:`kn_detectron.layers.filter_gradient.Filter`."""

    @staticmethod
    def variant(
        v: Vectors, measured: Optional[Belief], spec: Spec, running: Optional[Running], count: int
    ) -> Optional[Tuple]:
        """The kind of layer, if it has BatchNorm's sets and a prior of one row."""
        sets = spec.sets
        fits = sets.is_batch and v.prior_mean is not None
        if not fits or v.prior_mean.shape[0] != 1 or sets.channels > LARGEST_CHANNELS:
            return None
        has_process_model = v.mean_offset is not None or v.process_noise is not None
        tracks = "no" if running is None else "cumulative" if running.momentum is None else "yes"
        block = triton.next_power_of_2(sets.channels)
        has_scale, is_aligned = v.weight is not None, kind_of_size(sets.channels) == ALIGNED
        return spec.paper, has_process_model, has_scale, spec.measures, tracks, block, is_aligned

    @staticmethod
    def _arguments(v: Vectors, measured: Optional[Belief], spec: Spec):
        """The pointers and switches of a launch. The pointer of a missing tensor is not read."""
        tensors = (*v, *(measured or (None, None)))
        pointers = [(v.prior_mean if t is None else t).contiguous() for t in tensors]
        block = triton.next_power_of_2(spec.sets.channels)
        switches = dict(
            PAPER=spec.paper,
            PROCESS=v.mean_offset is not None or v.process_noise is not None,
            MEASURES=spec.measures,
            AFFINE=v.weight is not None,
            BLOCK=block,
            # A thread has 4 channels, which stay in registers.
            num_warps=min(max(block // 128, 4), 32),
        )
        return pointers, switches

    @staticmethod
    @_on_their_device
    def forward(
        v: Vectors, measured: Optional[Belief], spec: Spec, running: Optional[Running], count: int
    ) -> Tuple[Statistics, None]:
        """Filters what was measured, and updates the moving statistics.

        The second result is None, because :meth:`backward` computes the filter anew.
        """
        pointers, switches = Filter._arguments(v, measured, spec)
        channels = spec.sets.channels
        new = v.prior_mean.new_empty
        mean, scale = new(channels), new(channels)
        belief = Belief(new(1, channels), new(1, channels))
        unused = pointers[0], pointers[0], pointers[0], 0.0
        *statistics, momentum = unused if running is None else running
        _filter_forward[(1,)](
            *(*pointers, *statistics, mean, scale, *belief, channels, spec.eps),
            *(0.0 if momentum is None else momentum, 1.0 / max(count - 1, 1)),
            TRACKS=running is not None,
            CUMULATIVE=momentum is None,
            **switches,
        )
        if running is not None:
            # Else autograd would not see that a backward pass in evaluation needs the old values.
            for changed in statistics:  # one by one, as torch 2.3 takes them
                torch.autograd.graph.increment_version(changed)
        return Statistics(mean, scale, belief), None

    @staticmethod
    @_on_their_device
    def backward(
        kept: None,
        v: Vectors,
        measured: Optional[Belief],
        spec: Spec,
        sums: Tuple[Tensor, Tensor],
        d_belief: Tuple[Optional[Tensor], Optional[Tensor]],
        count: int,
    ) -> Gradients:
        """The gradients of the vectors, and the pass that computes dx."""
        pointers, switches = Filter._arguments(v, measured, spec)
        d_belief = [torch.zeros_like(v.prior_mean) if d is None else d for d in d_belief]
        d_vectors = Vectors(*(None if t is None else torch.empty_like(t) for t in v))
        d_vectors = d_vectors._replace(gain_scale=None)
        written = [
            v.prior_mean if t is None else t
            for name, t in zip(Vectors._fields, d_vectors)
            if name != "gain_scale"
        ]
        factor, of_mean, of_var = (v.prior_mean.new_empty(spec.sets.channels) for _ in range(3))
        count_of_pass = torch.empty(1, dtype=torch.int32, device=v.prior_mean.device)
        _filter_backward[(1,)](
            *(*pointers, *sums, *(d.contiguous() for d in d_belief), *written),
            *(factor, of_mean, of_var, count_of_pass, spec.sets.channels, spec.eps, count),
            **switches,
        )
        if not spec.measures:
            return Gradients(d_vectors)
        mean = measured.mean[0]
        if spec.paper:
            return Gradients(
                d_vectors, passes.input_gradient, (factor, mean, of_mean, of_var, count)
            )
        # Only y depends on the posterior, so dx is BatchNorm's with its sums times the gain.
        vectors = mean, factor, v.weight, of_mean, of_var, count_of_pass
        return Gradients(d_vectors, passes.batch_norm_gradient, vectors)
