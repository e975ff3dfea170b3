"""The process model that makes a prior equal to the running statistics."""

import math

import pytest
import torch

from kn_detectron.layers import Belief, KalmanNorm2d
from kn_detectron.layers.calibration import fit_prior


def fitted(running_mean, running_var, mean, var):
    """A layer with these running statistics, fitted to a prior, and what the fit returns."""
    layer = KalmanNorm2d(len(mean))
    layer.running_mean.copy_(torch.tensor(running_mean))
    layer.running_var.copy_(torch.tensor(running_var))
    return layer, fit_prior(layer, Belief(torch.tensor([mean]), torch.tensor([var])))


def test_the_process_model_stays_within_bounds_where_a_channel_does_not_vary():
    """In the prediction, as of the first two channels, or in the statistics, as of the last."""
    layer, change = fitted([1.0, -1.0, 0.0], [1.0, 1.0, 0.0], [0.0] * 3, [0.0, 0.0, 1.0])
    assert layer.mean_offset.tolist() == [1000.0, -1000.0, 0.0]
    assert layer.log_var_scale.tolist() == [50.0, 50.0, -50.0]
    assert change == 1000.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_variances_fit_in_half_precision_too(dtype):
    """Here 1e-5, which is below float16's smallest normal number."""
    layer = KalmanNorm2d(2, dtype=dtype)
    layer.running_var.copy_(torch.tensor([4e-5, 1e-4]))
    fit_prior(layer, Belief(torch.zeros(1, 2), torch.tensor([[1e-5, 2e-5]])))
    want = (layer.running_var.double() / torch.tensor([1e-5, 2e-5])).log()
    torch.testing.assert_close(layer.log_var_scale.double(), want, rtol=0.01, atol=0.0)


@pytest.mark.parametrize("offset, log_scale", [(3.0, 1.0), (-3.0, 1.0), (1.0, 2.0), (1.0, -2.0)])
def test_the_change_that_is_told_is_the_largest(offset, log_scale):
    layer, change = fitted([2 * offset, 0.0], [4 * math.exp(log_scale), 4.0], [0.0] * 2, [4.0] * 2)
    torch.testing.assert_close(layer.mean_offset, torch.tensor([offset, 0.0]))
    torch.testing.assert_close(layer.log_var_scale, torch.tensor([log_scale, 0.0]))
    assert change == pytest.approx(max(abs(offset), abs(log_scale)))
