import math

import mpmath
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kn_detectron.layers import Belief, activations
from kn_detectron.layers.activations import ACTIVATIONS, clip, leaky_relu, quadrature

from .test_belief import assert_within_sampling_error, random_belief, sample

# Written down once more, and where each changes its formula.
FORMULAS = {
    "relu6": (lambda x: min(max(x, 0), 6), [0, 6]),
    "hardtanh": (lambda x: min(max(x, -1), 1), [-1, 1]),
    "leaky_relu": (lambda x: x if x > 0 else x / 100, [0]),
    "hardsigmoid": (lambda x: min(max(x + 3, 0), 6) / 6, [-3, 3]),
    "hardswish": (lambda x: x * min(max(x + 3, 0), 6) / 6, [-3, 3]),
    "silu": (lambda x: x / (1 + mpmath.exp(-x)), [0]),
    "gelu": (lambda x: x * mpmath.ncdf(x), [0]),
    "sigmoid": (lambda x: 1 / (1 + mpmath.exp(-x)), [0]),
    "tanh": (mpmath.tanh, [0]),
    "elu": (lambda x: x if x > 0 else mpmath.expm1(x), [0]),
    "mish": (lambda x: x * mpmath.tanh(mpmath.log1p(mpmath.exp(x))), [0]),
    "softplus": (lambda x: mpmath.log1p(mpmath.exp(x)), [0]),
}


def moments_by_mpmath(function, bends, mean, std):
    with mpmath.workdps(20):
        edges = [mean - 12 * std, mean + 12 * std]
        edges += [b for b in [*bends, mean] if edges[0] < b < edges[1]]
        edges = sorted(set(mpmath.mpf(e) for e in edges))

        def expectation(f):
            return mpmath.quad(lambda x: f(x) * mpmath.npdf(x, mean, std), edges)

        first = expectation(function)
        second = expectation(lambda x: (function(x) - first) ** 2)
        return float(first), float(second)


@pytest.mark.parametrize(
    "mean, std", [(-3.0, 0.3), (0.0, 1.0), (0.7, 3.0), (5.0, 0.1), (-1.0, 20.0)]
)
@pytest.mark.parametrize("name", FORMULAS)
def test_moments_against_mpmath(name, mean, std):
    want_mean, want_var = moments_by_mpmath(*FORMULAS[name], mean, std)
    belief = Belief(torch.tensor([[mean]]).double(), torch.tensor([[std**2]]).double())
    parameters = ACTIVATIONS[name].parameters.values()
    got = ACTIVATIONS[name].moments(belief, *parameters)
    assert got.mean.item() == pytest.approx(want_mean, rel=1e-5, abs=1e-5 * std)
    assert got.var.item() == pytest.approx(want_var, rel=1e-4, abs=1e-6 * std**2)


@pytest.mark.parametrize("low, high", [(-0.3, math.inf), (-math.inf, 0.4), (-math.inf, math.inf)])
def test_one_bound_or_none(low, high):
    belief = Belief(torch.tensor([[-1.0, 0.2]]).double(), torch.tensor([[4.0, 0.3]]).double())
    want = [
        moments_by_mpmath(lambda x: min(max(x, low), high), [low, high], m.item(), v.sqrt().item())
        for m, v in zip(belief.mean[0], belief.var[0])
    ]
    got = clip(belief, low, high)
    assert torch.stack([got.mean[0], got.var[0]], 1).tolist() == [pytest.approx(w) for w in want]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_moments_against_monte_carlo_of_torch_own_module(name):
    belief = random_belief(1, 6)
    module = ACTIVATIONS[name].module()
    parameters = [getattr(module, p) for p in ACTIVATIONS[name].parameters]
    x = sample(belief, 4, 200, 200)
    assert_within_sampling_error(ACTIVATIONS[name].moments(belief, *parameters), module(x))
    assert torch.equal(ACTIVATIONS[name].function(x, *parameters), module(x))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients(name):
    mean = torch.tensor([[-3.0, -0.5, 0.0, 0.7, 4.0]], dtype=torch.float64, requires_grad=True)
    var = torch.tensor([[0.5, 2.0, 1.0, 0.3, 1.5]], dtype=torch.float64, requires_grad=True)
    parameters = ACTIVATIONS[name].parameters.values()
    assert torch.autograd.gradcheck(
        lambda m, v: ACTIVATIONS[name].moments(Belief(m, v), *parameters), (mean, var)
    )


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_without_variance_it_is_the_activation_of_the_mean(name):
    mean = torch.tensor([[-7.0, -1.0, 0.0, 2.0, 7.0]], requires_grad=True)
    var = torch.zeros_like(mean, requires_grad=True)
    parameters = ACTIVATIONS[name].parameters.values()
    got = ACTIVATIONS[name].moments(Belief(mean, var), *parameters)
    torch.testing.assert_close(got.mean, ACTIVATIONS[name].function(mean, *parameters))
    assert (got.var >= 0).all() and (got.var < 1e-11).all()
    (got.mean.sum() + got.var.sum()).backward()
    assert mean.grad.isfinite().all() and var.grad.isfinite().all()


def test_other_parameters_than_the_defaults():
    belief = random_belief(1, 6)
    x = sample(belief, 4, 200, 200)
    for module in (
        nn.Hardtanh(-0.3, 0.9),
        nn.LeakyReLU(0.3),
        nn.ELU(0.4),
        nn.GELU(approximate="tanh"),
        nn.Softplus(2.0),
    ):
        activation = next(a for a in ACTIVATIONS.values() if a.module is type(module))
        parameters = [getattr(module, p) for p in activation.parameters]
        assert_within_sampling_error(activation.moments(belief, *parameters), module(x))


def test_clip_is_as_exact_at_its_upper_bound_as_at_its_lower():
    mean, var = torch.tensor([[-4.0, 10.0]]), torch.tensor([[1.0, 1.0]])
    got = clip(Belief(mean, var), 0.0, 6.0)
    assert got.var[0, 0] == got.var[0, 1] > 0
    assert got.mean[0, 0] == pytest.approx(6.0 - got.mean[0, 1].item(), abs=1e-6)


def test_no_variance_within_bounds_is_larger_than_that_of_both_ends():
    """Beyond its precision too, where float32 leaves nothing of the difference."""
    mean = torch.linspace(-1e4, 1e4, 1001)[None]
    got = clip(Belief(mean, torch.full_like(mean, 1e8)), 0.0, 6.0)
    assert (got.var >= 0).all() and (got.var <= 9).all()


def test_a_step_is_integrated_at_its_place():
    """A sigmoid that is narrow beside the belief is a step, whose mean is the normal cdf."""
    belief = Belief(torch.tensor([[0.3]]).double(), torch.tensor([[1.0]]).double())
    got = quadrature(lambda x: torch.sigmoid(300 * x), belief)
    cdf = 0.5 * math.erfc(-0.3 / math.sqrt(2))
    assert got.mean.item() == pytest.approx(cdf, abs=1e-4)
    assert got.var.item() == pytest.approx(cdf * (1 - cdf), abs=1e-2)


def test_the_nodes_of_the_quadrature_are_copied_once():
    """On a GPU each copy waits for the device. Here a copy changes the dtype."""
    copies = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default and args[0].shape == (2, 32):
                copies.append(function)
            return function(*args, **(kwargs or {}))

    activations._legendre.cache_clear()
    belief = Belief(torch.zeros(1, 3), torch.ones(1, 3))
    with Copies():
        for _ in range(3):
            quadrature(torch.sigmoid, belief)
    assert len(copies) == 1


def test_a_first_call_in_inference_mode_leaves_nodes_to_train_with():
    activations._legendre.cache_clear()
    mean = torch.zeros(1, 3, requires_grad=True)
    with torch.inference_mode():
        quadrature(torch.sigmoid, Belief(torch.zeros(1, 3), torch.ones(1, 3)))
    quadrature(torch.sigmoid, Belief(mean, torch.ones(1, 3))).mean.sum().backward()
    assert (mean.grad > 0).all()
