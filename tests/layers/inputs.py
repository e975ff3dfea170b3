"""Layers, and what they are given in training: features, and the prior about them."""

import pytest
import torch

from kn_detectron.layers import Belief, GroupKalmanNorm2d, KalmanNorm2d

BOTH = pytest.mark.parametrize("kind", ["KN", "GKN"])


def features(
    dtype=torch.float64, memory_format=torch.contiguous_format, seed=0, shape=(4, 6, 3, 5)
):
    """Every image and every channel has its own mean and scale."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    log_scale, mean = torch.randn(2, *shape[:2], 1, 1, generator=g, dtype=torch.float64)
    return (x * log_scale.exp() + mean).to(dtype, memory_format=memory_format)


def prior_of(channels=4, rows=1, dtype=torch.float32):
    g = torch.Generator().manual_seed(3)
    mean = torch.randn(rows, channels, generator=g, dtype=torch.float64)
    var = torch.rand(rows, channels, generator=g, dtype=torch.float64) + 0.5
    return Belief(mean.to(dtype), var.to(dtype))


def make(kind="KN", channels=4, **options):
    if kind == "KN":
        return KalmanNorm2d(channels, **options)
    return GroupKalmanNorm2d(2, channels, **options)
