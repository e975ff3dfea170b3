"""Eq. 7 on vectors, and the belief behind it."""

import numpy as np
import pytest
import torch

from kn_detectron.layers import Belief, GroupKalmanNorm2d
from kn_detectron.layers import belief as B
from kn_detectron.layers import filter as KF


def test_group_belief_is_the_belief_about_a_pixel_of_the_group():
    # A group of two channels, with equally many pixels of each: its moments by counting.
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 1000, generator=g, dtype=torch.float64) * 2 + torch.arange(4.0)[:, None]
    channels = Belief(x.mean(2), x.var(2, unbiased=False))
    got = KF.group_belief(channels, 2)
    pixels = x.numpy().reshape(2, -1)
    np.testing.assert_allclose(got.mean[0], pixels.mean(1))
    np.testing.assert_allclose(got.var[0], pixels.var(1))


def test_update_with_mixture_is_the_variance_of_the_mixture():
    g = torch.Generator().manual_seed(0)
    prior = Belief(torch.tensor([[1.0]]), torch.tensor([[4.0]]))
    measured = Belief(torch.tensor([[-2.0]]), torch.tensor([[0.25]]))
    n = 400_000
    from_measured = torch.rand(n, generator=g) < 0.3
    x = torch.where(
        from_measured,
        torch.randn(n, generator=g) * 0.5 - 2.0,
        torch.randn(n, generator=g) * 2.0 + 1.0,
    )
    got = KF.update(prior, measured, torch.tensor(0.3), mixture=True)
    assert got.mean.item() == pytest.approx(x.mean().item(), abs=0.02)
    assert got.var.item() == pytest.approx(x.var().item(), rel=0.01)


def test_gate_looks_at_each_row():
    prior = Belief(torch.ones(3, 2), torch.tensor([[99.0, 102.0], [100.0, 99.0], [99.0, 101.0]]))
    measured = Belief(torch.zeros(3, 2), torch.ones(3, 2))
    got, fits = KF.gate(prior, measured)
    assert fits.tolist() == [[False], [True], [False]]  # the last one just reaches the limit
    assert torch.equal(got.mean, torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]))
    assert torch.equal(got.var, torch.tensor([[1.0, 1.0], [100.0, 99.0], [1.0, 1.0]]))


def test_gate_keeps_a_prior_of_a_channel_that_never_varies():
    zero = torch.zeros(1, 1)
    got, fits = KF.gate(Belief(zero + 1, zero), Belief(zero, zero))
    assert fits.item() and got.mean.item() == 1


def test_gate_does_not_count_a_channel_that_varies_nowhere():
    """In the first row the other channel is far too wide; 0 / 0 would hide it."""
    prior = Belief(torch.zeros(2, 2), torch.tensor([[1e6, 0.0], [50.0, 0.0]]))
    measured = Belief(torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    assert KF.gate(prior, measured)[1].tolist() == [[False], [True]]


def test_gate_keeps_an_infinite_prior_out_of_the_gradients():
    prior = Belief(torch.tensor([[float("inf")]]), torch.tensor([[float("inf")]]))
    mean = torch.zeros(1, 1, requires_grad=True)
    measured = Belief(mean, torch.ones(1, 1))
    got = KF.update(KF.gate(prior, measured)[0], measured, torch.tensor(0.1), mixture=True)
    (got.mean + got.var).sum().backward()
    assert got.mean.item() == 0 and got.var.item() == 1 and mean.grad.item() == 1


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("trained", [False, True])
def test_the_belief_behind_group_normalisation_is_that_of_the_features(groups, trained):
    """Against features: Gaussian maps through two layers of random filters, measured.

    (beta, gamma^2), which holds behind normalisation per channel, is far off: that is asserted too,
    or the comparison could not fail.
    """
    g = torch.Generator().manual_seed(groups)
    channels = 16

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    norm = GroupKalmanNorm2d(groups, channels, gain=0.1).double()
    if trained:  # scale, shift and process model are not a fresh layer's
        with torch.no_grad():
            norm.weight.copy_(0.5 + torch.rand(channels, generator=g, dtype=torch.float64))
            norm.bias.copy_(randn(channels) * 0.5)
    weight = randn(channels, 8, 1, 1) * 0.5 + 0.3
    image = Belief(randn(1, 8), 0.5 + torch.rand(1, 8, generator=g, dtype=torch.float64))
    pixels = image.mean[..., None, None] + image.var.sqrt()[..., None, None] * randn(4, 8, 150, 150)
    x = torch.nn.functional.conv2d(pixels.relu(), weight)
    y, belief = norm(x, prior=B.conv2d(B.relu(image), weight))
    assert belief.mean.shape == (4, channels)
    var, mean = torch.var_mean(y, (2, 3), unbiased=False)
    off = (belief.mean - mean).abs().mean(), (belief.var / var).log().abs().mean()
    assert off[0] < 0.02 and off[1] < 0.03
    naive = (norm.bias - mean).abs().mean(), (norm.weight.square() / var).log().abs().mean()
    assert naive[0] > 0.2 and naive[1] > 0.2
