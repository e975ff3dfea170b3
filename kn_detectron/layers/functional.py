"""The arithmetic of Kalman Normalization: measure, update (Eq. 7), normalise.

Rows are batches or images: a batch is one row of C channels, GroupNorm's statistics are N rows of
G groups. Statistics are computed in float32 (float64 for float64 features) whatever the dtype of
the features: in float16 x^2 overflows at 256 and E[x^2] - E[x]^2 loses everything.
"""

from typing import NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import passes
from .belief import Belief
from .passes import Layout, statistics_dtype

__all__ = [
    "filter_batch",
    "fold_groups",
    "gate",
    "group_belief",
    "measure",
    "measure_groups",
    "normalize",
    "process",
    "unfold_groups",
    "update",
]


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
    return Belief(*passes.moments_together(mean, var, 2))


def process(
    prior: Belief,
    mean_offset: Optional[Tensor] = None,
    log_var_scale: Optional[Tensor] = None,
    process_noise: Optional[Tensor] = None,
) -> Belief:
    """The process model: the learned correction of a prior.

    ::

        mean + mean_offset sqrt(var)        var exp(log_var_scale) + softplus(process_noise)

    Args:
        prior: shape (1, C) or (N, C).
        mean_offset, log_var_scale: of the network variant, shape (C,), or None for 0.
        process_noise: of the paper's variant, shape (C,), or None for nothing.
    """
    mean, var = prior
    if process_noise is not None:
        var = var + F.softplus(process_noise.to(var.dtype))
    if mean_offset is not None:
        std = var.clamp_min(torch.finfo(var.dtype).tiny).sqrt()
        mean = torch.addcmul(mean, mean_offset.to(mean.dtype), std)
        var = var * log_var_scale.to(var.dtype).exp()
    return Belief(mean, var)


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
    dtype = measurement.mean.dtype
    prior, gain = Belief(*(v.to(dtype) for v in prior)), gain.to(dtype)
    mean = torch.lerp(prior.mean, measurement.mean, gain)
    var = torch.lerp(prior.var, measurement.var, gain)
    if mixture:
        innovation = measurement.mean - prior.mean
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


def fold_groups(x: Tensor, groups: int) -> Tensor:
    """Puts G micro-batches of consecutive images side by side, as channels of one batch.

    What treats channels apart then treats micro-batches apart.

    Args:
        x: features of shape (G m, C, H, W).
        groups: G.

    Returns:
        Tensor: of shape (m, G C, H, W), the channels of the first group first; a view of a
        contiguous ``x`` if m = 1.
    """
    images, channels, height, width = x.shape
    x = x.reshape(groups, images // groups, channels, height, width).transpose(0, 1)
    return x.reshape(images // groups, groups * channels, height, width)


def unfold_groups(x: Tensor, groups: int) -> Tensor:
    """Undoes :func:`fold_groups`."""
    images, channels, height, width = x.shape
    x = x.reshape(images, groups, channels // groups, height, width).transpose(0, 1)
    return x.reshape(groups * images, channels // groups, height, width)


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


class _Options(NamedTuple):
    """What _FilterAndNormalize takes besides tensors; see filter_batch."""

    layout: Layout
    eps: float
    measuring: bool
    mixture: bool
    limit: Optional[float]
    passes_on_y: bool  # the belief about y instead of the posterior


class _FilterAndNormalize(torch.autograd.Function):
    """:func:`measure`, :func:`process`, :func:`gate`, :func:`update`, :func:`normalize` in one node.

    Composed of their own nodes they keep several tensors of the size of x and pass over it three
    times more in the backward. This keeps x and vectors. Forward, x is read twice and y written
    once; backward, x and dy are read twice and dx is written once (and once more, with a reading,
    for want of an operator: see :mod:`kn_detectron.layers.passes`).

    With s = 1/sqrt(var + eps), n values per set, and the sums over each set g_b = sum weight dy and
    g_w = sum weight dy (x - mean) s, the gradients of the posterior are::

        d_mean = -s g_b              d_var = -1/2 s^2 g_w

    plus those that come down the chain. They reach x through the measurement, whose share is q::

        dx = dy weight s + q d_mean / n + 2 q d_var (x - mean_measured) / n

    (with the mixture term, q d_mean + 2 p q (mean_measured - mean_prior) d_var for q d_mean).
    """

    @staticmethod
    def forward(
        ctx,
        x,
        given_mean,
        given_var,
        mean_offset,
        log_var_scale,
        process_noise,
        gain,
        weight,
        bias,
        options,
    ):
        layout = options.layout
        measured, prior, fits = (None, None), (None, None), None
        if given_mean is not None:
            prior = Belief(given_mean, given_var)
            prior = posterior = process(prior, mean_offset, log_var_scale, process_noise)
        if options.measuring:
            measured = Belief(*layout.moments(x))
            if given_mean is None:
                posterior = measured
            else:
                if options.limit is not None:
                    fits = _fits(prior, measured, options.limit)
                    prior = gate(prior, measured, options.limit)
                posterior = update(prior, measured, gain, options.mixture)
        mean, var = posterior
        inv_std = (var + options.eps).rsqrt()
        scale = layout.spread(inv_std, x)
        if weight is not None:
            scale = scale * layout.repeat(weight, x)
        center, shift = layout.spread(mean, x), layout.repeat(bias, x)
        y = layout.run(passes.transform, x, center, scale, shift)
        ctx.options = options
        ctx.save_for_backward(
            *(x, weight, bias, inv_std, center, scale, *measured, *prior, fits, gain),
            *(given_var, mean_offset, log_var_scale, process_noise),
        )
        if not passes.is_compiling():  # which does not know it
            ctx.set_materialize_grads(False)
        if options.passes_on_y:
            belief = bias.to(mean.dtype, copy=True)[None], weight.to(mean.dtype).square()[None]
            constants = mean, var
        else:
            belief, constants = (mean.clone(), var.clone()), ()
        if options.measuring:
            # As the posterior of a head it may be an output already.
            constants += (measured.var.clone() if given_mean is None else measured.var,)
        ctx.mark_non_differentiable(*constants)
        return y, *belief, *constants

    @staticmethod
    def backward(ctx, dy, d_belief_mean, d_belief_var, *_):
        x, weight, bias, inv_std, center, scale, *saved = ctx.saved_tensors
        measured_mean, measured_var, *saved = saved
        prior_mean, prior_var, fits, gain, given_var, *model = saved
        options, layout = ctx.options, ctx.options.layout
        if dy is None:
            dy = torch.zeros_like(x)

        # Where nothing is measured that is all there is to dx.
        dx, dy_x, dy_sum = layout.run(
            passes.gradient_sums, dy, x, center, scale, not options.measuring
        )
        d_mean = layout.total(scale * dy_sum, x).neg()
        d_var = layout.total(scale * dy_x, x) * inv_std.square() * -0.5
        d_weight = d_bias = None
        if weight is not None:
            d_weight = layout.collect(dy_x * layout.spread(inv_std, x), x).to(weight.dtype)
        if bias is not None:
            d_bias = layout.collect(dy_sum, x).to(bias.dtype)
        if options.passes_on_y:
            if d_belief_mean is not None:
                d_bias = d_bias + d_belief_mean[0].to(d_bias.dtype)
            if d_belief_var is not None:
                d_square = d_belief_var[0].to(d_weight.dtype)
                d_weight = torch.addcmul(d_weight, d_square, weight, value=2)
        else:
            if d_belief_mean is not None:
                d_mean = d_mean + d_belief_mean
            if d_belief_var is not None:
                d_var = d_var + d_belief_var

        d_prior, d_gain, d_model = (None, None), None, (None, None, None)
        if prior_mean is None:
            d_measured = d_mean, d_var
        elif not options.measuring:
            d_prior, d_gain = (d_mean, d_var), None if gain is None else torch.zeros_like(gain)
        else:
            measured, prior = Belief(measured_mean, measured_var), Belief(prior_mean, prior_var)
            d_prior, d_measured, d_gain = _update_backward(
                d_mean, d_var, prior, measured, fits, gain, options.mixture
            )
        if given_var is not None:
            d_prior, d_model = _process_backward(*d_prior, given_var, prior_var, *model)

        if options.measuring:
            count = x.numel() // inv_std.numel()
            dx = layout.run(
                passes.input_gradient,
                *(dy, x, scale, layout.spread(measured_mean, x)),
                layout.spread(d_measured[1] * (2.0 / count), x),
                layout.spread(d_measured[0] * (1.0 / count), x),
            )
        return dx, *d_prior, *d_model, d_gain, d_weight, d_bias, None


def _update_backward(d_mean, d_var, prior, measured, fits, gain, mixture):
    """The gradients of gate and update: of prior, measurement and gain."""
    innovation = measured.mean - prior.mean
    d_gain = torch.addcmul(d_mean * innovation, d_var, measured.var - prior.var)
    m_mean, m_var = gain * d_mean, gain * d_var
    p_mean, p_var = d_mean - m_mean, d_var - m_var
    if mixture:
        d_gain = d_gain + d_var * (1 - 2 * gain) * innovation.square()
        through_mixture = 2 * (1 - gain) * m_var * innovation
        p_mean, m_mean = p_mean - through_mixture, m_mean + through_mixture
    if fits is not None:  # what stands in for a dropped prior is the measurement
        m_mean = torch.where(fits, m_mean, m_mean + p_mean)
        m_var = torch.where(fits, m_var, m_var + p_var)
        p_mean, p_var = (torch.where(fits, g, 0.0) for g in (p_mean, p_var))
    return (p_mean, p_var), (m_mean, m_var), d_gain.sum()


def _process_backward(
    d_mean, d_var, given_var, prior_var, mean_offset, log_var_scale, process_noise
):
    """The gradients of :func:`process`: of the prior it was given, and of its parameters.

    With v the variance that it was given::

        d_mean_offset = d_mean sqrt(v)              d_log_var_scale = d_var v exp(log_var_scale)
        d_v = d_var exp(log_var_scale) + 1/2 d_mean mean_offset / sqrt(v)
    """
    d_offset = d_scale = d_noise = None
    if process_noise is not None:
        d_noise = _over_rows(d_var * process_noise.to(d_var.dtype).sigmoid()).to(
            process_noise.dtype
        )
    if mean_offset is not None:
        d_offsets = d_mean * given_var.sqrt()
        d_offset = _over_rows(d_offsets).to(mean_offset.dtype)
        d_scale = _over_rows(d_var * prior_var).to(log_var_scale.dtype)
        d_var = torch.addcdiv(
            d_var * log_var_scale.to(d_var.dtype).exp(),
            d_offsets * mean_offset.to(d_var.dtype),
            given_var.clamp_min(torch.finfo(given_var.dtype).tiny),
            value=0.5,
        )
    rows = given_var.shape[0]
    if d_mean.shape[0] > rows:  # one prior for all of them
        d_mean, d_var = d_mean.sum(0, keepdim=True), d_var.sum(0, keepdim=True)
    return (d_mean, d_var), (d_offset, d_scale, d_noise)


def _over_rows(v: Tensor) -> Tensor:
    return v[0] if v.shape[0] == 1 else v.sum(0)


def filter_batch(
    x: Tensor,
    prior: Optional[Belief],
    gain: Optional[Tensor],
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    eps: float,
    *,
    layout: Layout,
    model: Sequence[Optional[Tensor]] = (None, None, None),
    mixture: bool = False,
    limit: Optional[float] = None,
    measuring: bool = True,
    passes_on_y: bool = False,
) -> Tuple[Tensor, Belief, Belief, Optional[Tensor]]:
    """Measures features, updates the prior and normalises, at about BatchNorm's time and memory.

    The same as :func:`measure`, :func:`process`, :func:`gate` (if there is a ``limit``),
    :func:`update` and :func:`normalize` one after the other, in one node of the graph.

    Args:
        x: features of shape (N, C, H, W), not empty.
        prior: a row, or one for each of the layout's, with a number for each of its groups; None for
            the measurement alone.
        gain: q, a tensor of one element; None if there is no prior.
        weight, bias, eps: as for :func:`normalize`.
        layout: which pixels share statistics.
        model: the parameters of :func:`process`.
        mixture: as for :func:`update`.
        limit: as for :func:`gate`.
        measuring: False takes the prior for the posterior, whatever x is.
        passes_on_y: whether the belief to pass on is that about y (see
            :func:`~kn_detectron.layers.belief.normalized`) instead of the posterior. There must be a
            weight and a bias.

    Returns:
        y, the belief to pass on, the posterior, and the measured variance or None. The last two are
        without gradient, unless the posterior is what is passed on.
    """
    options = _Options(layout, eps, measuring, mixture, limit, passes_on_y)
    mean, var = (None, None) if prior is None else prior
    y, *results = _FilterAndNormalize.apply(x, mean, var, *model, gain, weight, bias, options)
    belief = Belief(*results[:2])
    posterior = Belief(*results[2:4]) if passes_on_y else belief
    return y, belief, posterior, results[-1] if measuring else None
