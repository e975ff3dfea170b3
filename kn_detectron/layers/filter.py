"""The Kalman filter of a layer: process model, gate, update (Eq. 7), and the belief behind it.

The functions are plain differentiable torch on vectors of channels, and never see features. They
are the reference for Triton's kernels. A belief has one row for a batch, one row for each
micro-batch, or one row for each image for GroupNorm's statistics
(:class:`~kn_detectron.layers.sets.Sets`).
"""

from typing import NamedTuple, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from .belief import Belief, normalized
from .passes import pooled_moments
from .sets import Sets

__all__ = [
    "GATE_LIMIT",
    "Filtered",
    "Running",
    "Spec",
    "Vectors",
    "filter_belief",
    "gate",
    "group_belief",
    "process",
    "track",
    "update",
]

# The released code drops a prior if the mean of var_prior / var_measured over channels is this.
GATE_LIMIT = 100.0


class Vectors(NamedTuple):
    """The small tensors of a layer, all in the dtype of the statistics.

    Attributes:
        prior_mean, prior_var: the prediction, shape (1, C) or (rows, C). For the head of a chain
            these and the next five are None.
        gain_logit, gain_scale: scalars; the gain is ``gain_scale * sigmoid(gain_logit)``.
        mean_offset, log_var_scale: process model of the network variant, shape (C,), or None.
        process_noise: process model of the paper variant, shape (C,), or None.
        weight, bias: scale and shift, shape (C,), or None, both of them, for 1 and 0.
    """

    prior_mean: Optional[Tensor] = None
    prior_var: Optional[Tensor] = None
    gain_logit: Optional[Tensor] = None
    gain_scale: Optional[Tensor] = None
    mean_offset: Optional[Tensor] = None
    log_var_scale: Optional[Tensor] = None
    process_noise: Optional[Tensor] = None
    weight: Optional[Tensor] = None
    bias: Optional[Tensor] = None


class Spec(NamedTuple):
    """The settings of a layer's filter.

    Attributes:
        sets: which pixels share statistics.
        eps: added to the variance.
        paper: whether it is the paper variant, with gate and mixture term as released.
        measures: whether the features are measured. If not, the posterior is the prior.
    """

    sets: Sets
    eps: float
    paper: bool
    measures: bool


class Running(NamedTuple):
    """The moving statistics of a layer, changed in place by :func:`track`.

    Attributes:
        mean, var: shape (C,).
        batches: the number of batches that were averaged, an integer tensor.
        momentum: the weight of a new batch; None for the average over all batches.
    """

    mean: Tensor
    var: Tensor
    batches: Tensor
    momentum: Optional[float]


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
        mean_offset, log_var_scale: b, r of the network variant (ours), shape (C,), or None for 0.
        process_noise: R of the paper (Eq. 7) before the softplus, shape (C,), or None for R = 0.
    """
    mean, var = prior
    if process_noise is not None:
        var = var + F.softplus(process_noise)
    if mean_offset is not None:
        std = var.clamp_min(torch.finfo(var.dtype).tiny).sqrt()
        mean = torch.addcmul(mean, mean_offset, std)
        var = var * log_var_scale.exp()
    return Belief(mean, var)


def group_belief(belief: Belief, groups: int) -> Belief:
    """The belief about a pixel of a group of channels (ours).

    By the law of total variance the group's variance is the mean of its channels' variances plus
    the variance of their means.

    Args:
        belief: about the channels, shape (N, C) or (1, C).
        groups: G, a divisor of C.

    Returns:
        Belief: of shape (N, G) or (1, G).
    """
    rows, channels = belief.mean.shape  # torch cannot infer a size of an empty belief
    if groups == channels:
        return belief
    mean, var = (v.reshape(rows, groups, channels // groups) for v in belief)
    return Belief(*pooled_moments(mean, var, 2))


def gate(prior: Belief, measured: Belief) -> Tuple[Belief, Tensor]:
    """Replaces a prior that is far too wide by the measurement (released code).

    A row of the prior is dropped if the mean over its channels of var_prior / var_measured reaches
    :data:`GATE_LIMIT`, as it does where one channel does not vary in the batch. The posterior of this
    row is then the measurement, whatever the gain is. Equal variances have the ratio 1, also where a
    channel varies in neither (ours): 0 / 0 would keep the prior of the whole row.

    Returns:
        The prior to use, and whether its rows are the given ones, shape (rows, 1).
    """
    ratio = torch.where(prior.var == measured.var, 1.0, (prior.var / measured.var).detach())
    fits = ~(ratio.mean(1, keepdim=True) >= GATE_LIMIT)
    return Belief(*(torch.where(fits, p, m) for p, m in zip(prior, measured))), fits


def update(prior: Belief, measured: Belief, gain: Tensor, mixture: bool = False) -> Belief:
    """Blends prior and measurement (Eq. 7): the posterior.

    With p = 1 - q::

        mean = p mean_prior + q mean_measured
        var  = p var_prior  + q var_measured  [+ p q (mean_measured - mean_prior)^2]

    The term in brackets makes ``var`` the variance of the mixture of the two. It is in the released
    code, but not in the paper.

    Args:
        prior: shape (1, G) or (N, G).
        measured: the same shape, or a shape that broadcasts with it.
        gain: q in [0, 1], a tensor of one element.
        mixture: whether to add the mixture term.
    """
    mean = torch.lerp(prior.mean, measured.mean, gain)
    var = torch.lerp(prior.var, measured.var, gain)
    if mixture:
        var = var + (1 - gain) * gain * (measured.mean - prior.mean).square()
    return Belief(mean, var)


class Filtered(NamedTuple):
    """The result of a layer's filter.

    Attributes:
        posterior: the statistics to normalise with, shape (rows, groups), or (1, groups) if nothing
            was measured and the prior has one row.
        invstd: 1 / sqrt(var + eps) of the posterior.
        belief: the belief to pass on, shape (1, C) or (rows, C).
        share: the weight of the measurement in the posterior, a number or shape (rows, 1). It is
            the gain, or 1 if there is no prior or the prior was dropped. If nothing was measured,
            it has no meaning.
    """

    posterior: Belief
    invstd: Tensor
    belief: Belief
    share: Union[float, Tensor] = 1.0


def filter_belief(v: Vectors, measured: Optional[Belief], spec: Spec) -> Filtered:
    """Filters the prior and the measurement of a layer (Eq. 7).

    Args:
        v: the layer's vectors.
        measured: the measured mean and biased variance of each set, shape (rows, groups), or None
            if nothing is measured. Then there must be a prior.
        spec: what kind of filter it is.
    """
    channel_prior, share = None, 1.0
    posterior = measured
    if v.prior_mean is not None:
        prior = Belief(v.prior_mean, v.prior_var)
        channel_prior = process(prior, v.mean_offset, v.log_var_scale, v.process_noise)
        posterior = group_belief(channel_prior, spec.sets.groups)
        if measured is not None:
            prior = posterior
            gain = share = v.gain_scale * v.gain_logit.sigmoid()
            if spec.paper:
                prior, fits = gate(prior, measured)
                share = torch.where(fits, gain, 1.0)
            posterior = update(prior, measured, gain, mixture=spec.paper)
        elif v.gain_logit is not None and v.gain_logit.requires_grad:
            # The gain gets a gradient of 0. DDP would take a missing one for an unused parameter.
            posterior = posterior._replace(mean=posterior.mean + 0.0 * v.gain_logit)
    invstd = (posterior.var + spec.eps).rsqrt()
    belief = _belief_behind(posterior, invstd, channel_prior, v, spec)
    return Filtered(posterior, invstd, belief, share)


def _belief_behind(
    posterior: Belief, invstd: Tensor, channel_prior: Optional[Belief], v: Vectors, spec: Spec
) -> Belief:
    """The belief to pass on.

    The paper variant passes on the posterior (Eq. 7). The network variant (ours) carries it through
    the normalisation itself. Behind normalisation per channel, the feature has mean ``bias`` and
    variance ``weight``^2. Behind normalisation by groups, channel c of group g keeps its own mean
    and variance::

        bias_c + weight_c (m_c - mean_g) / sqrt(var_g + eps)      weight_c^2 v_c / (var_g + eps)

    Here (m_c, v_c) is the prior behind the process model. The head of a chain has no prior, and its
    channels are taken to be alike.
    """
    channels = spec.sets.channels
    per_group = channels // spec.sets.groups

    def per_channel(values: Tensor) -> Tensor:
        return values if per_group == 1 else values.repeat_interleave(per_group, 1)

    if spec.paper:
        return Belief(*(per_channel(values) for values in posterior))
    if channel_prior is None or per_group == 1:
        if v.weight is None:
            mean = posterior.mean.new_zeros(1, channels)
            return Belief(mean, torch.ones_like(mean))
        return normalized(v.weight, v.bias)
    invstd = per_channel(invstd)
    mean = (channel_prior.mean - per_channel(posterior.mean)) * invstd
    var = channel_prior.var * invstd.square()
    if v.weight is None:
        return Belief(mean, var)
    return Belief(v.bias + v.weight * mean, v.weight.square() * var)


@torch.no_grad()
def track(running: Running, filtered: Filtered, measured: Optional[Belief], count: int) -> None:
    """Updates the moving statistics with a posterior, as BatchNorm does with its measurement.

    In ``running.var`` the measured part of the variance is unbiased, that is multiplied by
    n / (n - 1) with n = ``count``. The predicted part is not changed. The posteriors of
    micro-batches are averaged. If nothing was measured, the posterior is not random, and the
    statistics are set to it. If they would not be finite, as after NaN in the batch or beyond the
    range of half precision, nothing changes: otherwise one batch would spoil inference for good.
    """
    mean, var = filtered.posterior
    rate = running.momentum
    if measured is not None:
        var = var + measured.var * (filtered.share / max(count - 1, 1))
    mean, var = (t[0] if t.shape[0] == 1 else t.mean(0) for t in (mean, var))
    if rate is None:
        rate = 1.0 / (running.batches + 1).to(mean.dtype)
    if measured is not None:
        mean = torch.lerp(running.mean.to(mean.dtype), mean, rate)
        var = torch.lerp(running.var.to(var.dtype), var, rate)
    mean, var = mean.to(running.mean.dtype), var.to(running.var.dtype)
    # If a number is NaN or infinite, so is the sum; not in half precision, where it may overflow.
    finite = (mean.to(filtered.invstd.dtype) + var).sum() * 0.0 == 0.0
    running.batches.add_(finite)
    for average, new in ((running.mean, mean), (running.var, var)):
        average.copy_(torch.where(finite, new, average))
