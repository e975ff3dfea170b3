import pytest
import torch

from kn_detectron.layers import Belief
from kn_detectron.layers import belief as B
from kn_detectron.layers.prediction import predict


def inputs(rows=1, shape=(4, 3, 3, 3), groups=1):
    g = torch.Generator().manual_seed(0)
    channels = shape[1] * groups
    mean = torch.randn(rows, channels, generator=g, dtype=torch.float64)
    var = torch.rand(rows, channels, generator=g, dtype=torch.float64)
    weight = torch.randn(shape, generator=g, dtype=torch.float64)
    bias = torch.randn(shape[0], generator=g, dtype=torch.float64)
    return [v.requires_grad_() for v in (mean, var, weight, bias)]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("shape, groups", [((4, 3, 3, 3), 1), ((4, 3, 1, 1), 1), ((4, 3, 3, 1), 2)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_predict_is_conv2d_of_a_belief(rows, shape, groups, has_bias):
    leaves, results = inputs(rows, shape, groups), []
    mean, var, weight, bias = leaves
    for function in (predict, B.conv2d):
        out = function(Belief(mean, var), weight, bias if has_bias else None, groups)
        loss = (out.mean.sin() + out.var.log()).sum()
        grads = torch.autograd.grad(loss, leaves, allow_unused=not has_bias)
        results.append([*out, *grads[: 3 + has_bias]])
    for got, want in zip(*results):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("rows", [1, 2])
def test_gradcheck(rows):
    def f(mean, var, weight, bias):
        return tuple(predict(Belief(mean, var), weight, bias))

    assert torch.autograd.gradcheck(f, inputs(rows))


def test_an_empty_belief_has_no_rows_behind_it_either():
    mean, var, weight, _ = inputs(rows=0)
    out = predict(Belief(mean, var), weight)
    assert out.mean.shape == (0, 4)
    out.mean.sum().backward()
    assert not weight.grad.any() and mean.grad.shape == (0, 3)


def test_autocast_does_not_round():
    mean, var, weight, _ = (v.detach().float().requires_grad_() for v in inputs())
    want = predict(Belief(mean, var), weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = predict(Belief(mean, var), weight)
        grads = torch.autograd.grad(got.mean.sum() + got.var.sum(), [mean, weight])
    assert torch.equal(got.mean, want.mean) and torch.equal(got.var, want.var)
    exact = torch.autograd.grad(want.mean.sum() + want.var.sum(), [mean, weight])
    assert all(torch.equal(a, b) for a, b in zip(grads, exact))


def test_frozen_filters_get_no_gradient():
    mean, var, weight, _ = inputs()
    out = predict(Belief(mean, var), weight.detach())
    assert torch.autograd.grad(out.var.sum(), var)[0].abs().sum() > 0


def test_wrong_channels():
    mean, var, weight, _ = inputs()
    with pytest.raises(ValueError, match="belief about 3 channels cannot cross .* of 4 input"):
        predict(Belief(mean, var), weight.new_zeros(2, 4, 1, 1))
