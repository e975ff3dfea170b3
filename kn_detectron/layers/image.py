"""The belief about the images, where the chain of a network starts."""

from typing import Sequence

import torch
from torch import nn

from .belief import Belief
from .passes import statistics_dtype

__all__ = ["ImageBelief"]


class ImageBelief(nn.Module):
    """The belief about the images that a network gets: their mean and variance per channel.

    It belongs to the data and not to the weights, so it is not in the state_dict.

    Args:
        mean: of the images as the network gets them, C numbers.
        std: their standard deviation, C numbers.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self._moments = [float(m) for m in mean], [float(s) ** 2 for s in std]
        for name, moment in zip(("mean", "var"), self._moments):
            self.register_buffer(name, torch.tensor([moment]), persistent=False)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        # Written anew: half precision may not have them, and to_empty() fills in anything.
        like = {"device": self.mean.device, "dtype": statistics_dtype(self.mean)}
        self.mean, self.var = (torch.tensor([moment], **like) for moment in self._moments)
        return self

    def belief(self) -> Belief:
        """The belief, shape (1, C), in float32 or better."""
        return Belief(self.mean, self.var)
