"""Beliefs, and how a belief crosses the operations of a network (closed form).

A *belief* is what is held true about a feature map before looking at it: a mean and a variance per
channel, taken as independent across channels and pixels. Convolutional networks change features
with a handful of operations; for each of them this file has the function that changes the belief
in the same way. Everything is differentiable, and its cost does not depend on the image size.

=================  ====================================  ==================================
operation          rule                                  source
=================  ====================================  ==================================
ReLU               moments of a rectified Gaussian       ours (the released code samples)
convolution        mean W m, variance W^2 v              Eq. 7: A mu, A Sigma A^T
residual sum       means add, variances add              released code
max-pool           identity                              ours
RoIAlign           identity, an image's belief goes to   ours
                   each of its regions
normalisation      (bias, weight^2)                      ours
frozen BatchNorm   its statistics are the posterior      ours
=================  ====================================  ==================================
"""

import math
from typing import NamedTuple, Optional, Sequence

import torch
from torch import Tensor

__all__ = ["Belief", "add", "conv2d", "max_pool2d", "normalized", "relu", "roi_align"]


class Belief(NamedTuple):
    """Mean and variance per channel of a feature map.

    Attributes:
        mean: shape (1, C), the same for all images of the batch, or (N, C), one per image.
        var: the same shape, non-negative, biased (a population's, not a sample's).

    Both are float32 (float64 where the features are) also under mixed precision.
    """

    mean: Tensor
    var: Tensor

    def detach(self) -> "Belief":
        """The same belief, cut off from the graph."""
        return Belief(self.mean.detach(), self.var.detach())


# |m| / sqrt(v) beyond which a Gaussian is all on one side of 0, in float64 too: exp(-40^2/2) = 0.
_TAIL = 40.0


def _upper_tail(t: Tensor):
    """Of a standard normal z, for t >= 0: pdf(t), Mills' ratio M = P(z > t) / pdf(t), 1 - t M.

    In this form all three keep their relative accuracy however far out t is. The last one times
    pdf(t) is E[max(z - t, 0)].
    """
    pdf = torch.exp(-0.5 * t * t) * (1.0 / math.sqrt(2.0 * math.pi))
    mills = torch.special.erfcx(t * math.sqrt(0.5)) * math.sqrt(0.5 * math.pi)
    return pdf, mills, (1.0 - t * mills).clamp_min(0.0)


class _RectifiedMoments(torch.autograd.Function):
    """Moments of max(x, 0) for x ~ N(mean, var).

    With s = sqrt(v), a = m/s, t = |a| and h = E[max(z - t, 0)] of a standard normal z::

        mean = max(m, 0) + s h
        var  = v (cdf(a) - h (t + h))

    which is the textbook m cdf(a) + s pdf(a) and E[x^2] - E[x]^2 rearranged so that next to nothing
    cancels in either tail. The derivatives are written out because those of |a| are wrong at m = 0,
    which is where every fresh network starts (its norm biases are 0)::

        d mean/dm = cdf(a)              d mean/dv = pdf(a) / (2 s)
        d var/dm  = 2 mean cdf(-a)      d var/dv  = cdf(a) - mean pdf(a) / s
    """

    @staticmethod
    def forward(ctx, mean: Tensor, var: Tensor):
        std = var.sqrt()
        # At v = 0 there is no slope in v where m is not 0, and an infinite one, cut off, where it is.
        inv_std = torch.where(var > torch.finfo(var.dtype).tiny, std.reciprocal(), 0.0)
        a = torch.where(inv_std > 0, mean * inv_std, mean.sign() * _TAIL).clamp(-_TAIL, _TAIL)
        t = a.abs()
        pdf, mills, excess = _upper_tail(t)
        h = pdf * excess
        out_mean = mean.clamp_min(0.0) + std * h
        below = pdf * (mills - excess * (t + h))
        above = 1.0 - pdf * (mills + excess * (t + h))
        out_var = var * torch.where(a < 0, below, above).clamp_min(0.0)
        ctx.save_for_backward(inv_std, a, out_mean)
        return out_mean, out_var

    @staticmethod
    def backward(ctx, grad_mean: Tensor, grad_var: Tensor):
        inv_std, a, out_mean = ctx.saved_tensors
        pdf, mills, _ = _upper_tail(a.abs())
        tail = pdf * mills
        cdf, cdf_of_minus = torch.where(a < 0, tail, 1.0 - tail), torch.where(
            a < 0, 1.0 - tail, tail
        )
        slope = pdf * inv_std
        d_mean = grad_mean * cdf + grad_var * (2.0 * out_mean * cdf_of_minus)
        d_var = grad_mean * (0.5 * slope) + grad_var * (cdf - out_mean * slope)
        return d_mean, d_var


def relu(belief: Belief) -> Belief:
    """The belief behind a ReLU: the first two moments of a rectified Gaussian.

    Sound for any mean/std and for variances of 0 and from 1e-12 to 1e12: in float32 a relative
    error of some 1e-7 where the ReLU is open, growing to 1e-3 where it is 12 deviations closed. At
    variance 0 it is the ReLU of the mean.

    Args:
        belief: in front of the ReLU, any shape.

    Returns:
        Belief: of the same shape.
    """
    return Belief(*_RectifiedMoments.apply(belief.mean, belief.var))


def _filter_product(x: Tensor, taps: Tensor, groups: int) -> Tensor:
    """(N, C_in) times the per-channel filter sums (C_out, C_in / groups) -> (N, C_out)."""
    if groups == 1:
        return x @ taps.t()
    c_out, c_in = taps.shape  # written out: an empty belief cannot infer a size
    x = x.reshape(x.shape[0], groups, c_in, 1)
    y = torch.matmul(taps.reshape(groups, c_out // groups, c_in), x)
    return y.reshape(x.shape[0], c_out)


def conv2d(
    belief: Belief, weight: Tensor, bias: Optional[Tensor] = None, groups: int = 1
) -> Belief:
    """The belief behind a convolution (Eq. 7): mean = sum W m, variance = sum W^2 v.

    The sums run over the taps and the input channels of the group. Stride and dilation choose
    which pixels are read, and so change neither sum. Zero padding is ignored: at the border fewer
    taps are inside, and a belief that knew about it would depend on the image size.

    Args:
        belief: in front of the convolution, shape (1, C_in) or (N, C_in).
        weight: the filter, shape (C_out, C_in / groups, kH, kW), any floating dtype.
        bias: shape (C_out,), or None.
        groups: as in :class:`torch.nn.Conv2d`.

    Returns:
        Belief: of shape (1, C_out) or (N, C_out).

    Raises:
        ValueError: if the belief's channels are not the filter's.
    """
    if belief.mean.shape[-1] != weight.shape[1] * groups:
        raise ValueError(
            f"a belief about {belief.mean.shape[-1]} channels cannot cross a convolution of "
            f"{weight.shape[1] * groups} input channels"
        )
    # The products are tiny and must not be rounded to half precision by autocast.
    with torch.autocast(belief.mean.device.type, enabled=False):
        weight = weight.to(belief.mean.dtype)
        mean = _filter_product(belief.mean, weight.sum((2, 3)), groups)
        var = _filter_product(belief.var, weight.square().sum((2, 3)), groups)
    return Belief(mean if bias is None else mean + bias.to(mean.dtype), var)


def add(a: Belief, b: Belief) -> Belief:
    """The belief about a sum of two feature maps held to be independent (released code)."""
    return Belief(a.mean + b.mean, a.var + b.var)


def max_pool2d(belief: Belief) -> Belief:
    """The belief behind max-pooling: unchanged.

    The maximum of k independent pixels would be larger, but neighbouring pixels of a feature map
    are far from independent, so its distribution is close to a pixel's. What is left over is the
    process model's to learn.
    """
    return belief


def roi_align(belief: Belief, regions: Sequence[int]) -> Belief:
    """The belief behind RoIAlign: each region of an image has the image's belief.

    Bilinear interpolation averages neighbours, which are alike (see :func:`max_pool2d`).

    Args:
        belief: shape (1, C), or (N, C) with one row per image.
        regions: the number of regions of each of the N images.

    Returns:
        Belief: shape (1, C), or (sum of ``regions``, C).
    """
    if belief.mean.shape[0] == 1:  # one belief for all of them
        return belief
    repeats = torch.as_tensor(regions, device=belief.mean.device)
    return Belief(*(v.repeat_interleave(repeats, dim=0) for v in belief))


def normalized(weight: Tensor, bias: Tensor) -> Belief:
    """The belief about a feature that was normalised with its own mean and variance.

    For x ~ (mu, Sigma), y = weight (x - mu) / sqrt(Sigma) + bias has mean ``bias`` and variance
    ``weight``^2, whatever mu and Sigma were. (The layers' eps is neglected: it matters only for a
    channel that hardly varies, and the process model makes up for it.)

    Args:
        weight, bias: scale and shift, shape (C,).

    Returns:
        Belief: shape (1, C), in float32 or better.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return Belief(bias.to(dtype)[None], weight.to(dtype).square()[None])
