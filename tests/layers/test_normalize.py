"""The node over features: values, gradients, and what it costs."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kn_detectron.layers import Belief, GroupKalmanNorm2d, KalmanNorm2d
from kn_detectron.layers.filter import Spec, Vectors
from kn_detectron.layers.normalize import _composed, filter_and_normalize
from kn_detectron.layers.sets import Sets

from ..models import randomize
from .inputs import features, prior_of
from .test_passes import FORMATS, vectors
from .test_sets import LAYOUTS


def layer_vectors(channels, rows=1, paper=False, head=False, affine=True):
    """Vectors of a layer as after some training, in double precision, as leaves."""
    g = torch.Generator().manual_seed(5)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    tensors = dict(weight=randn(channels), bias=randn(channels)) if affine else {}
    if not head:
        tensors.update(
            prior_mean=randn(rows, channels),
            prior_var=randn(rows, channels).exp(),
            gain_logit=torch.tensor(-0.8, dtype=torch.float64),
            gain_scale=torch.tensor(0.9, dtype=torch.float64),
        )
        model = ["process_noise"] if paper else ["mean_offset", "log_var_scale"]
        tensors.update({name: 0.5 * randn(channels) for name in model})
    return Vectors(**{name: t.requires_grad_(name != "gain_scale") for name, t in tensors.items()})


@FORMATS
@LAYOUTS
@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("kind", ["measures", "gain 0", "head", "not affine"])
def test_the_node_is_what_autograd_makes_of_its_parts(memory_format, rows, groups, paper, kind):
    """Values and gradients against torch's own nodes, with a gradient of the belief as well."""
    x = features(memory_format=memory_format).requires_grad_()
    v = layer_vectors(6, rows, paper, kind == "head", kind != "not affine")
    spec = Spec(Sets(4, 6, rows, groups), 1e-5, paper, kind != "gain 0")
    leaves = [x, *(t for t in v if t is not None and t.requires_grad)]
    results = []
    for function in (filter_and_normalize, lambda *args: _composed(*args, None)):
        y, belief = function(x, v, spec)
        loss = (y.sigmoid() * vectors(1)[0].view(-1, 1, 1)).sum()
        loss = loss + belief.mean.sin().sum() + belief.var.clamp_min(1e-3).log().sum()
        results.append([y, *belief, *torch.autograd.grad(loss, leaves, materialize_grads=True)])
    for got, want in zip(*results):
        torch.testing.assert_close(got, want)
    assert results[0][0].is_contiguous(memory_format=memory_format)


def strided(t):
    """The same numbers with others between them."""
    return t if t is None else torch.stack([t, torch.full_like(t, 1e6)], -1)[..., 0]


@FORMATS
@pytest.mark.parametrize("images", [1, 4])
@pytest.mark.parametrize("measures", [True, False])
@pytest.mark.parametrize("groups", [1, 6])
def test_no_more_is_read_of_a_vector_than_its_numbers(memory_format, images, measures, groups):
    """One group, or a prior that is no block of memory: kernels that ignore strides must not see it."""
    rows = images if groups == 1 else 1
    x = features(torch.float32, memory_format, shape=(images, 6, 3, 5)).requires_grad_()
    v = layer_vectors(6, rows if measures else 1)
    # Without a process model the prior itself is the posterior where nothing is measured.
    v = v._replace(mean_offset=None, log_var_scale=None)
    v = Vectors(*(t if t is None else strided(t.detach().float()).requires_grad_() for t in v))
    spec = Spec(Sets(images, 6, rows if measures else 1, groups), 1e-5, False, measures)
    leaves = [x, *(t for t in v if t is not None)]
    results = []
    for function in (filter_and_normalize, lambda *args: _composed(*args, None)):
        y, _ = function(x, v, spec)
        results.append([y, *torch.autograd.grad(y.sigmoid().sum(), leaves, materialize_grads=True)])
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    # Many values per channel: the share of each in the gradient of the statistics is tiny.
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(2, 3, 128, 128, generator=g) + 2).to(dtype)
    grads = []
    for x in (x.requires_grad_(), x.detach().double().requires_grad_()):
        layer = KalmanNorm2d(3, gain=0.5, variant="paper", process_model=False)
        y, posterior = layer(x, prior=Belief(torch.zeros(1, 3), torch.ones(1, 3)))
        assert y.dtype == x.dtype and posterior.var.dtype in (torch.float32, torch.float64)
        (posterior.mean.sum() * 100 + posterior.var.sum() * 1000).backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[0].double(), grads[1], rtol=2e-2, atol=1e-7)


@pytest.mark.parametrize("gain", [0.1, 0.0])
@pytest.mark.parametrize("kind", ["KN", "GKN"])
def test_layers_save_x_and_vectors_only(kind, gain):
    saved = []
    options = dict(gain=gain, learn_gain=False)
    layer = KalmanNorm2d(8, **options) if kind == "KN" else GroupKalmanNorm2d(2, 8, **options)
    x = torch.randn(2, 8, 16, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x, prior=prior_of(8))
    large = [t for t in saved if t.numel() > 64]
    assert len(large) == 1 and large[0].data_ptr() == x.data_ptr()


class Passes(TorchDispatchMode):
    """Counts the operations that read or write something of the size of the features."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.names = numel, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        every = [*args, *(out if isinstance(out, tuple) else [out])]
        large = any(isinstance(t, torch.Tensor) and t.numel() >= self.numel for t in every)
        if large and func.overloadpacket.__name__ != "detach":
            self.names.append(func.overloadpacket.__name__)
        return out


@pytest.mark.parametrize("gain, backward", [(0.1, 3), (0.0, 1)])
def test_number_of_passes_over_the_features(gain, backward):
    layer = randomize(KalmanNorm2d(8, gain=gain, learn_gain=False))
    x = torch.randn(2, 8, 16, 16, requires_grad=True)
    with Passes(x.numel()) as forward:
        y, _ = layer(x, prior=prior_of(8))
    dy = torch.randn_like(y)
    with Passes(x.numel()) as back:
        y.backward(dy)
    measuring = ["batch_norm_update_stats"] if gain else []
    assert forward.names == [*measuring, "native_batch_norm"]
    assert back.names[0] == "native_batch_norm_backward" and len(back.names) == backward


@pytest.mark.parametrize("kind", ["KN", "GKN"])
@pytest.mark.parametrize("how", ["checkpointed", "checkpointed, reentrant", "twice"])
def test_gradients_are_the_same_however_the_backward_is_run(kind, how):
    layer = KalmanNorm2d(8) if kind == "KN" else GroupKalmanNorm2d(2, 8)
    layer = randomize(layer).double()
    prior = Belief(*(t.requires_grad_() for t in prior_of(8, dtype=torch.float64)))
    x = features(shape=(2, 8, 3, 5)).requires_grad_()
    leaves = [x, *prior, *layer.parameters()]

    def run(x, mean, var):
        y, belief = layer(x, prior=Belief(mean, var))
        return y.square().sum() + belief.mean.sum() + belief.var.square().sum()

    want = torch.autograd.grad(run(x, *prior), leaves)
    if how == "twice":
        loss = run(x, *prior)
        torch.autograd.grad(loss, leaves, retain_graph=True)
        got = torch.autograd.grad(loss, leaves)
    else:
        # A reentrant checkpoint gives its gradients to the leaves only.
        checkpoint(run, x, *prior, use_reentrant="reentrant" in how).backward()
        got = [leaf.grad for leaf in leaves]
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
