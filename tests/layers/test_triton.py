"""Triton's kernels against the plain functions in double precision, which never use them.

On a CPU the kernels run in Triton's interpreter, which must be chosen before Triton is imported:
there the tests run in a process of their own. On a GPU they run as they are.
"""

import copy
import os
import re
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

from benchmark.measure import is_free
from kn_detectron.layers import Belief, ClosedFormTransition, KalmanNorm2d, kalman_layers, passes
from kn_detectron.layers import triton as choice
from kn_detectron.layers.belief import Convolve, Rectify
from kn_detectron.layers.filter import Running, Spec, Vectors
from kn_detectron.layers.filter_gradient import Filter
from kn_detectron.layers.sets import Sets

from ..models import build_rcnn, fpn_rcnn_cfg, randomize, rcnn_inputs
from .gpu_operators import gpu_operators, on_gpu
from .inputs import prior_of
from .test_norm_module import (
    PRECISIONS,
    assert_close,
    batch,
    cases,
    running_statistics,
    statistics_dtype,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if not (sys.platform == "linux" and torch.version.cuda):  # else PyTorch has brought it
    pytest.importorskip("triton")
kernels = pytest.mark.skipif(
    not INTERPRETED and DEVICE == "cpu", reason="run by test_kernels_in_the_interpreter"
)


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="the kernels run as they are")
def test_kernels_in_the_interpreter():
    env = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    env.pop("PYTEST_ADDOPTS", None)  # it may ask for less to be printed
    files = __file__, os.path.join(os.path.dirname(__file__), "test_norm_module.py")
    tests = "test_triton or float32 or in_every_precision or norm_of_torch or non_finite"
    chosen = f"not GroupKalmanNorm2d and ({tests})"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen]
    run = subprocess.run([*command, *files], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


def close(got, want, rtol=1e-4, atol=2e-6, msg=None):
    torch.testing.assert_close(got.double().cpu(), want.cpu(), rtol=rtol, atol=atol, msg=msg)


def doubled(tensors):
    return [t.detach().double().requires_grad_() for t in tensors]


def chosen(dtype=torch.float32):
    """What runs for the moments behind a ReLU."""
    belief = (torch.ones(1, 3, device=DEVICE, dtype=dtype) for _ in range(2))
    return choice.fastest(Rectify, *belief)


@pytest.fixture
def unchecked(monkeypatch):
    """Nothing has been checked yet."""
    monkeypatch.setattr(choice, "_verdicts", {})


@kernels
def test_they_are_used_here():
    assert chosen().__module__ == "kn_detectron.layers.triton.kernels"
    assert chosen(torch.float64) is Rectify


@kernels
def test_relu():
    mean = torch.linspace(-12, 12, 1201, device=DEVICE)[None].requires_grad_()
    var = (torch.linspace(-2, 2, 1201, device=DEVICE)[None].exp() ** 3).requires_grad_()
    results = []
    for leaves in ([mean, var], doubled([mean, var])):
        out = ClosedFormTransition().activation(Belief(*leaves), leaves[0], "relu")
        grads = torch.autograd.grad(out.mean.sum() + 3 * out.var.sum(), leaves)
        results.append([*out, *grads])
    for got, want in zip(*results):
        close(got, want)


@kernels
def test_relu_of_what_is_not_a_number():
    mean = torch.tensor([[float("nan"), 1.0]], device=DEVICE)
    out = ClosedFormTransition().activation(Belief(mean, torch.ones_like(mean)), mean, "relu")
    assert out.mean.isnan().tolist() == out.var.isnan().tolist() == [[True, False]]


@kernels
@pytest.mark.parametrize(
    "operation, variants",
    [
        (Rectify, [(0,), (1,), (16,)]),
        (Convolve, [(1, 16, 16), (9, 16, 1), (4, 8, 8), (49, 16, 0)]),
        (
            Filter,
            [
                (paper, True, has_scale, True, "yes", block, is_aligned)
                for paper in (False, True)
                for has_scale in (False, True)
                for block, is_aligned in (
                    (1, False),
                    (2, False),
                    (16, True),
                    (64, True),
                    (64, False),
                )
            ],
        ),
    ],
    ids=["Rectify", "Convolve", "Filter"],
)
def test_what_is_checked_is_what_is_launched(operation, variants, monkeypatch):
    """Triton compiles a kernel anew for sizes of 1 and for multiples of 16."""
    from kn_detectron.layers.triton import kernels as twins
    from kn_detectron.layers.triton.check import disagreement

    twin, seen = getattr(twins, operation.__name__), []
    right = twin.forward

    def forward(*arguments):
        rest = [1] if operation is Convolve and len(arguments) == 3 else []  # its default
        seen.append(twin.variant(*arguments, *rest))
        return right(*arguments)

    monkeypatch.setattr(twin, "forward", staticmethod(forward))
    for variant in variants:
        assert disagreement(operation, twin, variant, torch.device(DEVICE)) is None
    # Where a prior can be dropped, one that is dropped comes second.
    assert list(dict.fromkeys(seen)) == variants
    dropped = [v for v in variants if operation is Filter and v[0]]
    assert len(seen) == len(variants) + len(dropped)


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_only_beliefs_of_one_row_have_kernels(rows):
    """A belief about no images, detections or regions has none, and a kernel would read one."""
    from kn_detectron.layers.triton import kernels as twins

    belief, weight = Belief(torch.zeros(rows, 4), torch.ones(rows, 4)), torch.ones(2, 4, 1, 1)
    assert (twins.Convolve.variant(*belief, weight, 1) is not None) == (rows == 1)
    spec = Spec(Sets(1, 4, 1, 4), 1e-5, False, True)
    arguments = Vectors(*belief), Belief(torch.zeros(1, 4), torch.ones(1, 4)), spec, None, 9
    assert (twins.Filter.variant(*arguments) is not None) == (rows == 1)


@kernels
def test_a_belief_of_no_rows_crosses_a_block():
    conv = nn.Conv2d(6, 6, 3, bias=False).to(DEVICE)
    belief = [torch.zeros(0, 6, device=DEVICE, requires_grad=True) for _ in range(2)]
    transition = ClosedFormTransition()
    source = transition.activation(Belief(*belief), torch.zeros(0, 6, 1, 1), "relu")
    prior = transition.conv(source, conv)
    assert prior.mean.shape == prior.var.shape == (0, 6)
    (prior.mean.sum() + prior.var.sum()).backward()
    assert belief[0].grad.shape == (0, 6) and not conv.weight.grad.any()


@kernels
def test_group_norms_detect_nothing():
    """The mask head has a belief of as many rows as there are detections."""
    cfg = fpn_rcnn_cfg("GKN", MODEL__DEVICE=DEVICE, MODEL__ROI_HEADS__SCORE_THRESH_TEST=1.0)
    model, rows = build_rcnn(cfg).eval(), []
    for layer in kalman_layers(model.roi_heads.mask_head).values():
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: rows.append(kwargs["prior"].mean.shape[0]),
            with_kwargs=True,
        )
    with torch.no_grad():
        found = model(rcnn_inputs(2, size=64))
    assert all(len(f["instances"]) == 0 for f in found)
    assert rows == [0, 0]


@kernels
def test_tensors_whose_addresses_are_no_multiples_of_16_have_no_kernels():
    """Triton compiles another form for them, which nothing has checked."""
    mean, var = torch.ones(1, 3, device=DEVICE), torch.ones(2, 1, 3, device=DEVICE)[1]
    assert mean.data_ptr() % 16 == 0 and var.data_ptr() % 16 == 12
    assert choice.fastest(Rectify, mean, var) is Rectify
    assert choice.fastest(Rectify, mean, var.clone()) is not Rectify


@kernels
def test_the_gradient_of_an_evaluation_before_a_training_step_is_an_error():
    """As with torch's BatchNorm: the statistics that it needs are no longer there."""
    layer, x = KalmanNorm2d(5).to(DEVICE), torch.randn(2, 5, 3, 3, device=DEVICE)
    prior = Belief(*(v.to(DEVICE) for v in prior_of(5)))
    loss = layer.eval()(x.requires_grad_(), prior=prior)[0].square().sum()
    y, _ = layer.train()(x, prior=prior)
    assert y.grad_fn.filter.__module__ == "kn_detectron.layers.triton.kernels"
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    statistics = layer.running_mean, layer.running_var, layer.num_batches_tracked
    before = [t._version for t in statistics]
    layer(x, prior=prior)
    assert all(t._version > version for t, version in zip(statistics, before))


@kernels
def test_a_kernel_that_is_wrong_where_the_prior_is_dropped_is_found(monkeypatch):
    from kn_detectron.layers.triton import kernels as twins
    from kn_detectron.layers.triton.check import disagreement

    right = twins.Filter.forward

    def forward(v, measured, spec, *rest):
        found = right(v, measured, spec, *rest)
        if (v.prior_var / measured.var).mean() >= 100:
            found[0].mean.add_(0.1)
        return found

    monkeypatch.setattr(twins.Filter, "forward", staticmethod(forward))
    for paper in (False, True):  # the network variant drops none
        variant = paper, True, True, True, "yes", 8, False
        found = disagreement(Filter, twins.Filter, variant, torch.device(DEVICE))
        assert (found is not None) == paper


@kernels
def test_tensors_on_several_devices_have_no_kernels(unchecked):
    mean, var = torch.ones(1, 3, device=DEVICE), torch.ones(1, 3, device="meta")
    assert choice.fastest(Rectify, mean, var) is Rectify


@kernels
def test_relu_where_nothing_varies():
    mean = torch.tensor([[-1.0, 0.0, 2.0]], device=DEVICE, requires_grad=True)
    var = torch.zeros(1, 3, device=DEVICE, requires_grad=True)
    out = ClosedFormTransition().activation(Belief(mean, var), mean, "relu")
    assert out.mean.tolist() == [[0, 0, 2]] and not out.var.any()
    grads = torch.autograd.grad(out.mean.sum() + out.var.sum(), [mean, var])
    assert grads[0].tolist()[0] == pytest.approx([0, 0.5, 1], abs=1e-6)
    assert grads[1].isfinite().all()


@kernels
@pytest.mark.parametrize("shape", [(70, 5, 1, 1), (9, 40, 3, 3), (6, 3, 7, 7), (5, 300, 1, 1)])
def test_convolution(shape):
    torch.manual_seed(0)
    conv = nn.Conv2d(shape[1], shape[0], shape[2:], bias=False).to(DEVICE)
    belief = [v.to(DEVICE).requires_grad_() for v in prior_of(shape[1])]
    d_mean, d_var = torch.randn(2, 1, shape[0]).to(DEVICE)
    results = []
    for leaves, conv in ((belief, conv), (doubled(belief), copy.deepcopy(conv).double())):
        out = ClosedFormTransition().conv(Belief(*leaves), conv)
        loss = (out.mean * d_mean + out.var * d_var).sum()
        results.append([*out, *torch.autograd.grad(loss, [*leaves, conv.weight])])
    for got, want in zip(*results):
        close(got, want, rtol=1e-4, atol=1e-5)


@kernels
def test_gate_where_a_channel_varies_nowhere():
    """0 / 0 must not keep the other channel's prior, which is far too wide."""
    layer = KalmanNorm2d(2, gain=0.5, variant="paper", process_model=False).to(DEVICE)
    x = torch.linspace(-1, 1, 18, device=DEVICE).view(1, 2, 3, 3)
    x[:, 1] = 0
    prior = Belief(torch.zeros(1, 2, device=DEVICE), torch.tensor([[1e6, 0.0]], device=DEVICE))
    close(layer(x, prior=prior)[1].var, x.double().var((0, 2, 3), unbiased=False)[None])


WITH_KERNELS = cases(lambda case: case.cls is KalmanNorm2d and not case.is_head)


@kernels
@WITH_KERNELS
def test_layers_use_them(case):
    """What they compute is compared by test_norm_module.py, in the interpreter too."""
    y, _ = case.run(case.make(device=DEVICE), batch().to(DEVICE))
    assert y.grad_fn.filter.__module__ == "kn_detectron.layers.triton.kernels"
    y.relu_().sum().backward()  # blocks work in place


@kernels
@WITH_KERNELS
@pytest.mark.parametrize("dtype, memory_format", PRECISIONS[1:], ids=str)
def test_layers_with_the_passes_of_a_gpu(case, dtype, memory_format):
    features, results = batch(dtype).to(DEVICE, memory_format=memory_format), []
    with gpu_operators() as called:
        for x, place in ((features, on_gpu), (features.double(), lambda x: x)):
            layer = case.make(dtype=statistics_dtype(x.dtype), device=DEVICE)
            leaves = [x.detach().requires_grad_(), *layer.parameters()]
            y, belief = case.run(layer, place(leaves[0]))
            loss = y.sigmoid().mean() + belief.mean.sin().mean() + belief.var.log().mean()
            grads = torch.autograd.grad(loss, leaves)
            results.append([y, *belief, *running_statistics(layer).values(), *grads])
    for got, want in zip(*results):
        assert_close(got, want, dtype)
    if DEVICE == "cpu":  # that they have been the passes of a GPU, backward too
        wanted = {"batch_norm_elemt", "batch_norm_backward_reduce"}
        if case.measures:
            wanted.add("batch_norm_update_stats")
            if layer.variant == "network":
                wanted.add("batch_norm_backward_elemt")
        assert called == wanted


class Launches(TorchDispatchMode):
    """Counts torch's operations, and in place of what a function does the launches it makes."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.count, self.inside = 0, False
        self.patch = monkeypatch

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.inside:
            self.count += not is_free(func)
        return func(*args, **(kwargs or {}))

    def counts_as(self, launches, module, *names):
        for name in names:
            counted = self._counted(getattr(module, name), launches)
            # A static method stays one.
            is_class = isinstance(module, type)
            self.patch.setattr(module, name, staticmethod(counted) if is_class else counted)

    def _counted(self, function, launches):
        def counted(*args, **kwargs):
            self.count += 0 if self.inside else launches
            was, self.inside = self.inside, True
            try:
                return function(*args, **kwargs)
            finally:
                self.inside = was

        return counted


@kernels
@pytest.mark.parametrize("variant", ["network", "paper"])
def test_launches_per_layer(variant, monkeypatch):
    """What ReLU, convolution and norm of a chain launch beyond the convolution and the ReLU.

    Each of our kernels is one launch. The passes over the features are counted as the CUDA operators
    that they call on a GPU, one kernel each, save that a reduction in channels_last clears a counter
    first, and a sum of two terms takes two.
    """
    from kn_detectron.layers.triton import kernels as twins

    layers = 4
    torch.manual_seed(0)
    convs = [nn.Conv2d(5, 5, 1, bias=False).to(DEVICE) for _ in range(layers)]
    norms = [randomize(KalmanNorm2d(5, variant=variant)).to(DEVICE) for _ in range(layers)]
    transition = ClosedFormTransition()
    x = torch.randn(2, 5, 4, 4, device=DEVICE)
    start = Belief(*(v.to(DEVICE).requires_grad_() for v in prior_of(5)))

    def network(normalised):
        y, belief = x, start
        for conv, norm in zip(convs, norms):
            source = transition.activation(belief, y, "relu") if normalised else None
            y = nn.functional.conv2d(y.relu(), conv.weight)
            if normalised:
                y, belief = norm(y, prior=transition.conv(source, conv))
        return y.square().sum()

    network(True).backward()  # the kernels are checked at first use
    launches = Launches(monkeypatch)
    for twin in (twins.Rectify, twins.Convolve, twins.Filter):
        launches.counts_as(1, twin, "forward", "backward")
    launches.counts_as(2, passes, "moments", "gradient_sums", "input_gradient")
    launches.counts_as(1, passes, "transform", "batch_norm_gradient")
    counts = []
    for normalised in (True, False):
        with launches:
            launches.count = 0
            loss = network(normalised)
            counts.append(launches.count)
            launches.count = 0
            torch.autograd.grad(loss, [conv.weight for conv in convs])
            counts.append(launches.count)
    assert 0 < (counts[0] - counts[2]) / layers <= 6
    assert 0 < (counts[1] - counts[3]) / layers <= 10


_POINTERS = {torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}


def _signature(kernel, given):
    """The types of the arguments of a launch, as Triton's compiler takes them."""

    def kind(parameter):
        value = given[parameter.name]
        if parameter.is_constexpr:
            return "constexpr"
        if isinstance(value, torch.Tensor):
            return _POINTERS[value.dtype]
        return {int: "i32", float: "fp32"}[type(value)]

    return {parameter.name: kind(parameter) for parameter in kernel.params}


def _attributes(kernel, given):
    """What a launch tells the compiler of its arguments: which are multiples of 16."""

    def is_multiple(parameter):
        value = given[parameter.name]
        if isinstance(value, torch.Tensor):
            return value.data_ptr() % 16 == 0
        fixed = parameter.is_constexpr or parameter.do_not_specialize
        return type(value) is int and not fixed and value % 16 == 0

    return {(p.num,): [["tt.divisibility", 16]] for p in kernel.params if is_multiple(p)}


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("variant, capability", [("network", 75), ("network", 90), ("paper", 80)])
def test_they_compile_for_a_gpu_without_spilling(variant, capability, monkeypatch, tmp_path):
    """Triton's compiler needs no GPU, and takes less than its interpreter does.

    What is compiled is what the functions launch on a narrow layer and on the widest that there may be,
    which is as wide as ResNet's widest. No kernel may use the stack, where registers go that are too many.
    """
    knobs = pytest.importorskip("triton.knobs", reason="Triton before 3.4")
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    from kn_detectron.layers.triton import kernels as twins

    launched = []

    def launch(self, *args, grid, warmup, **switches):
        launched.append((self, dict(zip(self.arg_names, args), **switches)))

    monkeypatch.setattr(JITFunction, "run", launch)
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path / "cache"))
    paper = variant == "paper"
    for channels in (64, twins.LARGEST_CHANNELS):
        row = torch.ones(1, channels)
        vector, number, batches = row[0], torch.ones(()), torch.zeros((), dtype=torch.long)
        twins.Rectify.forward(row, row)
        twins.Rectify.backward(row, row, row, row)
        for taps in (1, 3):
            some = torch.ones(1, 64)
            filters = torch.ones(channels, 64, taps, taps)
            twins.Convolve.forward(some, some, filters)
            twins.Convolve.backward(some, some, filters, row, row)
        model = dict(process_noise=vector)
        if not paper:
            model = dict(mean_offset=vector, log_var_scale=vector)
        v = Vectors(row, row, number, number, weight=vector, bias=vector, **model)
        running = Running(vector, vector, batches, 0.1)
        for measured in (Belief(row, row), None):
            spec = Spec(Sets(1, channels, 1, channels), 1e-5, paper, measured is not None)
            twins.Filter.forward(v, measured, spec, running, 49)
            twins.Filter.backward(None, v, measured, spec, (vector, vector), (row, row), 49)
            cumulative = running._replace(momentum=None)
            twins.Filter.forward(v, measured, spec, cumulative, 49)
    assert len(launched) == 2 * (2 + 4 + 6)
    for kernel, given in launched:
        constants = {p.name: given[p.name] for p in kernel.params if p.is_constexpr}
        compiled = compile(
            ASTSource(kernel, _signature(kernel, given), constants, _attributes(kernel, given)),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": given.get("num_warps", 4)},
        )
        if given.get("CUMULATIVE"):  # all threads read the number of batches before one writes it
            code = compiled.asm["ptx"]
            read, written = code.index("ld.global.b64"), code.index("st.global.b64")
            assert "bar.sync" in code[read:written]
        binary = tmp_path / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", str(binary)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert re.search(r"STACK:(\d+)", usage).group(1) == "0", f"{kernel.__name__}: {usage}"


@kernels
def test_a_variant_that_disagrees_is_not_used_and_others_are(monkeypatch, unchecked, caplog):
    from kn_detectron.layers.triton import kernels as twins

    right = twins.Filter.forward

    def wrong_when_tracking(v, measured, spec, running, count):
        found = right(v, measured, spec, running, count)
        if running is not None:
            running.var.mul_(1.01)
        return found

    monkeypatch.setattr(twins.Filter, "forward", staticmethod(wrong_when_tracking))
    norm, x = KalmanNorm2d(5, eval_statistics="batch").to(DEVICE), torch.randn(2, 5, 3, 3)
    prior = Belief(*(v.to(DEVICE) for v in prior_of(5)))
    for training in (True, True, False):
        y, _ = norm.train(training)(x.to(DEVICE), prior=prior)
        assert (y.grad_fn.filter is Filter) == training
    (warning,) = [r for r in caplog.records if "is not used" in r.message]  # once
    assert "Filter (False, True, True, True, 'yes', 8, False)" in warning.message
    assert "Tensor-likes are not close" in warning.message
    (name,) = choice.refused()
    assert name.startswith("Filter (False, True, True, True, 'yes', 8, False) on ")


@kernels
def test_one_that_does_not_compile_is_no_exception_in_a_training(monkeypatch, unchecked, caplog):
    from kn_detectron.layers.triton import kernels as twins

    def fail(*args):
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(twins.Convolve, "backward", staticmethod(fail))
    belief, weight = prior_of(3), torch.ones(2, 3, 1, 1)
    for _ in range(2):
        ready = [v.to(DEVICE) for v in (*belief, weight)]
        assert choice.fastest(Convolve, *ready, 1) is Convolve
    assert [r for r in caplog.records if "no C compiler" in r.message] == caplog.records[-1:]


@kernels
def test_a_first_call_in_inference_mode_postpones_the_check(unchecked):
    with torch.inference_mode():
        assert chosen() is Rectify
    assert chosen() is not Rectify
    with torch.inference_mode():  # by now it is known
        assert chosen() is not Rectify


@kernels
def test_a_first_call_in_a_checkpointed_block_is_checked_too(unchecked, caplog):
    """What the check saves for its backward pass is not the block's."""
    conv, norm = nn.Conv2d(3, 5, 1, bias=False).to(DEVICE), KalmanNorm2d(5).to(DEVICE)
    prior = Belief(*(v.to(DEVICE) for v in prior_of(3)))

    def block(x):
        about = ClosedFormTransition().activation(prior, x, "relu")
        return norm(conv(x.relu()), prior=ClosedFormTransition().conv(about, conv))[0]

    x, gradients = torch.randn(2, 3, 4, 4, device=DEVICE), []
    for run in (lambda x: checkpoint(block, x, use_reentrant=False), block):
        loss = run(x).square().sum()
        gradients.append(torch.autograd.grad(loss, [conv.weight, norm.weight]))
    for got, want in zip(*gradients):
        close(got, want.double())
    assert not [r for r in caplog.records if "is not used" in r.message]
    assert choice._verdicts and all(choice._verdicts.values())


@kernels
def test_fake_tensors_have_no_kernels(unchecked):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        assert chosen() is Rectify
    assert chosen() is not Rectify


@kernels
def test_an_environment_variable_turns_them_off(monkeypatch):
    monkeypatch.setenv("KN_DETECTRON_TRITON", "0")
    assert chosen() is Rectify
