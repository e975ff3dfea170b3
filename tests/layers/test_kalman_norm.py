"""Chains of layers, and what else ``test_norm_module.py`` does not ask of every layer."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

from kn_detectron.layers import (
    Belief,
    KalmanNorm2d,
    MonteCarloTransition,
    set_gain_scale,
)
from kn_detectron.layers import belief as B

from ..models import randomize
from . import reference
from .inputs import BOTH, make, prior_of

VARIANTS = pytest.mark.parametrize("variant", ["network", "paper"])


# Chains.


def test_paper_variant_is_the_released_code():
    """Three layers, fixed q = 0.1, no R: conv, KN, ReLU, conv, KN, ... by Monte Carlo."""
    torch.manual_seed(0)
    convs = [nn.Conv2d(i, 6, 3, padding=1, bias=False).double() for i in (3, 6, 6)]
    norms = [
        randomize(
            KalmanNorm2d(
                6,
                gain=0.1 if k else None,
                learn_gain=False,
                variant="paper",
                process_model=False,
            ).double(),
            k,
        )
        for k in range(3)
    ]
    transition = MonteCarloTransition()
    images = torch.randn(2, 3, 9, 7, dtype=torch.float64)

    torch.manual_seed(5)
    y, belief = norms[0](convs[0](images), prior=None)
    for conv, norm in zip(convs[1:], norms[1:]):
        y = y.relu()
        prior = transition.conv(transition.activation(belief, y, "relu"), conv)
        y, belief = norm(conv(y), prior=prior)

    def conv2d(x, conv):
        return F.conv2d(torch.as_tensor(x), conv.weight, padding=1).detach().numpy()

    torch.manual_seed(5)
    affine = [(n.weight.detach().numpy(), n.bias.detach().numpy()) for n in norms]
    features = conv2d(images, convs[0])
    mean, var = features.mean((0, 2, 3)), features.var((0, 2, 3))
    out = reference.normalize(features, mean, var, *affine[0])
    for conv, (weight, bias) in zip(convs[1:], affine[1:]):
        noise = torch.randn(1, 6, 9, 7, dtype=torch.float64).numpy()
        sampled = mean[None, :, None, None] + np.sqrt(var)[None, :, None, None] * noise
        sampled = conv2d(np.maximum(sampled, 0), conv)
        features = conv2d(np.maximum(out, 0), conv)
        out, mean, var = reference.released_layer(features, sampled, weight, bias)

    # The layers keep the logit of 0.1 that float32 has room for: a gain of 0.1 within 1e-8.
    np.testing.assert_allclose(y.detach(), out, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(belief.mean[0].detach(), mean, rtol=1e-6)
    np.testing.assert_allclose(belief.var[0].detach(), var, rtol=1e-6)


@BOTH
@VARIANTS
@pytest.mark.parametrize("learn_gain", [True, False])
def test_gradcheck_through_a_chain_of_three_layers(kind, variant, learn_gain):
    torch.manual_seed(0)
    head = variant == "paper"
    options = dict(variant=variant, learn_gain=learn_gain)
    norms = [
        randomize(make(kind, gain=None if head and k == 0 else 0.3, **options).double(), k)
        for k in range(3)
    ]
    names = [[n for n, _ in norm.named_parameters()] for norm in norms]
    filters = [torch.randn(4, c, 3, 3, dtype=torch.float64) * 0.4 for c in (2, 4, 4)]
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    image = prior_of(2, dtype=torch.float64)

    def chain(x, mean, var, w0, w1, w2, *parameters):
        parameters = iter(parameters)
        belief = Belief(mean, var)
        for k, (norm, weight) in enumerate(zip(norms, (w0, w1, w2))):
            own = {name: next(parameters) for name in names[k]}
            prior = None
            if not norm.is_head:
                prior = B.conv2d(B.relu(belief) if k else belief, weight)
            x, belief = torch.func.functional_call(
                norm,
                own,
                (F.conv2d(x, weight, padding=1),),
                dict(prior=prior),
            )
            x = F.softplus(x)  # gradcheck wants a smooth function; the belief has its ReLU
        return (x, *belief)

    parameters = [p for norm in norms for p in norm.parameters()]
    inputs = [t.detach().requires_grad_() for t in (x, *image, *filters, *parameters)]
    assert torch.autograd.gradcheck(chain, inputs, fast_mode=True)


# The running statistics.


def test_moving_statistics_approach_the_population():
    """The posterior of many small batches averages to the truth if the prior is right."""
    torch.manual_seed(0)
    truth = Belief(torch.tensor([[1.0, -2.0]]), torch.tensor([[4.0, 0.25]]))
    norm = KalmanNorm2d(2, gain=0.3, momentum=0.02)
    for _ in range(400):
        noise = torch.randn(1, 2, 4, 4)
        norm(truth.mean[..., None, None] + truth.var[..., None, None].sqrt() * noise, prior=truth)
    torch.testing.assert_close(norm.running_mean, truth.mean[0], rtol=0, atol=0.05)
    torch.testing.assert_close(norm.running_var, truth.var[0], rtol=0.05, atol=0)


# Precision, torch's machinery.


@BOTH
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("mean, std", [(0.0, 300.0), (10.0, 0.1)])
def test_float16_statistics_neither_overflow_nor_cancel(kind, memory_format, mean, std):
    """Squares beyond float16's range; a variance far smaller than the square of the mean."""
    x = mean + std * torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    x = x.half().contiguous(memory_format=memory_format)
    head, body = make(kind, gain=None), make(kind, gain=0.5)
    prior = Belief(torch.zeros(1, 4), torch.full((1, 4), std**2))
    for norm, call in (
        (head, lambda norm, x: norm(x)),
        (body, lambda norm, x: norm(x, prior=prior)[0]),
    ):
        exact = copy.deepcopy(norm).double()
        y, want = call(norm, x), call(exact, x.double())
        assert y.dtype == torch.float16
        torch.testing.assert_close(y.double(), want, rtol=2e-3, atol=2e-3)
        for name, statistic in exact.named_buffers():
            if "running" in name:
                got = norm.get_buffer(name).double()
                torch.testing.assert_close(got, statistic, rtol=1e-4, atol=1e-6)


class Block(nn.Module):
    """A convolution and a norm of a chain."""

    def __init__(self, kind, **options):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3), make(kind, **options)

    def forward(self, x, belief):
        prior = B.conv2d(B.relu(belief), self.conv.weight, self.conv.bias)
        return self.norm(self.conv(x.relu()), prior=prior)


@pytest.fixture
def graphs():
    """The graphs that ``compiled`` was given since the test began."""
    torch._dynamo.reset()
    return []


def compiled(block, graphs):
    def backend(graph, example_inputs, **kwargs):
        graphs.append(graph)
        return aot_eager(graph, example_inputs, **kwargs)

    return torch.compile(copy.deepcopy(block), backend=backend, fullgraph=True)


@BOTH
@VARIANTS
def test_one_compiled_layer_trains_at_all_sizes(kind, variant, graphs):
    block = Block(kind, variant=variant).double()
    other = compiled(block, graphs)
    for size in ((3, 7, 9), (1, 12, 6), (3, 9, 14), (1, 8, 8)):
        x = torch.randn(size[0], 4, *size[1:], dtype=torch.float64)
        outputs = [model(x, prior_of(dtype=torch.float64)) for model in (other, block)]
        for y, belief in outputs:
            (y.sigmoid() * y.detach().cos()).sum().backward()
        torch.testing.assert_close(*outputs)
        for (name, p), q in zip(block.named_parameters(), other.parameters()):
            torch.testing.assert_close(q.grad, p.grad, msg=name)
        for b, c in zip(block.buffers(), other.buffers()):
            torch.testing.assert_close(b, c)
    assert len(graphs) <= 4  # not one for each size


def test_annealing_to_gain_0_compiles_once_more(graphs):
    block, x = Block("KN"), torch.randn(2, 4, 9, 9)
    other = compiled(block, graphs)
    for scale in (1.0, 0.8, 0.4, 0.0, 0.0):
        set_gain_scale(other, scale)
        set_gain_scale(block, scale)
        torch.testing.assert_close(other(x, prior_of())[0], block(x, prior_of())[0])
    assert len(graphs) == 2


@BOTH
def test_innovation(kind, x):
    layer, prior = randomize(make(kind, eps=0.25)), prior_of()
    mean = prior.mean[0] + layer.mean_offset * prior.var[0].sqrt()
    var = prior.var[0] * layer.log_var_scale.exp()
    pixels = x
    if kind == "GKN":  # what is normalised together is an image's group of two channels
        mean, var = ((v[0::2] + v[1::2]) / 2 for v in (mean, var + mean.square()))
        var = var - mean.square()
        pixels = x.view(len(x), 2, 2, -1).transpose(1, 2)
    else:
        pixels = x.transpose(0, 1).reshape(1, 1, 4, -1)
    measured_var, measured_mean = torch.var_mean(pixels, (1, 3), unbiased=False)
    want = (
        ((measured_mean - mean) / (var + 0.25).sqrt()).mean(0),
        ((measured_var + 0.25) / (var + 0.25)).log().mean(0),
    )
    torch.testing.assert_close(layer.innovation(x, prior), want)


def test_a_dead_channel_has_finite_innovations():
    constant = torch.full((2, 4, 3, 3), 0.5)
    nothing = Belief(torch.zeros(1, 4), torch.zeros(1, 4))
    for norm in ("KN", "GKN"):
        assert all(torch.isfinite(part).all() for part in make(norm).innovation(constant, nothing))


# Wrong use.


def test_bad_arguments():
    with pytest.raises(ValueError, match="eval_statistics is one of .* not 'x'"):
        KalmanNorm2d(4, eval_statistics="x")


def test_running_statistics_in_half_precision_are_those_of_batch_norm():
    torch.manual_seed(0)
    norm, kalman = nn.BatchNorm2d(2).half(), KalmanNorm2d(2, gain=None).half()
    for _ in range(3):
        x = (300.0 * torch.randn(4, 2, 16, 16)).half()  # whose variance half precision lacks
        norm(x)
        kalman(x)
    torch.testing.assert_close(kalman.running_var, norm.running_var, rtol=0.01, atol=0.0)
    torch.testing.assert_close(kalman.running_mean, norm.running_mean, rtol=0.01, atol=0.1)


def test_a_posterior_that_half_precision_lacks_changes_no_statistic():
    norm = KalmanNorm2d(2, gain=0.0, learn_gain=False).half()
    norm.running_var.fill_(math.nan)  # and one that it has takes the place of whatever is there
    x = torch.randn(2, 2, 4, 4).half()
    norm(x, prior=B.Belief(torch.zeros(1, 2), torch.full((1, 2), 4.0)))
    assert norm.running_var.tolist() == [4.0, 4.0] and norm.num_batches_tracked == 1
    norm(x, prior=B.Belief(torch.zeros(1, 2), torch.full((1, 2), 9e4)))
    assert norm.running_var.tolist() == [4.0, 4.0] and norm.num_batches_tracked == 1


def test_a_first_batch_that_is_not_finite_is_no_part_of_the_average_over_all():
    norm, want = (KalmanNorm2d(3, gain=None, momentum=None) for _ in range(2))
    norm(torch.full((2, 3, 4, 4), math.nan))
    assert norm.num_batches_tracked == 0
    x = torch.randn(2, 3, 4, 4)
    norm(x)
    want(x)
    assert torch.equal(norm.running_mean, want.running_mean)
    assert torch.equal(norm.running_var, want.running_var)
