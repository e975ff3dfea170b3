"""The passes over a feature map that a normalisation makes, each by torch's own operators.

A layer is bound by the memory that it reads and writes. BatchNorm reads x and writes nothing
(:func:`moments`), reads x and writes y (:func:`transform`), reads x and dy (the sums of
:func:`gradient_sums`), and reads x and dy and writes dx (:func:`input_gradient`). These are the same,
by SyncBatchNorm's kernels on a GPU and by BatchNorm's and GroupNorm's on a CPU, but for the last one:
no operator of torch computes a dy + b x + c, so it is made of two, which write and read dx once more
(save in the case of :func:`network_gradient`).

Vectors are per channel, in float32 (float64 for float64 features). Features stay in their own dtype
and memory format: none is copied to float32.
"""

from typing import Callable, NamedTuple, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Layout",
    "gradient_sums",
    "input_gradient",
    "is_compiling",
    "memory_format",
    "moments",
    "moments_together",
    "network_gradient",
    "statistics_dtype",
    "transform",
]

# Numbers in features for which several calls take longer than one that is slow.
_FEW = 2**15

# Bytes of a piece: many enough for a call of an operator to be nothing beside it.
_PIECE = 2**21

# Pixels of a channel for which a CPU's loop over half precision is too short to be fast.
_SMALL_PLANE = 2**7


def is_compiling() -> bool:
    """Whether torch.compile or torch.export is tracing."""
    return hasattr(torch, "compiler") and torch.compiler.is_compiling()


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the statistics of features ``x``: float32, or float64 if they are."""
    return torch.promote_types(x.dtype, torch.float32)


def memory_format(x: Tensor) -> torch.memory_format:
    """``channels_last`` if x is that and not contiguous too, else ``contiguous_format``."""
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def _run_moments(x: Tensor) -> Tuple[Tensor, Tensor]:
    """Mean and biased variance of each row of x (rows, n), contiguous and on a CPU.

    By GroupNorm, whose moments are several times faster than BatchNorm's, but which normalises too.
    In pieces, each gets the memory of the last one for that, still in a cache.
    """
    rows, n = x.shape
    numbers = _PIECE // x.element_size()
    pieces = [
        torch.native_group_norm(piece, None, None, 1, piece.shape[1], n, piece.shape[1], 0.0)[1:]
        for piece in x[None].split(rows if is_compiling() else max(1, numbers // n), 1)
    ]
    mean, inv_std = (torch.cat(parts, 1)[0] for parts in zip(*pieces))
    return mean, inv_std.square_().reciprocal_()


def moments_together(
    mean: Tensor, var: Tensor, dim: Union[int, Tuple[int, ...]]
) -> Tuple[Tensor, Tensor]:
    """Mean and variance of equally large parts together, by the law of total variance."""
    return mean.mean(dim), var.mean(dim) + mean.var(dim, unbiased=False)


def moments(x: Tensor) -> Tuple[Tensor, Tensor]:
    """Mean and biased variance per channel of x (N, C, H, W), of shape (C,)."""
    if is_compiling():  # the operators below have no rule for sizes that are left open
        var, mean = torch.var_mean(x.to(statistics_dtype(x)), (0, 2, 3), unbiased=False)
        return mean, var
    if x.is_cuda:
        return torch.batch_norm_update_stats(x, None, None, 0.0)
    if x.dtype != statistics_dtype(x):  # they come in the dtype of the running statistics
        unused = x.new_zeros(2, x.shape[1], dtype=statistics_dtype(x))
        return torch.batch_norm_update_stats(x, unused[0], unused[1], 0.0)
    if not x.is_contiguous() or x.numel() < _FEW:
        return torch.batch_norm_update_stats(x, None, None, 0.0)
    images, channels = x.shape[:2]
    mean, var = _run_moments(x.view(images * channels, -1))
    if images == 1:
        return mean, var
    return moments_together(mean.view(images, channels), var.view(images, channels), (0,))


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
    dy: Tensor, x: Tensor, scale: Tensor, center: Tensor, slope: Tensor, offset: Tensor
) -> Tensor:
    """scale dy + slope (x - center) + offset.

    In half precision on a CPU ``scale`` is rounded to the dtype of the features, as autocast rounds
    filters: the first term has a relative error of up to 2^-8 in bfloat16, 2^-11 in float16.
    """
    dx = transform(x, center, slope, offset)
    scale = scale.view(-1, 1, 1)
    if not x.is_cuda and x.dtype != scale.dtype:  # a CPU is slow where dtypes are mixed
        scale = scale.to(x.dtype)
        if x.is_contiguous() and x.shape[2] * x.shape[3] < _SMALL_PLANE:
            scale = scale.expand(x.shape[1:]).contiguous()
    return dx.addcmul_(dy, scale)


def network_gradient(
    dy: Tensor,
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
    return input_gradient(dy, x, scale, center, slope, offset)


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

    def run(self, a_pass: Callable, *args) -> Union[Tensor, Tuple[Optional[Tensor], ...]]:
        """Calls one of the passes with vectors that are unfolded.

        Args:
            a_pass: :func:`moments`, :func:`transform`, :func:`gradient_sums` or
                :func:`input_gradient`.
            args: its arguments: features as they are, vectors over C if the sets are BatchNorm's,
                else as :meth:`repeat` and :meth:`spread` make them.

        Returns:
            What it returns: features in the memory format of the first ones given, vectors like
            those that it takes.
        """
        x = args[0]
        if self.is_batch(x) or x.shape[0] == 1:
            return a_pass(*args)
        if not x.is_cuda and memory_format(x) == torch.channels_last and not is_compiling():
            return self._run_by_image(a_pass, *args)  # a CPU is slow at changing the format

        def unfold(v):
            is_feature = isinstance(v, Tensor) and v.dim() == 4
            return v.contiguous().view(1, -1, *x.shape[2:]) if is_feature else v

        def fold(v):
            if v is None or v.dim() != 4:
                return v
            # Not a view for autograd, which would not let it be changed in place.
            v = torch.ops.aten._unsafe_view(v, x.shape)
            return v.contiguous(memory_format=memory_format(x))

        result = a_pass(*(unfold(v) for v in args))
        return fold(result) if isinstance(result, Tensor) else tuple(fold(v) for v in result)

    def _run_by_image(self, a_pass, *args):
        images, channels = args[0].shape[:2]
        parts = [
            v.split(1 if v.dim() == 4 else channels) if isinstance(v, Tensor) else [v] * images
            for v in args
        ]
        results = [a_pass(*part) for part in zip(*parts)]
        if isinstance(results[0], Tensor):
            return torch.cat(results)
        return tuple(None if v[0] is None else torch.cat(v) for v in zip(*results))

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
        if self.is_batch(x):
            mean, var = moments(x)
            return mean[None], var[None]
        images = x.shape[0]
        if self.rows == images and x.is_cuda and x.dtype == statistics_dtype(x):  # GroupNorm's
            count = x.shape[2] * x.shape[3]
            _, mean, inv_std = torch.native_group_norm(
                x, None, None, *x.shape[:2], count, self.groups, 0.0
            )
            return mean, inv_std.square().reciprocal()
        if self.rows == images and not x.is_cuda and memory_format(x) != torch.channels_last:
            sets = x.contiguous().view(1, images * self.groups, -1, 1)
            mean, var = moments(sets)
            return mean.view(images, self.groups), var.view(images, self.groups)
        mean, var = self.run(moments, x)
        return moments_together(self._by_set(mean, x), self._by_set(var, x), (1, 3))

    def _by_set(self, v: Tensor, x: Tensor) -> Tensor:
        images, channels = x.shape[0] // self.rows, x.shape[1] // self.groups
        return v.view(self.rows, images, self.groups, channels)
