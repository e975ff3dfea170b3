"""Beliefs, and how a belief crosses the operations of a network (closed form).

A *belief* about a feature map is a mean and a variance per channel. Channels and pixels are taken
to be independent. For each operation of a convolutional network this file has a function that
computes the belief behind the operation from the belief in front of it. The functions are
differentiable, and their cost does not depend on the image size.

=================  ====================================  ==================================
operation          rule                                  source
=================  ====================================  ==================================
ReLU               moments of a rectified Gaussian       ours (the released code samples)
convolution        mean W m, variance W^2 v              Eq. 7: A mu, A Sigma A^T
residual sum       means add, variances add              released code
max-pool           identity                              ours
upsampling         identity                              exact (nearest)
multiplication     mean c m, variance c^2 v              exact
product of two     :func:`product`                       exact, if independent
scale and shift    mean w m + b, variance w^2 v          exact
RoIAlign           identity, an image's belief goes to   ours
                   each of its regions
mixture            law of total variance                 exact
normalisation      (bias, weight^2)                      ours
frozen BatchNorm   its statistics are the posterior      ours
=================  ====================================  ==================================
"""

import math
from typing import NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .modes import without_autocast
from .passes import pooled_moments, statistics_dtype
from .triton import fastest

__all__ = [
    "Belief",
    "Convolve",
    "Rectify",
    "add",
    "affine",
    "conv2d",
    "frozen",
    "max_pool2d",
    "mixture",
    "normalized",
    "product",
    "relu",
    "roi_align",
    "scale",
]


class Belief(NamedTuple):
    """Mean and variance per channel of a feature map.

    Attributes:
        mean: shape (1, C), the same for all images of the batch, or (N, C), one per image.
        var: the same shape, non-negative, biased (a population's, not a sample's).

    Both are float32, also under mixed precision, and float64 for float64 features.
    """

    mean: Tensor
    var: Tensor

    def detach(self) -> "Belief":
        """The same belief without a gradient."""
        return Belief(self.mean.detach(), self.var.detach())


# If |m| / sqrt(2 v) is larger, all of the Gaussian is on one side of 0: exp(-28^2) = 0 in float64.
_TAIL = 28.0


class Rectify:
    """Moments of max(x, 0) for x ~ N(mean, var), of any shape.

    With s = sqrt(v), a = m/s, t = |a| and h = E[max(z - t, 0)] of a standard normal z::

        mean = max(m, 0) + s h
        var  = v (cdf(a) - h (t + h))

    These are the textbook's m cdf(a) + s pdf(a) and E[x^2] - E[x]^2, rearranged so that hardly any
    digits cancel in either tail. The derivatives are written out, because autograd's derivative of
    |a| is wrong at m = 0. Every fresh network starts there, since the biases of its norms are 0::

        d mean/dm = cdf(a)              d mean/dv = pdf(a) / (2 s)
        d var/dm  = 2 mean cdf(-a)      d var/dv  = cdf(a) - mean pdf(a) / s
    """

    @staticmethod
    def forward(mean: Tensor, var: Tensor) -> Tuple[Tuple[Tensor, Tensor], Tuple[Tensor, ...]]:
        """The moments behind the ReLU, and the first arguments of :meth:`backward`."""
        tiny = torch.finfo(var.dtype).tiny
        std = var.sqrt()
        # With z = t / sqrt(2) the pdf(t) of a standard normal is exp(-z^2) / sqrt(2 pi), its tail
        # P(> t) is exp(-z^2) erfcx(z) / 2, and h is pdf(t) - t tail. In this form they keep their
        # relative accuracy for every t.
        z = mean.abs().div_((std * math.sqrt(2.0)).clamp_min_(tiny)).clamp_max_(_TAIL)
        bell, mills = torch.exp(-z * z), torch.special.erfcx(z)
        h = (1.0 - math.sqrt(math.pi) * z * mills).clamp_min_(0.0) * bell
        h = h.mul_(1.0 / math.sqrt(2.0 * math.pi))
        tail = (bell * mills).mul_(0.5)
        negative, rest = mean < 0, 1.0 - tail
        cdf, cdf_of_minus = torch.where(negative, tail, rest), torch.where(negative, rest, tail)
        out_mean = torch.addcmul(mean.clamp_min(0.0), std, h)
        out_var = (cdf - h * torch.add(h, z, alpha=math.sqrt(2.0))).clamp_min_(0.0).mul_(var)
        # At v = 0 the slope in v is 0 if m is not 0. If m is 0 it is infinite, and is taken as 0.
        slope = torch.where(var > tiny, bell.mul_(1.0 / math.sqrt(2.0 * math.pi)) / std, 0.0)
        return (out_mean, out_var), (cdf, cdf_of_minus, slope, out_mean)

    @staticmethod
    def backward(
        cdf: Tensor,
        cdf_of_minus: Tensor,
        slope: Tensor,
        out_mean: Tensor,
        d_out_mean: Tensor,
        d_out_var: Tensor,
    ) -> Tuple[Tensor, Tensor]:
        """The gradients of :meth:`forward`; ``slope`` is pdf(a) / s."""
        d_mean = torch.addcmul(d_out_mean * cdf, d_out_var, out_mean * cdf_of_minus, value=2.0)
        d_var = d_out_var * torch.addcmul(cdf, out_mean, slope, value=-1.0)
        return d_mean, d_var.add_(d_out_mean * slope, alpha=0.5)


class Convolve:
    """Moments behind a filter W (C_out, C_in / groups, kH, kW): sums of W m and of W^2 v.

    Beliefs have the shape (rows, C_in). The filter, as a matrix, is multiplied with m, which is
    repeated for each tap. So the filter is read as it lies in memory, and no sum over its taps is
    computed or kept. The derivatives are written out, because autograd would keep W^2.
    """

    @staticmethod
    def _columns(v: Tensor, weight: Tensor, groups: int) -> Tensor:
        """(rows, C_in), repeated for each tap, as the columns that the filters multiply."""
        taps = weight.shape[2] * weight.shape[3]
        v = v if taps == 1 else v.repeat_interleave(taps, 1)
        return Convolve._grouped(v, groups)

    @staticmethod
    def _grouped(v: Tensor, groups: int) -> Tensor:
        """(rows, C) as (C, rows), or (groups, C / groups, rows) where there are groups."""
        rows, channels = v.shape
        return v.t() if groups == 1 else v.t().reshape(groups, channels // groups, rows)

    @staticmethod
    def _filters(weight: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
        weight = weight.to(dtype).flatten(1)
        return weight if groups == 1 else weight.unflatten(0, (groups, -1))

    @staticmethod
    def forward(
        mean: Tensor, var: Tensor, weight: Tensor, groups: int = 1
    ) -> Tuple[Tensor, Tensor]:
        """The moments behind the convolution, shape (rows, C_out)."""
        filters = Convolve._filters(weight, groups, mean.dtype)
        out_mean = filters @ Convolve._columns(mean, weight, groups)
        out_var = filters.square() @ Convolve._columns(var, weight, groups)
        shape = weight.shape[0], mean.shape[0]
        return out_mean.view(shape).t(), out_var.view(shape).t()

    @staticmethod
    def backward(
        mean: Tensor,
        var: Tensor,
        weight: Tensor,
        d_out_mean: Tensor,
        d_out_var: Tensor,
        groups: int = 1,
    ) -> Tuple[Tensor, Tensor, Tensor]:
        """The gradients of :meth:`forward`: d_W = d_mean m^T + 2 W * (d_var v^T)."""
        filters = Convolve._filters(weight, groups, mean.dtype)
        d_mean, d_var = (Convolve._grouped(d, groups) for d in (d_out_mean, d_out_var))
        of_mean, of_var = filters.mT @ d_mean, filters.square().mT @ d_var
        taps = weight.shape[2] * weight.shape[3]
        if taps > 1:
            shape = mean.shape[1], taps, mean.shape[0]
            of_mean, of_var = of_mean.view(shape).sum(1), of_var.view(shape).sum(1)
        of_mean, of_var = (v.view(mean.shape[::-1]).t() for v in (of_mean, of_var))
        of_weight = (d_var @ Convolve._columns(var, weight, groups).mT).mul_(filters)
        add_product = of_weight.addmm_ if groups == 1 else of_weight.baddbmm_
        add_product(d_mean, Convolve._columns(mean, weight, groups).mT, beta=2)
        return of_mean, of_var, of_weight.view_as(weight).to(weight.dtype)


class _Rectified(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mean, var):
        ctx.operation = fastest(Rectify, mean, var)
        moments, saved = ctx.operation.forward(mean, var)
        ctx.save_for_backward(*saved)
        return moments

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_out):
        return ctx.operation.backward(*ctx.saved_tensors, *d_out)


class _Convolved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mean, var, weight, groups):
        ctx.save_for_backward(mean, var, weight)
        ctx.groups, ctx.operation = groups, fastest(Convolve, mean, var, weight, groups)
        with without_autocast(mean):  # it would round the products
            return ctx.operation.forward(mean, var, weight, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_out):
        with without_autocast(d_out[0]):
            return *ctx.operation.backward(*ctx.saved_tensors, *d_out, ctx.groups), None


def relu(belief: Belief) -> Belief:
    """The belief behind a ReLU: the first two moments of a rectified Gaussian.

    It holds for any mean, and for variances of 0 and from 1e-12 to 1e12. In float32 the relative
    error is about 1e-7 where the mean is positive, and grows to 1e-3 where the mean is 12 standard
    deviations below 0. At variance 0 the result is the ReLU of the mean.

    Args:
        belief: in front of the ReLU, any shape.

    Returns:
        Belief: of the same shape.
    """
    return Belief(*_Rectified.apply(*belief))


def conv2d(
    belief: Belief, weight: Tensor, bias: Optional[Tensor] = None, groups: int = 1
) -> Belief:
    """The belief behind a convolution (Eq. 7): mean = sum W m, variance = sum W^2 v.

    The sums run over the taps and the input channels of the group. Stride and dilation change
    neither sum. Zero padding is ignored: it matters only at the border, and a belief that included
    it would depend on the image size.

    Args:
        belief: in front of the convolution, shape (1, C_in) or (N, C_in).
        weight: the filter, shape (C_out, C_in / groups, kH, kW), any floating dtype.
        bias: shape (C_out,), or None.
        groups: as in :class:`torch.nn.Conv2d`.

    Returns:
        Belief: of shape (1, C_out) or (N, C_out).

    Raises:
        ValueError: the belief and the filter have different numbers of channels.
    """
    if belief.mean.shape[-1] != weight.shape[1] * groups:
        raise ValueError(
            f"a belief about {belief.mean.shape[-1]} channels cannot cross a convolution of "
            f"{weight.shape[1] * groups} input channels"
        )
    mean, var = _Convolved.apply(*belief, weight, groups)
    return Belief(mean if bias is None else mean + bias.to(mean.dtype), var)


def add(a: Belief, b: Belief) -> Belief:
    """The belief about a sum of two feature maps held to be independent (released code)."""
    return Belief(a.mean + b.mean, a.var + b.var)


def product(a: Belief, b: Belief) -> Belief:
    """The belief about a product of two feature maps held to be independent (ours).

    ::

        mean = mean_a mean_b        var = var_a var_b + var_a mean_b^2 + mean_a^2 var_b
    """
    # No difference of large numbers: all terms are positive.
    var = a.var * (b.var + b.mean.square()) + a.mean.square() * b.var
    return Belief(a.mean * b.mean, var)


def scale(belief: Belief, factor: Union[float, Tensor]) -> Belief:
    """The belief about a feature map that was multiplied by a number, or by one per channel, (C,)."""
    return Belief(belief.mean * factor, belief.var * factor**2)


def affine(belief: Belief, weight: Tensor, bias: Tensor) -> Belief:
    """The belief about a feature map that was scaled and shifted per channel.

    Args:
        belief: about the map, shape (1, C) or (N, C).
        weight, bias: scale and shift, shape (C,), any floating dtype.
    """
    weight, bias = weight.to(belief.mean.dtype), bias.to(belief.mean.dtype)
    return Belief(belief.mean * weight + bias, belief.var * weight.square())


def mixture(beliefs: Sequence[Belief]) -> Belief:
    """The belief about a pixel that is from one of several feature maps with equal probability.

    Args:
        beliefs: about the feature maps, all of the same shape.

    Returns:
        Belief: of that shape: the mean of the means, and the mean of the variances plus the
        variance of the means.
    """
    means, variances = (torch.stack(moments) for moments in zip(*beliefs))
    return Belief(*pooled_moments(means, variances, (0,)))


def max_pool2d(belief: Belief) -> Belief:
    """The belief behind max-pooling, which is the belief in front of it (ours).

    The maximum of independent pixels would be larger. But neighbouring pixels of a feature map are
    far from independent, so their maximum is distributed almost like one pixel. The process model
    can learn the difference.
    """
    return belief


def roi_align(belief: Belief, regions: Sequence[int]) -> Belief:
    """The belief behind RoIAlign: each region of an image has the belief of the image (ours).

    Bilinear interpolation averages neighbouring pixels. These are far from independent, so their
    average is distributed almost like one pixel.

    Args:
        belief: shape (1, C), or (N, C) with one row per image.
        regions: the number of regions of each of the N images.

    Returns:
        Belief: shape (1, C), or (sum of ``regions``, C).
    """
    if belief.mean.shape[0] == 1:  # one belief for all of them
        return belief
    # Without a tensor of the numbers, which a device would have to be asked for.
    return Belief(
        *(torch.cat([r.expand(n, -1) for r, n in zip(v.split(1), regions)]) for v in belief)
    )


def normalized(weight: Tensor, bias: Optional[Tensor]) -> Belief:
    """The belief about a feature that was normalised with its own mean and variance.

    For x ~ (mu, Sigma), y = weight (x - mu) / sqrt(Sigma) + bias has mean ``bias`` and variance
    ``weight``^2, whatever mu and Sigma are (ours). The eps of the layers is neglected. It matters
    only for channels that hardly vary, and the process model makes up for it.

    Args:
        weight, bias: scale and shift, shape (C,); None is a shift of 0.

    Returns:
        Belief: shape (1, C), in float32 or better.
    """
    dtype = statistics_dtype(weight)
    mean = torch.zeros_like(weight) if bias is None else bias
    return Belief(mean.to(dtype)[None], weight.to(dtype).square()[None])


def frozen(norm: nn.Module, variant: str) -> Belief:
    """The belief behind a BatchNorm whose statistics are not updated.

    Its running statistics are the posterior (ours). As in every layer, the network variant passes
    on the belief about the normalised feature, and the paper variant the posterior itself.

    Args:
        norm: a FrozenBatchNorm2d, a BatchNorm2d or a KN layer, with running statistics.
        variant: ``"network"`` or ``"paper"``.

    Returns:
        Belief: shape (1, C), in float32 or better.
    """
    mean, var = norm.running_mean, norm.running_var
    if variant == "network":
        if norm.weight is not None:
            return normalized(norm.weight, norm.bias)
        mean, var = torch.zeros_like(mean), torch.ones_like(var)
    dtype = statistics_dtype(mean)
    return Belief(mean.to(dtype)[None], var.to(dtype)[None])
