"""How beliefs go from layer to layer."""

import torch

from kn_detectron.layers import MonteCarloTransition
from kn_detectron.layers import belief as B


def test_samples_of_a_channel_without_variance_have_finite_gradients():
    """As behind a norm whose scale starts at 0."""
    weight = torch.tensor([0.0, 1.0], requires_grad=True)
    about = B.normalized(weight, None)
    source = MonteCarloTransition(8).start(about, torch.zeros(1, 2, 4, 4))
    source.square().sum().backward()
    assert weight.grad.isfinite().all()
