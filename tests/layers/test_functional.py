import numpy as np
import pytest
import torch

from kn_detectron.layers import Belief
from kn_detectron.layers import functional as KF
from kn_detectron.layers.passes import Layout


def test_measure_is_batch_norms(rng=np.random.default_rng(0)):
    x = rng.normal(3, 2, (4, 5, 6, 7))
    got = KF.measure(torch.from_numpy(x))
    np.testing.assert_allclose(got.mean[0], x.mean((0, 2, 3)))
    np.testing.assert_allclose(got.var[0], x.var((0, 2, 3)))


def test_measure_groups_is_group_norms(rng=np.random.default_rng(0)):
    x = rng.normal(3, 2, (4, 6, 5, 7))
    got = KF.measure_groups(torch.from_numpy(x), 2)
    np.testing.assert_allclose(got.mean, x.reshape(4, 2, -1).mean(2))
    np.testing.assert_allclose(got.var, x.reshape(4, 2, -1).var(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_measure_of_half_precision_does_not_overflow_or_cancel(dtype):
    # In float16 300^2 overflows, and E[x^2] - E[x]^2 of the second one is 0.
    for x in (torch.randn(2, 1, 50, 50) * 300, torch.randn(2, 1, 50, 50) * 0.1 + 10):
        x = x.to(dtype)
        got = KF.measure(x)
        assert got.var.dtype == torch.float32
        assert got.var.item() == pytest.approx(x.double().var(unbiased=False).item(), rel=1e-4)


def test_group_belief_is_the_belief_about_a_pixel_of_the_group():
    # A group of two channels, with equally many pixels of each: its moments by counting.
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 1000, generator=g, dtype=torch.float64) * 2 + torch.arange(4.0)[:, None]
    channels = Belief(x.mean(2), x.var(2, unbiased=False))
    got = KF.group_belief(channels, 2)
    want = KF.measure_groups(x[..., None], 2)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("mixture", [False, True])
def test_update_is_equation_7(mixture):
    prior = Belief(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]))
    measured = Belief(torch.tensor([[5.0, 2.0]]), torch.tensor([[1.0, 8.0]]))
    got = KF.update(prior, measured, torch.tensor(0.25), mixture)
    torch.testing.assert_close(got.mean, torch.tensor([[2.0, 2.0]]))
    want = [2.5 + (0.25 * 0.75 * 16 if mixture else 0), 5.0]
    torch.testing.assert_close(got.var, torch.tensor([want]))


def test_update_with_mixture_is_the_variance_of_the_mixture():
    g = torch.Generator().manual_seed(0)
    prior = Belief(torch.tensor([[1.0]]), torch.tensor([[4.0]]))
    measured = Belief(torch.tensor([[-2.0]]), torch.tensor([[0.25]]))
    n = 400_000
    from_measured = torch.rand(n, generator=g) < 0.3
    x = torch.where(
        from_measured,
        torch.randn(n, generator=g) * 0.5 - 2.0,
        torch.randn(n, generator=g) * 2.0 + 1.0,
    )
    got = KF.update(prior, measured, torch.tensor(0.3), mixture=True)
    assert got.mean.item() == pytest.approx(x.mean().item(), abs=0.02)
    assert got.var.item() == pytest.approx(x.var().item(), rel=0.01)


def test_gate_looks_at_each_row():
    prior = Belief(torch.ones(2, 2), torch.tensor([[100.0, 102.0], [100.0, 99.0]]))
    measured = Belief(torch.zeros(2, 2), torch.ones(2, 2))
    got = KF.gate(prior, measured, 100.0)
    assert torch.equal(got.mean, torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    assert torch.equal(got.var, torch.tensor([[1.0, 1.0], [100.0, 99.0]]))


def test_gate_keeps_an_infinite_prior_out_of_the_gradients():
    prior = Belief(torch.tensor([[float("inf")]]), torch.tensor([[float("inf")]]))
    mean = torch.zeros(1, 1, requires_grad=True)
    measured = Belief(mean, torch.ones(1, 1))
    got = KF.update(KF.gate(prior, measured, 100.0), measured, torch.tensor(0.1), mixture=True)
    (got.mean + got.var).sum().backward()
    assert got.mean.item() == 0 and got.var.item() == 1 and mean.grad.item() == 1


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("affine", [True, False])
def test_gradcheck_of_normalize_and_measure(rows, affine):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 2, 2, generator=g, dtype=torch.float64, requires_grad=True)
    mean = torch.randn(rows, 4, generator=g, dtype=torch.float64, requires_grad=True)
    var = (torch.rand(rows, 4, generator=g, dtype=torch.float64) + 0.5).requires_grad_()
    weight, bias = torch.randn(2, 4, generator=g, dtype=torch.float64).requires_grad_()

    def f(x, mean, var, weight, bias):
        posterior = KF.update(Belief(mean, var), KF.measure(x), torch.tensor(0.3), mixture=True)
        return KF.normalize(
            x, posterior, weight if affine else None, bias if affine else None, 1e-5
        )

    assert torch.autograd.gradcheck(f, (x, mean, var, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_normalize_keeps_dtype_and_memory_format(dtype):
    x = torch.randn(2, 3, 4, 5).to(dtype, memory_format=torch.channels_last)
    belief = Belief(torch.zeros(1, 3), torch.ones(1, 3))
    y = KF.normalize(x, belief, torch.ones(3), torch.zeros(3), 1e-5)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)


def filter_and_normalize(x, prior, gain, weight, bias, eps, mixture=False, limit=None):
    """A batch through filter_batch: y, posterior, measured variance."""
    options = dict(layout=Layout(1, x.shape[1]), mixture=mixture, limit=limit)
    y, posterior, _, measured_var = KF.filter_batch(x, prior, gain, weight, bias, eps, **options)
    return y, posterior, measured_var


def plain(x, prior, gain, weight, bias, eps, mixture=False, limit=None):
    """What filter_and_normalize does, out of the functions that autograd differentiates."""
    posterior = measured = KF.measure(x)
    if prior is not None:
        if limit is not None:
            prior = KF.gate(prior, measured, limit)
        posterior = KF.update(prior, measured, gain, mixture)
    return KF.normalize(x, posterior, weight, bias, eps), posterior, measured.var


@pytest.mark.parametrize("has_prior", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("mixture, limit", [(False, None), (True, 100.0), (True, 1e-3)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_filter_and_normalize_is_its_parts(has_prior, affine, mixture, limit, memory_format):
    g = torch.Generator().manual_seed(0)

    def inputs(x):
        leaves = [x, torch.randn(1, 4, generator=g), torch.rand(1, 4, generator=g) + 0.5]
        leaves += [torch.tensor(0.3), *torch.randn(2, 4, generator=g)]
        return [leaf.double().requires_grad_() for leaf in leaves]

    x = (torch.randn(3, 4, 5, 6, generator=g) * 2 + 1).contiguous(memory_format=memory_format)
    leaves, results = inputs(x), []
    for function in (filter_and_normalize, plain):
        x, mean, var, gain, weight, bias = leaves
        y, posterior, measured_var = function(
            x,
            Belief(mean, var) if has_prior else None,
            gain if has_prior else None,
            weight if affine else None,
            bias if affine else None,
            1e-5,
            mixture=mixture and has_prior,
            limit=limit if has_prior else None,
        )
        # The posterior goes on down the chain, so its gradient counts too.
        loss = y.sigmoid().sum() + posterior.mean.square().sum() + posterior.var.log().sum()
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        results.append([y, *posterior, measured_var, *grads])
    for got, want in zip(*results):
        if got is None or want is None:
            assert got is want
        else:
            torch.testing.assert_close(got, want)
    assert results[0][0].is_contiguous(memory_format=memory_format)
    assert results[0][4].is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("mixture", [False, True])
def test_gradcheck_of_filter_and_normalize(mixture):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 3, 2, generator=g)
    mean, var = torch.randn(1, 3, generator=g), torch.rand(1, 3, generator=g) + 0.5
    leaves = [x, mean, var, torch.tensor(0.3), *torch.randn(2, 3, generator=g)]

    def f(x, mean, var, gain, weight, bias):
        y, posterior, _ = filter_and_normalize(
            x, Belief(mean, var), gain, weight, bias, 1e-5, mixture
        )
        return (y, *posterior)

    assert torch.autograd.gradcheck(f, [leaf.double().requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_filter_and_normalize_in_half_precision(dtype):
    # Many values per channel: the share of each in the gradient of the statistics is tiny.
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(2, 3, 128, 128, generator=g) + 2).to(dtype)
    prior, gain = Belief(torch.zeros(1, 3), torch.ones(1, 3)), torch.tensor(0.5)
    grads = []
    for x in (x.requires_grad_(), x.detach().double().requires_grad_()):
        y, posterior, _ = filter_and_normalize(x, prior, gain, None, None, 1e-5)
        assert y.dtype == x.dtype and posterior.var.dtype in (torch.float32, torch.float64)
        (posterior.mean.sum() * 100 + posterior.var.sum() * 1000).backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[0].double(), grads[1], rtol=2e-2, atol=1e-7)


def test_filter_and_normalize_saves_x_and_vectors_only():
    saved = []
    x = torch.randn(2, 8, 16, 16, requires_grad=True)
    prior, weight = Belief(torch.zeros(1, 8), torch.ones(1, 8)), torch.ones(8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        filter_and_normalize(x, prior, torch.tensor(0.1), weight, torch.zeros(8), 1e-5)
    large = [t for t in saved if t.numel() > 8]
    assert len(large) == 1 and large[0].data_ptr() == x.data_ptr()
