import numpy as np
import pytest
import torch
from detectron2.layers import ROIAlign

from kn_detectron.layers import Belief
from kn_detectron.layers import belief as B

from . import reference


def random_belief(rows, channels, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    mean = torch.randn(rows, channels, generator=g, dtype=dtype)
    var = torch.rand(rows, channels, generator=g, dtype=dtype) + 0.1
    return Belief(mean, var)


def sample(belief, n, *size, seed=0):
    """n feature maps of independent Gaussian pixels."""
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, belief.mean.shape[1], *size, generator=g, dtype=belief.mean.dtype)
    return belief.mean[0, :, None, None] + belief.var[0, :, None, None].sqrt() * noise


def moments(x):
    """Mean and variance per channel, and their standard errors."""
    x = x.transpose(0, 1).flatten(1)
    mean, var, n = x.mean(1), x.var(1), x.shape[1]
    fourth = (x - mean[:, None]).pow(4).mean(1)
    return mean, var, (var / n).sqrt(), ((fourth - var**2) / n).sqrt()


def assert_within_sampling_error(belief, x, sigmas=5.0):
    mean, var, mean_error, var_error = moments(x)
    assert ((belief.mean[0] - mean).abs() < sigmas * mean_error).all()
    assert ((belief.var[0] - var).abs() < sigmas * var_error).all()


@pytest.mark.parametrize("var", [1e-12, 1e-3, 1.0, 1e12])
@pytest.mark.parametrize("ratio", [-40, -12, -5, -3, -1, -1e-3, 0, 1e-3, 1, 3, 5, 12, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_relu_in_the_tails(var, ratio, dtype):
    var = torch.tensor([[var]], dtype=dtype)
    mean = ratio * var.sqrt()
    want_mean, want_var = reference.rectified_moments(mean.item(), var.item())
    got = B.relu(Belief(mean, var))
    # What is lost where the ReLU is closed: see the derivation in the package.
    eps, tail = torch.finfo(dtype).eps, max(1.0, -ratio)
    # Subnormal numbers have fewer digits.
    floor = torch.finfo(dtype).tiny
    assert got.mean.item() == pytest.approx(float(want_mean), rel=16 * eps * tail**2, abs=floor)
    assert got.var.item() == pytest.approx(float(want_var), rel=16 * eps * tail**4, abs=floor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_relu_without_variance_is_the_relu_of_the_mean(dtype):
    mean = torch.tensor([[-3.0, -1e-30, 0.0, 1e-30, 2.0, 1e30]], dtype=dtype, requires_grad=True)
    var = torch.zeros_like(mean, requires_grad=True)
    out = B.relu(Belief(mean, var))
    assert torch.equal(out.mean, mean.clamp_min(0))
    assert torch.equal(out.var, torch.zeros_like(mean))
    (out.mean.sum() + out.var.sum()).backward()
    assert mean.grad.isfinite().all() and var.grad.isfinite().all()


def test_relu_gradients():
    mean = torch.tensor([[-3.0, -0.5, 0.0, 0.7, 4.0]], dtype=torch.float64, requires_grad=True)
    var = torch.tensor([[0.5, 2.0, 1.0, 0.3, 1.5]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m, v: B.relu(Belief(m, v)), (mean, var))


def test_relu_gradient_at_mean_zero_is_one_half():
    # Where every network starts: norm biases are 0.
    mean = torch.zeros(1, 1, requires_grad=True)
    B.relu(Belief(mean, torch.ones(1, 1))).mean.sum().backward()
    assert mean.grad.item() == pytest.approx(0.5)


def test_relu_against_monte_carlo():
    belief = random_belief(1, 6)
    assert_within_sampling_error(B.relu(belief), sample(belief, 4, 200, 200).relu())


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    "options", [{}, {"stride": 2}, {"dilation": 2}, {"stride": 2, "dilation": 3}]
)
def test_conv_against_monte_carlo(groups, options):
    belief = random_belief(1, 8)
    torch.manual_seed(1)
    conv = torch.nn.Conv2d(8, 4, 3, groups=groups, dtype=torch.float64, **options)
    got = B.conv2d(belief, conv.weight, conv.bias, groups)
    # Outputs that share inputs are dependent, which the error estimate does not know.
    y = conv(sample(belief, 8, 200, 200))[:, :, ::5, ::5]
    assert_within_sampling_error(got, y)


@pytest.mark.parametrize("groups", [1, 3])
def test_conv_against_loops(groups):
    belief = random_belief(2, 6)
    weight = torch.randn(9, 6 // groups, 3, 5, dtype=torch.float64)
    got = B.conv2d(belief, weight, groups=groups)
    for row in range(2):
        mean, var = reference.conv_moments(
            belief.mean[row].numpy(), belief.var[row].numpy(), weight.numpy(), groups
        )
        np.testing.assert_allclose(got.mean[row], mean, rtol=1e-12)
        np.testing.assert_allclose(got.var[row], var, rtol=1e-12)


def test_conv_ignores_the_border():
    # What is documented: away from the border the belief is right with padding too.
    belief = random_belief(1, 4)
    conv = torch.nn.Conv2d(4, 3, 3, padding=1, dtype=torch.float64)
    y = conv(sample(belief, 8, 200, 200))[:, :, 1:-1:4, 1:-1:4]
    assert_within_sampling_error(B.conv2d(belief, conv.weight, conv.bias), y)


def test_conv_keeps_float32_under_autocast():
    belief = random_belief(1, 64, torch.float32)
    weight = torch.randn(8, 64, 1, 1, requires_grad=True)

    def slope(belief):
        return torch.autograd.grad(belief.mean.sum() + belief.var.sum(), weight)[0]

    want = B.conv2d(belief, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = B.conv2d(belief, weight)
        gradient = slope(got)
    assert got.mean.dtype == torch.float32
    assert torch.equal(got.mean, want.mean) and torch.equal(got.var, want.var)
    assert torch.equal(gradient, slope(want))


def test_conv_refuses_other_channels():
    with pytest.raises(ValueError, match="about 5 channels .* of 4 input channels"):
        B.conv2d(random_belief(1, 5), torch.randn(3, 4, 1, 1, dtype=torch.float64))


def test_conv_of_no_rows():
    empty = Belief(torch.zeros(0, 4), torch.zeros(0, 4))
    assert B.conv2d(empty, torch.randn(6, 2, 3, 3), groups=2).mean.shape == (0, 6)


def test_sum_against_monte_carlo():
    a, b = random_belief(1, 5, seed=1), random_belief(1, 5, seed=2)
    x = sample(a, 4, 100, 100, seed=1) + sample(b, 4, 100, 100, seed=2)
    assert_within_sampling_error(B.add(a, b), x)


def test_product_against_monte_carlo():
    a, b = random_belief(1, 4, seed=1), random_belief(1, 4, seed=2)
    y = sample(a, 4, 200, 200, seed=3) * sample(b, 4, 200, 200, seed=4)
    assert_within_sampling_error(B.product(a, b), y)


def test_scale_against_monte_carlo():
    b = random_belief(1, 3)
    assert_within_sampling_error(B.scale(b, -0.5), -0.5 * sample(b, 4096, 16, 16))


def test_mixture_is_what_features_together_measure():
    beliefs = [random_belief(1, 3, seed=seed) for seed in range(3)]
    together = torch.cat([sample(b, 2048, 16, 16, seed=k) for k, b in enumerate(beliefs)])
    assert_within_sampling_error(B.mixture(beliefs), together)


def test_max_pool_is_the_identity():
    belief = random_belief(1, 5)
    assert B.max_pool2d(belief) is belief


def test_roi_align_gives_regions_their_image():
    belief = random_belief(3, 4)
    got = B.roi_align(belief, [2, 0, 1])
    assert torch.equal(got.mean, belief.mean[[0, 0, 2]])
    assert torch.equal(got.var, belief.var[[0, 0, 2]])
    assert B.roi_align(belief, [0, 0, 0]).mean.shape == (0, 4)


def test_roi_align_keeps_the_belief_about_smooth_features():
    # The rule's reason: on features that vary slowly, interpolated pixels are like pixels.
    belief = random_belief(1, 2)
    coarse = sample(belief, 60, 6, 6)
    x = torch.nn.functional.interpolate(coarse, scale_factor=48, mode="nearest").float()
    rois = torch.tensor([[i, 24.0, 24.0, 120.0, 120.0] for i in range(60)])
    y = ROIAlign((14, 14), 1.0, 2, aligned=True)(x, rois)
    assert B.roi_align(belief, [1]) is belief
    mean, var, *_ = moments(y.double())
    assert (mean - belief.mean[0]).abs().max() < 0.1
    assert (var / belief.var[0]).log().abs().max() < 0.2


def test_normalized_squares_in_float32():
    weight = torch.tensor([300.0, 1e-4]).half()  # whose squares half precision lacks
    got = B.normalized(weight, None)
    assert got.var.dtype == torch.float32
    torch.testing.assert_close(got.var, weight.float().square()[None])


def test_normalized_is_bias_and_squared_weight():
    torch.manual_seed(0)
    x = torch.randn(64, 3, 20, 20, dtype=torch.float64) * 3 + 7
    norm = torch.nn.BatchNorm2d(3, eps=1e-12, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([-2.0, 0.5, 1.0]))
        norm.bias.copy_(torch.tensor([0.3, -1.0, 0.0]))
    got = B.normalized(norm.weight, norm.bias)
    mean, var, *_ = moments(norm(x))
    assert torch.allclose(got.mean[0], mean)
    assert torch.allclose(got.var[0], var, rtol=1e-4)


@pytest.mark.parametrize("variant", ["network", "paper"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_frozen_is_the_posterior_of_the_running_statistics(variant, dtype):
    norm = torch.nn.BatchNorm2d(3, dtype=dtype).eval()
    with torch.no_grad():
        for t in (norm.weight, norm.bias, norm.running_mean):
            t.copy_(torch.tensor([-2.0, 0.5, 1.0]))
        norm.running_var.copy_(torch.tensor([4.0, 1.0, 0.25]))
    got = B.frozen(norm, variant)
    if variant == "network":
        want = B.normalized(norm.weight, norm.bias)
    else:
        want = Belief(norm.running_mean[None], norm.running_var[None])
    assert got.mean.dtype == torch.promote_types(dtype, torch.float32)
    for g, w in zip(got, want):
        assert torch.equal(g, w.to(g.dtype))
    assert B.relu(got).var.isfinite().all()  # half precision lacks what this needs
    plain = torch.nn.BatchNorm2d(3, affine=False)
    if variant == "network":  # without scale and shift: mean 0 and variance 1
        got = B.frozen(plain, variant)
        assert torch.equal(got.mean, torch.zeros(1, 3)) and torch.equal(got.var, torch.ones(1, 3))


def test_gradcheck_through_all_operations():
    def chain(mean, var, w1, w2, bias):
        belief = B.relu(Belief(mean, var))
        shortcut = B.conv2d(belief, w2, bias)
        belief = B.relu(B.conv2d(belief, w1, groups=2))
        belief = B.add(B.conv2d(belief, w2), shortcut)
        return B.roi_align(B.max_pool2d(belief), [2, 1])

    g = torch.Generator().manual_seed(0)
    belief = random_belief(2, 4)
    w1 = torch.randn(4, 2, 3, 3, generator=g, dtype=torch.float64)
    w2 = torch.randn(3, 4, 1, 1, generator=g, dtype=torch.float64)
    bias = torch.randn(3, generator=g, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (*belief, w1, w2, bias)]
    assert torch.autograd.gradcheck(chain, inputs)
