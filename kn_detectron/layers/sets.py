"""Which pixels of a feature map share their statistics."""

from typing import Callable, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from . import passes
from .passes import pooled_moments

__all__ = ["Sets"]


class Sets(NamedTuple):
    """Divides the pixels of features (N, C, H, W) into sets, each with its own statistics.

    A set consists of N / ``rows`` consecutive images and C / ``groups`` consecutive channels.
    BatchNorm has (1, C) sets, and GroupNorm has (N, groups). Statistics have one number per set and
    the shape (rows, groups).

    If the sets are not BatchNorm's, the passes of :mod:`~kn_detectron.layers.passes` run over the
    *unfolded* features: every channel of every image counts as a channel, and vectors have N C
    numbers instead of C.

    Attributes:
        images, channels: N and C.
        rows: a divisor of N.
        groups: a divisor of C.
    """

    images: int
    channels: int
    rows: int
    groups: int

    @property
    def is_batch(self) -> bool:
        """Whether the sets are BatchNorm's."""
        return self.rows == 1 and self.groups == self.channels

    def moments(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """Mean and biased variance of each set."""
        if self.is_batch:
            mean, var = passes.moments(x)
            return mean[None], var[None]
        if self.rows == self.images and passes.memory_format(x) != torch.channels_last:
            # The channels of a group are adjacent in memory, and form one plane.
            planes = x.contiguous().view(1, self.images * self.groups, -1, 1)
            mean, var = passes.moments(planes)
            return mean.view(self.images, self.groups), var.view(self.images, self.groups)
        mean, var = self.run(passes.moments, [x])
        return pooled_moments(self._by_set(mean), self._by_set(var), (1, 3))

    def _by_set(self, v: Tensor) -> Tensor:
        per_row, per_group = self.images // self.rows, self.channels // self.groups
        return v.view(self.rows, per_row, self.groups, per_group)

    def repeat(self, v: Tensor) -> Tensor:
        """Repeats a vector over C for the channels of the unfolded features. The result is dense."""
        return v.contiguous() if self.is_batch else v.repeat(self.images)

    def spread(self, v: Tensor) -> Tensor:
        """Statistics (rows, groups) or (1, groups) as a vector over the unfolded channels.

        The result is dense: torch's kernels for channels_last take the address of a vector, and
        read one number after the other from there, whatever its strides are.
        """
        if self.is_batch:
            return v.contiguous().view(-1)
        per_row, per_group = self.images // max(self.rows, 1), self.channels // self.groups
        shape = self.rows, per_row, self.groups, per_group
        return v[:, None, :, None].expand(shape).contiguous().view(-1)

    def run(
        self, a_pass: Callable, features: Sequence[Tensor], vectors: Sequence = ()
    ) -> Union[Tensor, Tuple[Tensor, ...]]:
        """Calls a pass on features and on vectors over the unfolded channels.

        Args:
            a_pass: a function of :mod:`~kn_detectron.layers.passes`.
            features: its first arguments, each (N, C, H, W).
            vectors: its other arguments: tensors as :meth:`repeat` and :meth:`spread` make them,
                None or numbers.

        Returns:
            What the pass returns: features in the memory format of ``features[0]``, and vectors
            over the unfolded channels.
        """
        x = features[0]
        if self.is_batch or self.images == 1:
            return a_pass(*features, *vectors)
        if not x.is_cuda and passes.memory_format(x) == torch.channels_last:
            return self._run_by_image(a_pass, features, vectors)

        def fold(v):
            if v.dim() != 4:
                return v
            # Autograd must not take it for a view, which could not be changed in place.
            v = torch.ops.aten._unsafe_view(v, x.shape)
            return v.contiguous(memory_format=passes.memory_format(x))

        unfolded = [v.contiguous().view(1, -1, *x.shape[2:]) for v in features]
        result = a_pass(*unfolded, *vectors)
        return fold(result) if isinstance(result, Tensor) else tuple(fold(v) for v in result)

    def _run_by_image(self, a_pass, features, vectors):
        """:meth:`run` image by image, because a CPU is slow at changing the memory format."""

        def parts(v: Optional[Tensor]):
            return v.split(self.channels) if isinstance(v, Tensor) else [v] * self.images

        images = zip(*(v.split(1) for v in features), *(parts(v) for v in vectors))
        results = [a_pass(*image) for image in images]
        if isinstance(results[0], Tensor):
            return torch.cat(results)
        return tuple(torch.cat(v) for v in zip(*results))
