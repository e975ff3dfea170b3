"""How beliefs go from layer to layer."""

import torch
from torch import nn

from kn_detectron.layers import MonteCarloTransition
from kn_detectron.layers import belief as B


def test_samples_of_a_channel_without_variance_have_finite_gradients():
    """As behind a norm whose scale starts at 0."""
    weight = torch.tensor([0.0, 1.0], requires_grad=True)
    about = B.normalized(weight, None)
    source = MonteCarloTransition(8).source(about, torch.zeros(1, 2, 4, 4))
    source.square().sum().backward()
    assert weight.grad.isfinite().all()


def test_a_sampled_map_is_convolved_in_float32_under_autocast():
    conv, source = nn.Conv2d(64, 8, 1), torch.randn(1, 64, 8, 8)
    want = MonteCarloTransition().conv(source, conv)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = MonteCarloTransition().conv(source, conv)
    assert got.mean.dtype == torch.float32
    assert torch.equal(got.mean, want.mean) and torch.equal(got.var, want.var)
