"""A convolution and its norm in one, where nothing is measured: against the two by themselves."""

import copy

import pytest
import torch
from torch import nn

from kn_detectron.layers import Belief, KalmanNorm2d, set_gain_scale

from ..models import randomize
from .inputs import features, prior_of

VARIANTS = pytest.mark.parametrize("variant", ["network", "paper"])


def pair(variant="network", bias=False, dtype=torch.float64, **options):
    """A convolution and a norm at gain 0, both as after some training."""
    torch.manual_seed(0)
    groups = options.pop("groups", 1)
    conv = nn.Conv2d(6, 4, 3, padding=1, stride=2, bias=bias, groups=groups)
    options = {"gain": 0.0, "learn_gain": False, **options}
    norm = KalmanNorm2d(4, variant=variant, **options)
    return conv.to(dtype), randomize(norm).to(dtype).train()


def beliefs(dtype=torch.float64):
    return Belief(*(t.requires_grad_() for t in prior_of(4, dtype=dtype)))


@VARIANTS
@pytest.mark.parametrize("bias, groups", [(False, 1), (True, 1), (True, 2)])
@pytest.mark.parametrize("kind", ["affine", "not affine", "no process model", "annealed"])
def test_values_gradients_and_statistics_are_those_of_the_two(variant, bias, groups, kind):
    options = {
        "affine": {},
        "not affine": {"affine": False},
        "no process model": {"process_model": False},
        "annealed": {"gain": 0.3, "learn_gain": True},
    }[kind]
    conv, norm = pair(variant, bias, groups=groups, **options)
    set_gain_scale(norm, 0.0)
    twin = copy.deepcopy(norm)
    x, prior = features().requires_grad_(), beliefs()
    results = []
    for layer, function in (
        (norm, lambda: norm.absorbed(conv, x, prior)),
        (twin, lambda: twin(conv(x), prior=prior)),
    ):
        y, belief = function()
        loss = y.sigmoid().sum() + belief.mean.sin().sum() + belief.var.clamp_min(1e-3).log().sum()
        leaves = [x, *prior, *conv.parameters(), *layer.parameters()]
        gradients = torch.autograd.grad(loss, leaves, materialize_grads=True)
        results.append([y, *belief, *layer.buffers(), *gradients])
    for got, want in zip(*results):
        torch.testing.assert_close(got, want)
    assert norm.num_batches_tracked == 1


class Pair(nn.Module):
    """A convolution that absorbs its norm."""

    def __init__(self, conv, norm):
        super().__init__()
        self.conv, self.norm = conv, norm

    def forward(self, x, mean, var):
        y, belief = self.norm.absorbed(self.conv, x, Belief(mean, var))
        return y, *belief


@VARIANTS
def test_the_derivative_is_that_of_the_function(variant):
    both = Pair(*pair(variant, bias=True, track_running_stats=False))
    names, values = zip(*both.named_parameters())

    def run(x, mean, var, *parameters):
        return torch.func.functional_call(both, dict(zip(names, parameters)), (x, mean, var))

    inputs = (features(shape=(2, 6, 3, 3)).requires_grad_(), *beliefs(), *values)
    assert torch.autograd.gradcheck(run, inputs)
    # Second derivatives raise, as those of the layer.
    y, *_ = run(*inputs)
    (first,) = torch.autograd.grad(y.square().sum(), both.conv.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_only_the_belief_or_only_the_feature_may_be_used():
    conv, norm = pair(bias=True)
    y, _ = norm.absorbed(conv, features(), beliefs())
    y.sum().backward()
    assert conv.weight.grad.any() and conv.bias.grad.any() and norm.weight.grad.any()
    conv.zero_grad()
    _, belief = norm.absorbed(conv, features(), beliefs())
    (belief.mean.sum() + belief.var.sum()).backward()
    assert conv.weight.grad is None or not conv.weight.grad.any()


def test_no_features_are_kept_for_the_backward():
    conv, norm = pair(dtype=torch.float32)
    x, saved = torch.randn(2, 6, 64, 64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y, _ = norm.absorbed(conv, x, prior_of(4))
    large = {t.data_ptr() for t in saved if t.numel() >= y.numel()}
    assert large == {x.data_ptr()}  # which the convolution itself needs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision(dtype):
    conv, norm = pair(dtype=torch.float32, bias=True)
    x = features(torch.float32)
    want, _ = norm.absorbed(conv, x, prior_of(4))
    y, belief = norm.to(dtype).absorbed(conv.to(dtype), x.to(dtype), prior_of(4))
    assert y.dtype == dtype and belief.mean.dtype == torch.float32
    error = (y.float() - want).abs().max() / want.abs().max()
    assert error < 8 * torch.finfo(dtype).eps


def test_under_autocast_the_feature_is_of_half_precision():
    conv, norm = pair(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, belief = norm.absorbed(conv, features(torch.float32), prior_of(4))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and belief.mean.dtype == torch.float32
    assert conv.weight.grad.dtype == norm.weight.grad.dtype == torch.float32


def test_a_layer_that_measures_or_is_watched_cannot_be_absorbed():
    _, norm = pair(dtype=torch.float32)
    x, prior = torch.randn(2, 6, 8, 8), prior_of(4)
    assert norm.can_be_absorbed(x, prior)
    assert not norm.can_be_absorbed(x[:0], prior)
    assert not norm.can_be_absorbed(x, None)
    assert not norm.can_be_absorbed(x, prior_of(4, rows=2))
    assert not norm.eval().can_be_absorbed(x, prior)
    assert not KalmanNorm2d(4, gain=None).can_be_absorbed(x, None)
    norm.train()
    for register in ("forward_hook", "forward_pre_hook", "full_backward_hook"):
        handle = getattr(norm, f"register_{register}")(lambda *_: None)
        assert not norm.can_be_absorbed(x, prior)
        handle.remove()
        assert norm.can_be_absorbed(x, prior)
    norm = KalmanNorm2d(4, gain=0.3)
    assert not norm.can_be_absorbed(x, prior)
    norm.set_gain_scale(0.0)
    assert norm.can_be_absorbed(x, prior)


def test_wrong_channels_and_heads_raise():
    conv, norm = pair(dtype=torch.float32)
    x = torch.randn(2, 6, 8, 8)
    with pytest.raises(ValueError, match="expected 5 channels"):
        KalmanNorm2d(5, gain=0.0, learn_gain=False).absorbed(conv, x, prior_of(5))
    with pytest.raises(ValueError, match="head of a chain"):
        KalmanNorm2d(4, gain=None).absorbed(conv, x, prior_of(4))


@pytest.mark.parametrize("bias", [False, True])
def test_compiled_without_a_break(bias):
    conv, norm = pair(dtype=torch.float32, bias=bias)
    twin, prior = copy.deepcopy(norm), prior_of(4)
    run = torch.compile(
        lambda x: norm.absorbed(conv, x, prior), fullgraph=True, backend="aot_eager"
    )
    for size in (8, 12):
        x = torch.randn(2, 6, size, size)
        y, belief = run(x)
        want, wanted_belief = twin.absorbed(conv, x, prior)
        torch.testing.assert_close(y, want)
        torch.testing.assert_close(belief.mean, wanted_belief.mean)
        got, wanted = (torch.autograd.grad(out.square().sum(), conv.weight) for out in (y, want))
        torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(norm.running_var, twin.running_var)
