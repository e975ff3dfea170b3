import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kn_detectron.layers import Belief, GroupKalmanNorm2d, KalmanNorm2d
from kn_detectron.layers import functional as KF
from kn_detectron.layers import passes
from kn_detectron.layers.passes import Layout

from .gpu_operators import gpu_operators, on_gpu
from .test_kalman_norm import prior_of, randomize

FORMATS = pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"]
)


def features(dtype=torch.float64, memory_format=torch.contiguous_format, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 6, 3, 5, generator=g, dtype=torch.float64)
    # Every image and every channel has its own mean and scale.
    a, b = torch.randn(2, 4, 6, 1, 1, generator=g, dtype=torch.float64)
    return (x * a.exp() + b).to(dtype, memory_format=memory_format)


def vectors(n, dtype=torch.float64):
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(9), dtype=dtype).unbind()


DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16]
)


@FORMATS
@DTYPES
def test_each_pass_against_its_formula(memory_format, dtype, place=lambda v: v):
    x, dy = (place(features(dtype, memory_format, seed)) for seed in (0, 1))
    center, scale, shift, slope = (place(v.to(passes.statistics_dtype(x))) for v in vectors(4))
    exact_x, exact_dy = x.double(), dy.double()
    c, s, b, k = (v.double().view(-1, 1, 1) for v in (center, scale, shift, slope))
    half = dtype in (torch.bfloat16, torch.float16)
    close = dict(rtol=2e-2, atol=5e-2) if half else dict(rtol=1e-4, atol=1e-5)

    def check(got, want, **tolerance):
        torch.testing.assert_close(got.double(), want, **tolerance)

    mean, var = passes.moments(x)
    assert mean.dtype == var.dtype == passes.statistics_dtype(x)
    check(mean, exact_x.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    check(var, exact_x.var((0, 2, 3), unbiased=False), rtol=1e-4, atol=1e-5)
    y = passes.transform(x, center, scale, shift)
    check(y, s * (exact_x - c) + b, **close)
    for wanted in (True, False):
        scaled, dy_x, dy_sum = passes.gradient_sums(dy, x, center, scale, wanted)
        check(dy_x, (exact_dy * (exact_x - c)).sum((0, 2, 3)), rtol=1e-3, atol=1e-2)
        check(dy_sum, exact_dy.sum((0, 2, 3)), rtol=1e-3, atol=1e-2)
        assert (scaled is not None) == wanted
        if wanted:
            check(scaled, s * exact_dy, **close)
    dx = passes.input_gradient(dy, x, scale, center, slope, shift)
    check(dx, s * exact_dy + k * (exact_x - c) + b, **close)
    inv_std, a, one = scale.abs(), shift, place(torch.ones(1, dtype=torch.int32))
    vectors_of_network = inv_std * slope, center, slope, inv_std, scale, a, one
    through_network = passes.network_gradient(dy, x, *vectors_of_network)
    inside = exact_dy - b - s * s.square() * (exact_x - c)
    check(through_network, k * s.abs() * inside, **close)
    for result in (y, dx, through_network):
        assert result.dtype == dtype and result.is_contiguous(memory_format=memory_format)


@FORMATS
@DTYPES
def test_each_pass_as_a_gpu_makes_it(memory_format, dtype):
    with gpu_operators() as called:
        test_each_pass_against_its_formula(memory_format, dtype, on_gpu)
    assert len(called) == 4 or torch.cuda.is_available()


@FORMATS
@DTYPES
@pytest.mark.parametrize("numbers", [1, 40, 100])  # fewer than a row of pixels, and no divisors
def test_each_pass_in_pieces(memory_format, dtype, numbers, monkeypatch):
    monkeypatch.setattr(passes, "_FEW", 0)
    monkeypatch.setattr(passes, "_PIECE", numbers * torch.empty(0, dtype=dtype).element_size())
    monkeypatch.setattr(passes, "_SMALL_PLANE", 0)
    test_each_pass_against_its_formula(memory_format, dtype)


@pytest.mark.parametrize("small_plane", [0, 128])
def test_input_gradient_of_tensors_of_different_formats(small_plane, monkeypatch):
    monkeypatch.setattr(passes, "_SMALL_PLANE", small_plane)
    vectors_of_half = [v.float() for v in vectors(4)]
    x, dy = (features(torch.bfloat16, seed=seed) for seed in (0, 1))
    want = passes.input_gradient(dy, x, *vectors_of_half)
    for other in (dy.to(memory_format=torch.channels_last), dy.transpose(2, 3).contiguous().mT):
        assert torch.equal(passes.input_gradient(other, x, *vectors_of_half), want)


@pytest.mark.parametrize("dtype, bits", [(torch.bfloat16, 8), (torch.float16, 11)])
def test_input_gradient_in_half_precision_is_off_by_rounding_only(dtype, bits):
    x, dy = (features(dtype, seed=seed) for seed in (0, 1))
    scale, center, slope, offset = (v.float() for v in vectors(4))
    dx = passes.input_gradient(dy, x, scale, center, slope, offset)
    s, c, k, b = (v.double().view(-1, 1, 1) for v in (scale, center, slope, offset))
    large, small = s * dy.double(), k * (x.double() - c) + b
    # Once the scale, once the small term, once the sum, each by half a unit in the last place.
    bound = 2.0**-bits * (large.abs() + small.abs() + (large + small).abs())
    assert ((dx.double() - large - small).abs() <= 1.01 * bound).all()


def test_moments_of_large_features():
    """Far from 0, where a sum of squares would lose everything."""
    x = features(torch.float32).repeat(1, 1, 40, 20) + 1000
    assert x.numel() > passes._FEW
    mean, var = passes.moments(x)
    exact = x.double()
    torch.testing.assert_close(mean.double(), exact.mean((0, 2, 3)), rtol=1e-6, atol=0)
    want = exact.var((0, 2, 3), unbiased=False)
    torch.testing.assert_close(var.double(), want, rtol=1e-4, atol=0)


@FORMATS
@pytest.mark.parametrize("rows, groups", [(1, 6), (2, 6), (4, 6), (4, 2), (4, 3), (1, 2), (2, 1)])
@pytest.mark.parametrize("measuring", [True, False])
def test_filter_batch_of_any_layout_is_its_parts(memory_format, rows, groups, measuring):
    """Against autograd through the plain functions, on one tensor for each set of pixels."""
    x = features(memory_format=memory_format).requires_grad_()
    prior = [v.requires_grad_() for v in prior_of(groups, rows, dtype=torch.float64)]
    gain = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    weight, bias = (v.clone().requires_grad_() for v in vectors(2))
    leaves = [x, *prior, weight, bias] + [gain] * measuring
    layout = Layout(rows, groups)

    y, belief, _, measured_var = KF.filter_batch(
        *(x, Belief(*prior), gain, weight, bias, 1e-5), layout=layout, measuring=measuring
    )
    sets = x.reshape(rows, 4 // rows, groups, 6 // groups, 3, 5)
    mean, var = sets.mean((1, 3, 4, 5)), sets.var((1, 3, 4, 5), unbiased=False)
    posterior = Belief(*prior)
    if measuring:
        posterior = KF.update(posterior, Belief(mean, var), gain)
        torch.testing.assert_close(measured_var, var)
    per_channel = [
        v.repeat_interleave(4 // rows, 0).repeat_interleave(6 // groups, 1) for v in posterior
    ]
    want = KF.normalize(x, Belief(*per_channel), weight, bias, 1e-5)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(belief, posterior)
    assert y.is_contiguous(memory_format=memory_format)
    got, want = (
        torch.autograd.grad(out.sigmoid().sum() + b.mean.sin().sum() + b.var.log().sum(), leaves)
        for out, b in ((y, belief), (want, posterior))
    )
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)


@FORMATS
def test_an_image_alone_is_that_image_of_a_batch(memory_format):
    layer = randomize(GroupKalmanNorm2d(3, 6)).double()
    x, prior = features(memory_format=memory_format), prior_of(6, dtype=torch.float64)
    dy = features(memory_format=memory_format, seed=1)
    results = []
    for images in (slice(None), slice(2, 3)):
        part = x[images].detach().requires_grad_()
        y, _ = layer(part, prior=prior)
        (dx,) = torch.autograd.grad(y, part, dy[images])
        results.append((y[2:3], dx[2:3]) if len(part) == 4 else (y, dx))
    for together, alone in zip(*results):
        torch.testing.assert_close(alone, together)
        assert alone.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
def test_gradcheck_with_the_process_model(released, rows):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 2, 2, generator=g)
    mean, var = torch.randn(1, 3, generator=g), torch.rand(1, 3, generator=g) + 0.5
    first, second, weight, bias = torch.randn(4, 3, generator=g) * 0.5
    leaves = [x, mean, var, first, second, torch.tensor(0.3), weight, bias]

    def f(x, mean, var, first, second, gain, weight, bias):
        y, belief, _, _ = KF.filter_batch(
            *(x, Belief(mean, var), gain, weight, bias, 1e-5),
            layout=Layout(rows, 3),
            model=(None, None, first) if released else (first, second, None),
            mixture=released,
            passes_on_y=not released,
        )
        return (y, *belief)

    leaves = [leaf.double().requires_grad_() for leaf in leaves]
    if released:
        leaves[4] = leaves[4].detach()
    assert torch.autograd.gradcheck(f, leaves)


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
