import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

from kn_detectron.layers import (
    Belief,
    GroupKalmanNorm2d,
    KalmanNorm2d,
    MonteCarloTransition,
    kalman_layers,
    set_gain_scale,
)
from kn_detectron.layers import belief as B

from . import reference


def make(kind="KN", channels=4, **options):
    if kind == "KN":
        return KalmanNorm2d(channels, **options)
    return GroupKalmanNorm2d(2, channels, **options)


def randomize(module, seed=0):
    """Parameters as after some training, so that no term is hidden by a 0 or a 1."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=g, dtype=p.dtype) * 0.3)
    return module


def prior_of(channels=4, rows=1, dtype=torch.float32, seed=3):
    g = torch.Generator().manual_seed(seed)
    mean = torch.randn(rows, channels, generator=g, dtype=dtype)
    return Belief(mean, torch.rand(rows, channels, generator=g, dtype=dtype) + 0.5)


@pytest.fixture
def x():
    return torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(1)) * 2 + 0.7


BOTH = pytest.mark.parametrize("kind", ["KN", "GKN"])
VARIANTS = pytest.mark.parametrize("variant", ["network", "paper"])


# Gain 1 and heads: BatchNorm and GroupNorm.


@pytest.mark.parametrize("options", [dict(gain=None), dict(gain=1.0, learn_gain=False)])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("affine", [True, False])
def test_gain_1_is_batch_norm(options, momentum, affine, x):
    ours = KalmanNorm2d(4, momentum=momentum, affine=affine, **options)
    theirs = nn.BatchNorm2d(4, momentum=momentum, affine=affine)
    if affine:
        randomize(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    prior = None if ours.is_head else prior_of()
    for step in range(3):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        scaled = (step + 1.0) * a, (step + 1.0) * b
        y = ours(scaled[0], prior=prior)
        y, want = y[0], theirs(scaled[1])
        torch.testing.assert_close(y, want)
        (y * x).sum().backward()
        (want * x).sum().backward()
        torch.testing.assert_close(a.grad, b.grad)
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name).grad, p.grad)
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("options", [dict(gain=None), dict(gain=1.0, learn_gain=False)])
def test_gain_1_is_group_norm(options, x):
    ours, theirs = GroupKalmanNorm2d(2, 4, **options), randomize(nn.GroupNorm(2, 4))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    prior = None if ours.is_head else prior_of()
    for training in (True, False):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y = ours.train(training)(a, prior=prior)
        y, want = y[0], theirs(b)
        torch.testing.assert_close(y, want)
        (y * x).sum().backward()
        (want * x).sum().backward()
        torch.testing.assert_close(a.grad, b.grad)
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name).grad, p.grad)


# Against reference maths.


def test_network_variant_against_reference(x):
    norm = randomize(KalmanNorm2d(4).double())
    x, prior = x.double(), prior_of(dtype=torch.float64)
    y, passed_on = norm(x, prior=prior)

    n = {k: v.detach().numpy() for k, v in norm.state_dict().items()}
    q = 1 / (1 + np.exp(-n["gain_logit"]))
    prior_mean = prior.mean[0].numpy() + n["mean_offset"] * np.sqrt(prior.var[0].numpy())
    prior_var = prior.var[0].numpy() * np.exp(n["log_var_scale"])
    batch_mean, batch_var = x.numpy().mean((0, 2, 3)), x.numpy().var((0, 2, 3))
    mean, var = (1 - q) * prior_mean + q * batch_mean, (1 - q) * prior_var + q * batch_var
    want = reference.normalize(x.numpy(), mean, var, n["weight"], n["bias"])
    np.testing.assert_allclose(y.detach(), want, rtol=1e-10)
    np.testing.assert_allclose(passed_on.mean[0].detach(), n["bias"])
    np.testing.assert_allclose(passed_on.var[0].detach(), n["weight"] ** 2)
    count = x.numel() / 4
    unbiased = (1 - q) * prior_var + q * batch_var * count / (count - 1)
    np.testing.assert_allclose(n["running_mean"], 0.1 * mean, rtol=1e-10)
    np.testing.assert_allclose(n["running_var"], 0.9 + 0.1 * unbiased, rtol=1e-10)


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
        prior = transition.conv(transition.relu(belief, y), conv)
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


def test_paper_variant_drops_a_prior_that_is_far_too_wide(x):
    norm = KalmanNorm2d(4, variant="paper", process_model=False)
    wide = Belief(torch.zeros(1, 4), 1000.0 * torch.ones(1, 4) * x.var())
    y, _ = norm(x, prior=wide)
    torch.testing.assert_close(y, nn.BatchNorm2d(4)(x))
    y.square().sum().backward()
    assert norm.gain_logit.grad.item() == 0  # there, but zero: DDP wants one


def test_paper_variant_adds_process_noise(x):
    norm, prior = KalmanNorm2d(4, variant="paper"), prior_of()
    without = KalmanNorm2d(4, variant="paper", process_model=False)
    added = 0.9 * F.softplus(norm.process_noise)
    torch.testing.assert_close(norm(x, prior=prior)[1].var, without(x, prior=prior)[1].var + added)
    assert (added > 0).all()


def test_group_version_against_reference(x):
    norm = randomize(GroupKalmanNorm2d(2, 4).double())
    x, prior = x.double(), prior_of(dtype=torch.float64)
    y, _ = norm(x, prior=prior)
    n = {k: v.detach().numpy() for k, v in norm.state_dict().items()}
    q = 1 / (1 + np.exp(-n["gain_logit"]))
    m = prior.mean[0].numpy() + n["mean_offset"] * np.sqrt(prior.var[0].numpy())
    v = prior.var[0].numpy() * np.exp(n["log_var_scale"])
    for image, out in zip(x.numpy(), y.detach().numpy()):
        for channels in (slice(0, 2), slice(2, 4)):
            prior_mean = m[channels].mean()
            prior_var = (v[channels] + m[channels] ** 2).mean() - prior_mean**2
            mean = (1 - q) * prior_mean + q * image[channels].mean()
            var = (1 - q) * prior_var + q * image[channels].var()
            want = (image[channels] - mean) / np.sqrt(var + 1e-5)
            want = want * n["weight"][channels, None, None] + n["bias"][channels, None, None]
            np.testing.assert_allclose(out[channels], want, rtol=1e-9, atol=1e-12)


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


# The gain.


def test_gain_is_a_sigmoid_and_starts_where_it_is_told():
    norm = KalmanNorm2d(4, gain=0.02)
    assert norm.gain.item() == pytest.approx(0.02)
    for logit in (-50.0, 50.0):
        norm.gain_logit.data.fill_(logit)
        assert 0 <= norm.gain.item() <= 1
    assert KalmanNorm2d(4, gain=None).gain is None


@BOTH
@pytest.mark.parametrize("learned", [True, False])
def test_at_gain_0_the_batch_is_not_measured(kind, learned, x):
    if learned:
        norm = make(kind)
        norm.set_gain_scale(0.0)
    else:
        norm = make(kind, gain=0.0, learn_gain=False)
    prior = prior_of()
    y, _ = norm(x, prior=prior)
    alone = torch.cat([norm(image[None], prior=prior)[0] for image in x])
    torch.testing.assert_close(y, alone, rtol=0, atol=0)
    # A measurement would spread the NaN to the other images of the batch.
    x[0, 0, 0, 0] = float("nan")
    got, _ = norm(x, prior=prior)
    assert got.isnan().sum() == 1
    torch.testing.assert_close(got[1:], y[1:], rtol=0, atol=0)
    # Training and inference are one function.
    torch.testing.assert_close(norm.eval()(x, prior=prior)[0], got, equal_nan=True)
    # DDP wants a gradient for every parameter.
    norm.train()(x, prior=prior)[0].nansum().backward()
    assert all(p.grad is not None for p in norm.parameters())


def test_gain_scale_survives_the_state_dict_and_switches_measuring(x):
    annealed = KalmanNorm2d(4)
    annealed.set_gain_scale(0.0)
    loaded = KalmanNorm2d(4)
    loaded.load_state_dict(annealed.state_dict())
    x[0] = float("nan")
    assert loaded(x, prior=prior_of())[0][1:].isfinite().all()
    loaded.load_state_dict(KalmanNorm2d(4).state_dict())
    assert not loaded(x, prior=prior_of())[0][1:].isfinite().any()


def test_set_gain_scale_reaches_all_layers_but_heads():
    model = nn.ModuleDict({"a": KalmanNorm2d(4), "b": make("GKN"), "c": KalmanNorm2d(4, gain=None)})
    assert list(kalman_layers(model)) == ["a", "b"]
    set_gain_scale(model, 0.5)
    assert model["a"].gain.item() == pytest.approx(0.05)
    assert model["b"].gain.item() == pytest.approx(0.05)
    with pytest.raises(ValueError, match="between 0 and 1, not 1.5"):
        set_gain_scale(model, 1.5)


# Statistics for inference.


def test_option_a_uses_moving_and_option_b_batch_statistics(x):
    a, b = KalmanNorm2d(4), KalmanNorm2d(4, eval_statistics="batch")
    prior = prior_of()
    trained, _ = a(x, prior=prior)
    b.load_state_dict(a.state_dict())
    running = copy.deepcopy(b.running_mean)
    torch.testing.assert_close(b.eval()(x, prior=prior)[0], trained)
    assert torch.equal(b.running_mean, running)
    want = F.batch_norm(x, a.running_mean, a.running_var, a.weight, a.bias)
    assert torch.equal(a.eval()(x), want)
    assert not a.needs_prior and b.needs_prior


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


def test_without_running_statistics(x):
    norm = KalmanNorm2d(4, track_running_stats=False)
    trained = norm(x, prior=prior_of())[0]
    torch.testing.assert_close(norm.eval()(x, prior=prior_of())[0], trained)


# What BatchNorm would trip over.


@BOTH
@VARIANTS
@pytest.mark.parametrize("gain", [0.1, None])
def test_empty_batch_passes_through(kind, variant, gain):
    norm = make(kind, gain=gain, variant=variant)
    before = copy.deepcopy(dict(norm.named_buffers()))
    x = torch.zeros(0, 4, 7, 7, requires_grad=True)
    prior = prior_of() if gain else None
    y, belief = norm(x, prior=prior)
    assert y.shape == x.shape and all(v.isfinite().all() for v in belief)
    y.sum().backward()
    assert x.grad is not None
    for name, p in norm.named_parameters():
        assert p.grad is not None and not p.grad.any(), name
    for name, buffer in norm.named_buffers():
        assert torch.equal(buffer, before[name]), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("gain", [0.1, None])
def test_non_finite_batch_changes_no_statistic(bad, gain, x):
    norm = KalmanNorm2d(4, gain=gain)
    prior = prior_of() if gain else None
    norm(x, prior=prior)
    before = copy.deepcopy(norm.state_dict())
    x[1, 2, 0, 0] = bad
    y, _ = norm(x, prior=prior)
    assert not y.isfinite().all()  # the fault is not hidden
    for name, value in norm.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_one_value_per_channel():
    x = torch.randn(1, 4, 1, 1)
    norm = KalmanNorm2d(4)
    y, _ = norm(x, prior=prior_of())
    assert y.isfinite().all() and norm.running_var.isfinite().all()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        KalmanNorm2d(4, gain=None)(x)


def test_no_prior_gradient(x):
    prior = Belief(*(v.requires_grad_() for v in prior_of()))
    norm = KalmanNorm2d(4, prior_gradient=False)
    norm(x, prior=prior)[0].square().sum().backward()
    assert prior.mean.grad is None and norm.log_var_scale.grad.abs().sum() > 0


# Precision, memory format, torch's machinery.


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(kind, dtype, x):
    norm, prior = make(kind), prior_of()
    want, _ = copy.deepcopy(norm)(x.to(dtype).float(), prior=prior)
    with torch.autocast("cpu", dtype=dtype):
        y, belief = norm(x.to(dtype).requires_grad_(), prior=prior)
    assert y.dtype == dtype
    assert belief.mean.dtype == belief.var.dtype == torch.float32
    torch.testing.assert_close(y.float(), want, rtol=1e-2, atol=1e-2)
    y.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in norm.parameters())


def test_float16_statistics_do_not_overflow():
    x = (torch.randn(2, 4, 32, 32) * 300).half()
    norm = KalmanNorm2d(4, gain=None)
    norm(x)
    want = 0.9 + 0.1 * x.double().transpose(0, 1).flatten(1).var(1)
    torch.testing.assert_close(norm.running_var.double(), want, rtol=1e-4, atol=0)


@BOTH
def test_channels_last(kind, x):
    norm, prior = make(kind), prior_of()
    want = norm(x, prior=prior)[0]
    y = norm(x.to(memory_format=torch.channels_last), prior=prior)[0]
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, want)


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
@VARIANTS
def test_deepcopy_and_state_dict_round_trip(kind, variant, x):
    norm = randomize(make(kind, variant=variant))
    norm(x, prior=prior_of())
    other = make(kind, variant=variant, gain=0.7)
    other.load_state_dict(norm.state_dict(), strict=True)
    want = norm.eval()(x, prior=prior_of())[0]
    assert torch.equal(other.eval()(x, prior=prior_of())[0], want)
    assert torch.equal(copy.deepcopy(norm)(x, prior=prior_of())[0], want)


def test_batch_norm_checkpoint_loads_strictly_and_leaves_the_filter_alone(x):
    bn = randomize(nn.BatchNorm2d(4))
    bn(x)
    norm = KalmanNorm2d(4, gain=0.3)
    norm.load_state_dict(bn.state_dict(), strict=True)
    assert norm.gain.item() == pytest.approx(0.3)
    assert torch.equal(norm.eval()(x), bn.eval()(x))


def test_half_a_kalman_checkpoint_is_refused():
    state = KalmanNorm2d(4).state_dict()
    del state["mean_offset"]
    with pytest.raises(RuntimeError, match="mean_offset"):
        KalmanNorm2d(4).load_state_dict(state, strict=True)


def test_innovation(x):
    prior = prior_of()
    mean, logvar = KalmanNorm2d(4).innovation(x, prior)
    torch.testing.assert_close(mean, (x.mean((0, 2, 3)) - prior.mean[0]) / prior.var[0].sqrt())
    torch.testing.assert_close(logvar, (x.var((0, 2, 3), unbiased=False) / prior.var[0]).log())
    assert [v.shape for v in make("GKN").innovation(x, prior)] == [(2,), (2,)]


# Wrong use.


@BOTH
def test_a_layer_with_gain_needs_its_prior_and_a_head_takes_none(kind, x):
    with pytest.raises(ValueError, match="needs prior="):
        make(kind)(x)
    with pytest.raises(ValueError, match="takes no prior"):
        make(kind, gain=None)(x, prior=prior_of())
    with pytest.raises(ValueError, match="expected 4D input"):
        make(kind)(x[0], prior=prior_of())


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(gain=1.2), "between 0 and 1, or is None for a head, not 1.2"),
        (dict(gain=0.0), "cannot be learned"),
        (dict(variant="nets"), "variant is one of .* not 'nets'"),
        (dict(eval_statistics="x"), "eval_statistics is one of .* not 'x'"),
    ],
)
def test_bad_arguments(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        KalmanNorm2d(4, **options)
