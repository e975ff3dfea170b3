"""The passes over a feature map that a normalisation makes, each by torch's own operators.

A norm is memory-bound: its time is the time to read and write features. BatchNorm makes four
passes. It reads x (:func:`moments`), reads x and writes y (:func:`transform`), reads x and dy
(:func:`gradient_sums`), and reads x and dy and writes dx (:func:`input_gradient`). The functions
here make the same passes, by SyncBatchNorm's kernels on a GPU, and by BatchNorm's and GroupNorm's
on a CPU. The last pass computes a dy + b x + c. torch has no operator for it, so it takes two
operators, which write and read dx once more. For BatchNorm's own gradient a GPU has one operator
(:func:`batch_norm_gradient`).

Vectors have one number per channel, in float32 (float64 for float64 features). They have torch's
names: ``mean``, ``invstd`` = 1 / sqrt(var + eps), ``weight``, ``bias``; ``scale`` is weight invstd.
Features stay in their own dtype and memory format, and are not copied to float32.
"""

from typing import Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "batch_norm_gradient",
    "frozen_gradient",
    "gradient_sums",
    "input_gradient",
    "memory_format",
    "moments",
    "pooled_moments",
    "statistics_dtype",
    "transform",
]

# If features have fewer numbers, several fast calls take longer than one slow call.
_FEW = 2**15

# Bytes of a piece, which is large enough that the cost of calling an operator does not matter.
_PIECE = 2**21

# If a channel has fewer pixels, a CPU's loop over half precision is too short to be fast.
_SMALL_PLANE = 2**7


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the statistics of features ``x``: float32, or float64 for float64 features."""
    return torch.promote_types(x.dtype, torch.float32)


def memory_format(x: Tensor) -> torch.memory_format:
    """``channels_last`` if x has it and is not contiguous too, else ``contiguous_format``."""
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def _like(dy: Tensor, x: Tensor) -> Tensor:
    """dy in the memory format of x, and dense, as the kernels of a GPU read it fast."""
    return dy.contiguous(memory_format=memory_format(x))


def _row_moments(x: Tensor) -> Tuple[Tensor, Tensor]:
    """Mean and biased variance of each row of x (rows, n), which is contiguous and on a CPU.

    GroupNorm computes moments several times faster than BatchNorm, but also writes the normalised
    features. So it gets x in pieces: each piece writes to the memory of the last one, which is
    still in a cache.
    """
    rows, n = x.shape
    at_once = max(1, _PIECE // x.element_size() // n)
    pieces = [
        torch.native_group_norm(piece, None, None, 1, piece.shape[1], n, piece.shape[1], 0.0)[1:]
        for piece in x[None].split(at_once, 1)
    ]
    mean, invstd = (torch.cat(parts, 1)[0] for parts in zip(*pieces))
    return mean, invstd.square_().reciprocal_()


def pooled_moments(
    mean: Tensor, var: Tensor, dim: Union[int, Tuple[int, ...]]
) -> Tuple[Tensor, Tensor]:
    """Mean and variance of the union of equally large parts, by the law of total variance."""
    together = mean.mean(dim, keepdim=True)
    return together.squeeze(dim), (var + (mean - together).square()).mean(dim)


def moments(x: Tensor) -> Tuple[Tensor, Tensor]:
    """Mean and biased variance per channel of x (N, C, H, W), of shape (C,)."""
    if x.is_cuda:
        return torch.batch_norm_update_stats(_like(x, x), None, None, 0.0)
    if x.dtype != statistics_dtype(x):  # the moments get the dtype of the running statistics
        unused = x.new_zeros(2, x.shape[1], dtype=statistics_dtype(x))
        return torch.batch_norm_update_stats(x, unused[0], unused[1], 0.0)
    if not x.is_contiguous() or x.numel() < _FEW:
        return torch.batch_norm_update_stats(x, None, None, 0.0)
    images, channels = x.shape[:2]
    mean, var = _row_moments(x.view(images * channels, -1))
    if images == 1:
        return mean, var
    return pooled_moments(mean.view(images, channels), var.view(images, channels), (0,))


def transform(x: Tensor, mean: Tensor, scale: Tensor, bias: Optional[Tensor]) -> Tensor:
    """scale (x - mean) + bias."""
    if x.is_cuda:
        return torch.batch_norm_elemt(x, None, bias, mean, scale, 0.0)
    return F.batch_norm(x, mean, torch.ones_like(mean), scale, bias, False, 0.0, 0.0)


def gradient_sums(dy: Tensor, x: Tensor, mean: Tensor) -> Tuple[Tensor, Tensor]:
    """``sum_dy`` and ``sum_dy_xmu``: the sums of dy and of dy (x - mean), of shape (C,)."""
    if x.is_cuda:
        x = _like(x, x)
        # The second mean stands in for invstd, which only sums that are not asked for need.
        sum_dy, sum_dy_xmu, _, _ = torch.batch_norm_backward_reduce(
            _like(dy, x), x, mean, mean, None, True, False, False
        )
        return sum_dy, sum_dy_xmu
    ones = torch.ones_like(mean)
    _, sum_dy_xmu, sum_dy = torch.ops.aten.native_batch_norm_backward(
        dy, x, ones, mean, ones, None, None, False, 0.0, [False, True, True]
    )
    return sum_dy, sum_dy_xmu


def frozen_gradient(
    dy: Tensor, x: Tensor, mean: Tensor, scale: Tensor
) -> Tuple[Tensor, Tensor, Tensor]:
    """scale dy, which is dx if ``mean`` and ``scale`` do not depend on x, and the gradient sums."""
    if x.is_cuda:
        return transform(dy, torch.zeros_like(mean), scale, None), *gradient_sums(dy, x, mean)
    dx, sum_dy_xmu, sum_dy = torch.ops.aten.native_batch_norm_backward(
        *(dy, x, scale, mean, torch.ones_like(mean), None, None, False, 0.0), [True, True, True]
    )
    return dx, sum_dy, sum_dy_xmu


def input_gradient(
    dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, d_mean: Tensor, d_var: Tensor, count: int
) -> Tensor:
    """dx if the moments of x, each over ``count`` values, have gradients too.

    ::

        dx = scale dy + d_mean / count + 2 d_var (x - mean) / count

    In half precision on a CPU, ``scale`` is rounded to the dtype of the features, as autocast
    rounds filters. The first term then has a relative error of up to 2^-8 in bfloat16 and 2^-11 in
    float16.

    Args:
        mean: the measured mean of x.
        d_mean, d_var: the gradients of the measured mean and the biased measured variance.
    """
    dx = transform(x, mean, d_var * (2.0 / count), d_mean / count)
    scale = scale.view(-1, 1, 1)
    if not x.is_cuda and x.dtype != scale.dtype:  # a CPU is slow where dtypes are mixed
        scale = scale.to(x.dtype)
        if x.is_contiguous() and x.shape[2] * x.shape[3] < _SMALL_PLANE:
            scale = scale.expand(x.shape[1:]).contiguous()
    return dx.addcmul_(dy, scale)


def batch_norm_gradient(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Optional[Tensor],
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    count: Tensor,
) -> Tensor:
    """BatchNorm's dx: weight invstd (dy - sum_dy / n - invstd^2 (x - mean) sum_dy_xmu / n).

    It is :func:`input_gradient` for d_mean = -scale sum_dy and d_var = -1/2 scale invstd^2
    sum_dy_xmu, which are the gradients if only y depends on the moments. A GPU has an operator for
    it, which reads dy and x once and writes dx once.

    Args:
        weight: None for 1.
        count: n, an int32 tensor of one element.
    """
    if x.is_cuda:
        x = _like(x, x)
        return torch.batch_norm_backward_elemt(
            _like(dy, x), x, mean, invstd, weight, sum_dy, sum_dy_xmu, count
        )
    scale = invstd if weight is None else weight * invstd
    d_mean, d_var = -scale * sum_dy, -0.5 * scale * invstd.square() * sum_dy_xmu
    return input_gradient(dy, x, scale, mean, d_mean, d_var, int(count))
