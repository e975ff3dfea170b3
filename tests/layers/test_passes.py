import pytest
import torch

from kn_detectron.layers import GroupKalmanNorm2d, passes

from ..models import randomize
from .gpu_operators import gpu_operators, on_gpu
from .inputs import features, prior_of

FORMATS = pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"]
)


def vectors(n, dtype=torch.float64):
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(9), dtype=dtype).unbind()


DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16]
)


@FORMATS
@DTYPES
def test_each_pass_against_its_formula(memory_format, dtype, place=lambda v: v):
    x, dy = (place(features(dtype, memory_format, seed)) for seed in (0, 1))
    mean, scale, bias, d_var = (place(v.to(passes.statistics_dtype(x))) for v in vectors(4))
    exact_x, exact_dy = x.double(), dy.double()
    c, s, b, k = (v.double().view(-1, 1, 1) for v in (mean, scale, bias, d_var))
    half = dtype in (torch.bfloat16, torch.float16)
    close = dict(rtol=2e-2, atol=5e-2) if half else dict(rtol=1e-4, atol=1e-5)

    def check(got, want, **tolerance):
        torch.testing.assert_close(got.double(), want, **tolerance)

    measured, var = passes.moments(x)
    assert measured.dtype == var.dtype == passes.statistics_dtype(x)
    check(measured, exact_x.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    check(var, exact_x.var((0, 2, 3), unbiased=False), rtol=1e-4, atol=1e-5)
    y = passes.transform(x, mean, scale, bias)
    check(y, s * (exact_x - c) + b, **close)
    frozen_dx, *frozen_sums = passes.frozen_gradient(dy, x, mean, scale)
    check(frozen_dx, s * exact_dy, **close)
    for sum_dy, sum_dy_xmu in (frozen_sums, passes.gradient_sums(dy, x, mean)):
        check(sum_dy, exact_dy.sum((0, 2, 3)), rtol=1e-3, atol=1e-2)
        check(sum_dy_xmu, (exact_dy * (exact_x - c)).sum((0, 2, 3)), rtol=1e-3, atol=1e-2)
    count = 4
    dx = passes.input_gradient(dy, x, scale, mean, bias, d_var, count)
    check(dx, s * exact_dy + b / count + 2 * k * (exact_x - c) / count, **close)
    invstd, n = scale.abs(), place(torch.tensor([count], dtype=torch.int32))
    by_batch_norm = passes.batch_norm_gradient(
        *(dy, x, mean, invstd, d_var, bias, d_var * scale, n)
    )
    inside = exact_dy - b / count - s.square() * (exact_x - c) * (k * s) / count
    check(by_batch_norm, k * s.abs() * inside, **close)
    for result in (y, frozen_dx, dx, by_batch_norm):
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
    want = passes.input_gradient(dy, x, *vectors_of_half, 8)
    for other in (dy.to(memory_format=torch.channels_last), dy.transpose(2, 3).contiguous().mT):
        assert torch.equal(passes.input_gradient(other, x, *vectors_of_half, 8), want)


@pytest.mark.parametrize("dtype, bits", [(torch.bfloat16, 8), (torch.float16, 11)])
def test_input_gradient_in_half_precision_is_off_by_rounding_only(dtype, bits):
    x, dy = (features(dtype, seed=seed) for seed in (0, 1))
    scale, mean, d_mean, d_var = (v.float() for v in vectors(4))
    dx = passes.input_gradient(dy, x, scale, mean, d_mean, d_var, 2)
    s, c, b, k = (v.double().view(-1, 1, 1) for v in (scale, mean, d_mean, d_var))
    large, small = s * dy.double(), k * (x.double() - c) + b / 2
    # Once the scale, once the small term, once the sum, each by half a unit in the last place.
    bound = 2.0**-bits * (large.abs() + small.abs() + (large + small).abs())
    assert ((dx.double() - large - small).abs() <= 1.01 * bound).all()


@pytest.mark.parametrize("name", ["moments", "gradient_sums", "batch_norm_gradient"])
def test_a_gpus_operators_get_dense_features_of_one_format(name):
    """Slices of a larger map and gradients of another format, which the operators read wrongly."""
    x = features(torch.float32).repeat(1, 1, 2, 2)[..., ::2, 1:6]
    dy = features(torch.float32, torch.channels_last, seed=1)
    assert not x.is_contiguous() and x.shape == dy.shape
    mean, scale, weight, sum_dy, sum_dy_xmu = (v.float() for v in vectors(5))
    rest = {
        "moments": (),
        "gradient_sums": (mean,),
        "batch_norm_gradient": (
            *(mean, scale.abs(), weight, sum_dy, sum_dy_xmu),
            torch.tensor([60], dtype=torch.int32),
        ),
    }[name]
    given = (x,) if name == "moments" else (dy, x)
    function = getattr(passes, name)
    want = function(*given, *rest)
    with gpu_operators():
        got = function(*(on_gpu(v) for v in given), *(on_gpu(v) for v in rest))
    torch.testing.assert_close(got, want, check_device=False, rtol=1e-4, atol=1e-4)


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
