import gc
import statistics
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from benchmark import Group, measure, measure_group
from benchmark.candidates import Candidate, NotRun
from benchmark.measure import _LAUNCH, count_launches, saved_bytes, summarize
from kn_detectron.layers import triton

CPU = torch.device("cpu")


def rows_of(result):
    return {row["name"]: row for row in result["rows"]}


def with_candidates(monkeypatch, **builders):
    """A group of candidates that the test makes itself."""
    monkeypatch.setattr(measure, "build", lambda group, name, device: builders[name]())
    return Group("layer", tuple(builders), tuple(builders)[:1], (1, 1, 1, 1), rounds=3)


def test_operations_are_counted_without_views_and_allocations():
    x, w = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(5, 3, 3, 3, requires_grad=True)

    def forward():
        y = (x * 2).relu()  # 2
        y = F.conv2d(y, w)  # 1
        torch.empty_like(y)
        return y.reshape(2, -1).t()[1:].unsqueeze(0).detach()

    forwards, _ = count_launches(forward, CPU)
    assert forwards == 3

    y = F.conv2d((x * 2).relu(), w)
    backwards, _ = count_launches(lambda: torch.autograd.grad(y, [x, w], torch.ones(y.shape)), CPU)
    # convolution_backward, threshold_backward, mul, and the ones, which are made inside: ones.
    assert backwards == 4


def test_operations_that_write_in_place_and_in_functions_of_our_own_are_counted():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x + x

        @staticmethod
        def backward(ctx, dy):
            return dy.mul(2).add_(0)

    x = torch.randn(3, requires_grad=True)
    forwards, y = count_launches(lambda: Twice.apply(x).add_(1), CPU)
    dy = torch.ones(3)
    backwards, _ = count_launches(lambda: torch.autograd.grad(y, x, dy), CPU)
    assert (forwards, backwards) == (2, 2)


def test_launches_are_known_by_cudas_names():
    launching = ["cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx"]
    launching += ["cudaLaunchCooperativeKernel"]
    others = ["cudaMemcpyAsync", "cudaDeviceSynchronize", "aten::add_", "cudaLaunchHostFunc"]
    assert [bool(_LAUNCH.match(name)) for name in launching + others] == [True] * 5 + [False] * 4


def test_saved_bytes_count_memory_once_and_leave_out_what_is_there_anyway():
    x, w = torch.randn(10, 4, requires_grad=True), torch.randn(10, 4, requires_grad=True)
    with saved_bytes([x, w]) as saved:
        x * w  # saves both
    assert saved == [0]
    with saved_bytes([x]) as saved:
        x * w
    assert saved == [10 * 4 * 4]
    with saved_bytes([x]) as saved:
        y = x.exp()  # saves its result
        (y * y.view(4, 10).view(10, 4)).sin()  # saves y again, and the product
    assert saved == [2 * 10 * 4 * 4]


def test_summary_is_the_median_and_the_quartiles():
    assert summarize([5.0, 1.0, 2.0, 4.0, 3.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0}


def test_a_group_has_times_ratios_memory_and_counts_of_all():
    group = Group("layer", ("BN", "KN"), ("BN", "GN"), (2, 32, 4, 4), rounds=5)
    result = measure_group(group, CPU, min_time=0.0)
    assert (result["what"], result["device"], result["dtype"]) == ("layer", "cpu", "float32")
    rows = rows_of(result)
    assert list(rows) == ["BN", "KN"]
    for row in rows.values():
        assert row["status"] == "measured"
        assert len(row["seconds_by_round"]) == 5 and min(row["seconds_by_round"]) > 0
        assert row["seconds"]["median"] == statistics.median(row["seconds_by_round"])
        assert list(row["ratios"]) == ["BN"]
        assert row["peak_bytes"] is None
        assert row["launches"]["forward"] > 0 and row["launches"]["backward"] > 0
    assert rows["BN"]["ratios"]["BN"] == {"median": 1.0, "q1": 1.0, "q3": 1.0}
    pairs = zip(rows["KN"]["seconds_by_round"], rows["BN"]["seconds_by_round"])
    assert rows["KN"]["ratios"]["BN"]["median"] == statistics.median(a / b for a, b in pairs)
    # BatchNorm: scale and shift; keeps its mean and 1/std in float32. KN: b, r and the gain too.
    assert rows["BN"]["parameters"] == 64 and rows["BN"]["saved_bytes"] == 2 * 32 * 4
    assert rows["KN"]["parameters"] == 64 + 64 + 1
    assert rows["BN"]["launches"] == {"forward": 2, "backward": 1}  # with num_batches_tracked


def test_rounds_are_interleaved_and_begin_with_another_candidate_each(monkeypatch):
    ran = []
    builders = {n: lambda n=n: Candidate(lambda: ran.append(n)) for n in ("a", "b", "c")}
    group = with_candidates(monkeypatch, **builders)
    measure_group(group, CPU, warmup=1, min_time=0.0)
    # Warmed up and counted one after the other, then timed in turn.
    assert "".join(ran) == "aabbcc" + "abc" + "bca" + "cab"


def test_a_short_run_is_repeated_and_its_time_divided(monkeypatch):
    clock, ran = [0.0], []  # a clock on which a run takes an eighth of a second

    def run():
        ran.append(0)
        clock[0] += 0.125

    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    group = with_candidates(monkeypatch, a=lambda: Candidate(run))
    (row,) = measure_group(group, CPU, warmup=2, min_time=1.0)["rows"]
    assert len(ran) == 2 + 1 + 3 * 8  # warm-up, counting, three rounds
    assert row["seconds_by_round"] == [0.125] * 3


def test_the_backward_is_run_on_the_result_and_the_rest_after_it(monkeypatch):
    steps = []
    candidate = Candidate(lambda: 7, steps.append, finish=lambda: steps.append("done"))
    measure_group(with_candidates(monkeypatch, a=lambda: candidate), CPU, min_time=0.0)
    assert steps == [7, "done"] * (2 + 1 + 3)


def test_one_that_cannot_be_run_is_a_row_with_the_reason_and_the_others_go_on(monkeypatch, capsys):
    def raising(error):
        def build():
            raise error

        return build

    group = with_candidates(
        monkeypatch,
        fine=lambda: Candidate(lambda: None),
        lacking=raising(NotRun("there is no such thing")),
        half=raising(RuntimeError("\"pdist\" not implemented for 'Half'")),
        huge=raising(RuntimeError("CUDA out of memory. Tried to allocate 1 TiB")),
        broken=raising(RuntimeError("sizes do\nnot match")),
    )
    rows = rows_of(measure_group(group, CPU, min_time=0.0))
    assert [row["status"] for row in rows.values()] == [
        "measured",
        "not run",
        "not run",
        "not run",
        "failed",
    ]
    assert rows["lacking"]["reason"] == "there is no such thing"
    assert rows["half"]["reason"] == "\"pdist\" not implemented for 'Half'"
    assert rows["broken"]["reason"] == "sizes do not match"
    assert "seconds" not in rows["broken"]
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_did_not_fit_is_gone_before_the_next_is_built(monkeypatch, device):
    emptied, left = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(left[0]() is None))

    def huge():
        model = torch.nn.Linear(2, 2)
        model.cycle = [model]  # as networks have them
        left.append(weakref.ref(model))
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")

    def after():
        assert left[0]() is None
        assert emptied == [True] * (device == "cuda")
        raise NotRun("it was built")

    group, was_enabled = with_candidates(monkeypatch, huge=huge, after=after), gc.isenabled()
    gc.disable()  # otherwise a collection may happen to come
    try:
        first, second = measure_group(group, torch.device(device))["rows"]
    finally:
        if was_enabled:
            gc.enable()
    assert (first["status"], second["reason"]) == ("not run", "it was built")


def test_kernels_that_are_wrong_are_named(monkeypatch):
    monkeypatch.setattr(triton, "_verdicts", {("Filter", (1,), "cuda:0"): True})
    group = with_candidates(monkeypatch, a=lambda: Candidate(lambda: None))
    assert measure_group(group, CPU, min_time=0.0)["kernels_refused"] == []
    triton._verdicts["Rectify", (16,), "cuda:0"] = False
    assert measure_group(group, CPU, min_time=0.0)["kernels_refused"] == ["Rectify (16,) on cuda:0"]


def test_a_defect_of_another_kind_is_not_hidden(monkeypatch):
    def build():
        raise TypeError("wrong")

    with pytest.raises(TypeError):
        measure_group(with_candidates(monkeypatch, a=build), CPU)


def test_a_graph_break_fails():
    error = torch._dynamo.exc.Unsupported("this is not supported")
    compiled = Group("compiled", (), (), (1, 3, 8, 8))
    assert not measure._is_lack(error, compiled)
    assert measure._is_lack(RuntimeError("No working C++ compiler found"), compiled)
