"""The passes over a feature map that a normalisation makes, each by torch's own operators.

A layer is bound by the memory that it reads and writes. BatchNorm reads x and writes nothing
(:func:`moments`), reads x and writes y (:func:`transform`), reads x and dy (the sums of
:func:`gradient_sums`), and reads x and dy and writes dx (:func:`input_gradient`). These are the same,
by SyncBatchNorm's kernels on a GPU and by BatchNorm's on a CPU, but for the last one: no operator of
torch computes a dy + b x + c, so it is made of two, which write and read dx once more (save in the
case of :func:`network_gradient`).

Vectors are per channel, in float32 (float64 for float64 features). Features stay in their own dtype
and memory format: none is copied to float32.
"""

from typing import NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Layout",
    "gradient_sums",
    "input_gradient",
    "memory_format",
    "moments",
    "network_gradient",
    "statistics_dtype",
    "transform",
]


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the statistics of features ``x``: float32, or float64 if they are."""
    return torch.promote_types(x.dtype, torch.float32)


def memory_format(x: Tensor) -> torch.memory_format:
    """``channels_last`` if x is that and not contiguous too, else ``contiguous_format``."""
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def moments(x: Tensor) -> Tuple[Tensor, Tensor]:
    """Mean and biased variance per channel of x (N, C, H, W), of shape (C,)."""
    if x.is_cuda or x.dtype == statistics_dtype(x):
        return torch.batch_norm_update_stats(x, None, None, 0.0)
    # On a CPU they come in the dtype of the running statistics.
    unused = x.new_zeros(2, x.shape[1], dtype=statistics_dtype(x))
    return torch.batch_norm_update_stats(x, unused[0], unused[1], 0.0)


def transform(x: Tensor, center: Tensor, scale: Tensor, shift: Optional[Tensor]) -> Tensor:
    """scale (x - center) + shift."""
    if x.is_cuda:
        return torch.batch_norm_elemt(x, None, shift, center, scale, 0.0)
    return F.batch_norm(x, center, torch.ones_like(center), scale, shift, False, 0.0, 0.0)


def gradient_sums(
    dy: Tensor, x: Tensor, center: Tensor, scale: Tensor, scaled: bool
) -> Tuple[Optional[Tensor], Tensor, Tensor]:
    """The gradients of :func:`transform` with respect to its vectors, and with them maybe to x.

    Returns:
        scale dy, or None unless ``scaled``; the sums of dy (x - center) and those of dy, over all
        but the channels.
    """
    if x.is_cuda:
        dy = dy.contiguous(memory_format=memory_format(x))  # or the kernels would take a slow way
        # The scale stands in for numbers that these two sums do not use.
        sums = torch.batch_norm_backward_reduce(dy, x, center, scale, None, True, False, False)
        dx = transform(dy, torch.zeros_like(center), scale, None) if scaled else None
        return dx, sums[1], sums[0]
    dx, dy_x, dy_sum = torch.ops.aten.native_batch_norm_backward(
        *(dy, x, scale, center, torch.ones_like(center), None, None, False, 0.0),
        [scaled, True, True],
    )
    return dx if scaled else None, dy_x, dy_sum


def input_gradient(
    dy: Tensor,
    scaled: Optional[Tensor],
    x: Tensor,
    scale: Tensor,
    center: Tensor,
    slope: Tensor,
    offset: Tensor,
) -> Tensor:
    """scale dy + slope (x - center) + offset; ``scaled`` is scale dy if that is at hand."""
    dx = transform(x, center, slope, offset)
    if scaled is not None:
        return dx.add_(scaled)
    return dx.addcmul_(dy, scale.view(1, -1, 1, 1))


def network_gradient(
    dy: Tensor,
    scaled: Optional[Tensor],
    x: Tensor,
    scale: Tensor,
    center: Tensor,
    weight: Tensor,
    inv_std: Tensor,
    b: Tensor,
    a: Tensor,
    one: Tensor,
) -> Tensor:
    """scale (dy - a - b inv_std^2 (x - center)) with scale = weight inv_std.

    It is what :func:`input_gradient` becomes where no gradient comes down the chain of beliefs. For
    this there is an operator on a GPU, which reads and writes everything once.

    Args:
        one: the int32 by which that operator divides ``a`` and ``b``, on the device.
    """
    if x.is_cuda:
        dy = dy.contiguous(memory_format=memory_format(x))
        return torch.batch_norm_backward_elemt(dy, x, center, inv_std, weight, a, b, one)
    slope, offset = -scale * inv_std.square() * b / one, -scale * a / one
    return input_gradient(dy, scaled, x, scale, center, slope, offset)


class Layout(NamedTuple):
    """How features (N, C, H, W) fall into sets of pixels with statistics of their own.

    The images form ``rows`` runs of consecutive images and the channels ``groups`` runs of
    consecutive channels; a set is a run of each. BatchNorm's sets are (1, C), GroupNorm's
    (N, groups). Numbers of sets have the shape (rows, groups). Unless the sets are BatchNorm's, the
    passes are made over x *unfolded*, with every channel of every image as a channel of its own.
    """

    rows: int
    groups: int

    def is_batch(self, x: Tensor) -> bool:
        """Whether the sets are BatchNorm's."""
        return self.rows == 1 and self.groups == x.shape[1]

    def unfold(self, x: Tensor) -> Tensor:
        """x itself if the sets are BatchNorm's, else of shape (1, N C, H, W)."""
        if self.is_batch(x):
            return x
        return x.contiguous().view(1, -1, *x.shape[2:])

    def fold(self, y: Optional[Tensor], x: Tensor) -> Optional[Tensor]:
        """Undoes :meth:`unfold`, in the memory format of x."""
        if y is None or self.is_batch(x):
            return y
        # Not a view for autograd, which would not let it be changed in place.
        y = torch.ops.aten._unsafe_view(y, x.shape)
        return y.contiguous(memory_format=memory_format(x))

    def repeat(self, v: Optional[Tensor], x: Tensor) -> Optional[Tensor]:
        """A vector over C as one over the channels of x unfolded, in the statistics' dtype."""
        if v is None:
            return None
        v = v.to(statistics_dtype(x))
        return v if self.is_batch(x) else v.repeat(x.shape[0])

    def collect(self, v: Tensor, x: Tensor) -> Tensor:
        """The transpose of :meth:`repeat`: sums over the images, shape (C,)."""
        return v if self.is_batch(x) else v.view(x.shape[:2]).sum(0)

    def spread(self, v: Tensor, x: Tensor) -> Tensor:
        """Numbers of sets as a vector over the channels of x unfolded."""
        if self.is_batch(x):
            return v[0]
        images, channels = x.shape[0] // self.rows, x.shape[1] // self.groups
        v = v.view(self.rows, 1, self.groups, 1)
        return v.expand(self.rows, images, self.groups, channels).reshape(-1)

    def total(self, v: Tensor, x: Tensor) -> Tensor:
        """The transpose of :meth:`spread`: sums over the sets."""
        return v[None] if self.is_batch(x) else self._by_set(v, x).sum((1, 3))

    def moments(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """Mean and biased variance of each set."""
        if self.rows == x.shape[0] and x.dtype == statistics_dtype(x):  # GroupNorm's
            count = x.shape[2] * x.shape[3]
            _, mean, inv_std = torch.native_group_norm(
                x, None, None, *x.shape[:2], count, self.groups, 0.0
            )
            return mean, inv_std.square().reciprocal()
        mean, var = moments(self.unfold(x))
        if self.is_batch(x):
            return mean[None], var[None]
        mean, var = self._by_set(mean, x), self._by_set(var, x)
        return mean.mean((1, 3)), var.mean((1, 3)) + mean.var((1, 3), unbiased=False)

    def _by_set(self, v: Tensor, x: Tensor) -> Tensor:
        images, channels = x.shape[0] // self.rows, x.shape[1] // self.groups
        return v.view(self.rows, images, self.groups, channels)
