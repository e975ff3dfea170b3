"""Times, memory and launches of the candidates of a group."""

import contextlib
import dataclasses
import gc
import math
import re
import time
import traceback
from typing import Callable, Dict, List, Tuple

import numpy as np
import torch
from detectron2.utils import comm
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kn_detectron.errors import one_line
from kn_detectron.layers import triton

from .candidates import Candidate, NotRun, build
from .presets import Group

__all__ = ["count_launches", "is_free", "measure_group", "saved_bytes", "summarize"]


# Operations that compute nothing, in addition to views.
_FREE = {
    "aten::_unsafe_view",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::lift_fresh",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::promote_types",
}


def is_free(operation) -> bool:
    """Whether an operation of torch computes nothing: a view or an allocation."""
    schema = getattr(operation, "_schema", None)
    if schema is None:
        return False
    is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    return is_view or schema.name in _FREE


class _CountOperations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not is_free(func)
        return func(*args, **(kwargs or {}))


# The names of kernel launches in torch's profiler: CUDA's functions cudaLaunchKernel,
# cudaLaunchKernelExC, cudaLaunchCooperativeKernel, cuLaunchKernel and so on.
_LAUNCH = re.compile(r"cu(da)?Launch\w*Kernel")


def count_launches(call: Callable[[], object], device: torch.device) -> Tuple[int, object]:
    """Counts the launches of a call, and returns the number and the result of the call.

    On a GPU these are kernels, counted by torch's profiler. On a CPU they are torch's operations
    except views and allocations. Each of these would be one kernel or more on a GPU.
    """
    if device.type == "cpu":
        with _CountOperations() as counter:
            result = call()
        return counter.count, result
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        result = call()
        torch.cuda.synchronize()
    return sum(bool(_LAUNCH.match(event.name)) for event in profile.events()), result


@contextlib.contextmanager
def saved_bytes(constants: List[Tensor]):
    """Counts the bytes that the operations in its block save for the backward.

    Args:
        constants: tensors that are in memory anyway, such as parameters and inputs, and do not
            count.

    Yields:
        list: its one number, which grows. Tensors that share their memory count once.
    """
    # The storages themselves are kept, so that no address is given out a second time.
    known = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in constants}
    total = [0]

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            known[storage.data_ptr()] = storage
            total[0] += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total


def _count(candidate: Candidate, group: Group, device: torch.device) -> Dict:
    """Launches and memory of one run."""
    found = {"parameters": candidate.parameters, "launches": None, "peak_bytes": None}
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        candidate.run()
        found["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    # On a CPU compiled code calls no operations of torch, so there is nothing to count.
    counts = device.type == "cuda" or group.what != "compiled"

    def maybe_count(call):
        return count_launches(call, device) if counts else (None, call())

    with saved_bytes(candidate.constants) as saved:
        forward, result = maybe_count(candidate.forward)
    found["saved_bytes"] = saved[0]
    backward = 0
    if candidate.backward is not None:
        backward, _ = maybe_count(lambda: candidate.backward(result))
    candidate.finish()
    if counts:
        found["launches"] = {"forward": forward, "backward": backward}
    return found


def _seconds(candidate: Candidate, repeats: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        candidate.run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


# Parts of torch's messages if something does not exist on a device, or does not fit on it.
_LACKS = re.compile(
    r"not implemented|not supported|out of memory|can't allocate|no working|cannot find a working",
    re.IGNORECASE,
)


def _is_lack(error: Exception, group: Group) -> bool:
    if group.what == "compiled" and isinstance(error, torch._dynamo.exc.Unsupported):
        return False  # a graph break
    return isinstance(error, NotImplementedError) or bool(_LACKS.search(str(error)))


def _prepare(group: Group, name: str, device: torch.device, warmup: int):
    """Builds a candidate, warms it up and counts: (candidate or None, row, seconds of a run)."""
    row = {"name": name, "status": "measured"}
    candidate, seconds, raised = None, 0.0, False
    try:
        candidate = build(group, name, device)
        for _ in range(warmup):
            seconds = _seconds(candidate, 1, device)
        scale = candidate.scale()
        found = _count(candidate, group, device)
        if candidate.scale() < scale:
            raise NotRun(
                f"gradients overflowed with the loss times {scale:g}: the optimiser's step was "
                "skipped, and would not be in the times"
            )
        row.update(found)
    except NotRun as reason:
        row.update(status="not run", reason=str(reason))
    except (NotImplementedError, RuntimeError) as error:
        # A whole run must not be lost to one candidate.
        lacks = _is_lack(error, group)
        reason, raised = one_line(error)[:300], True
        row.update(status="not run" if lacks else "failed", reason=reason)
        if not lacks:
            traceback.print_exc()
    if raised:
        # What did not fit must not take the memory of the next candidate. Here the error is gone,
        # which kept it alive, but reference cycles and torch's cache still hold it.
        candidate = None
        gc.collect()
        if device.type == "cuda" and torch.cuda.is_available():
            torch.cuda.empty_cache()
    # Several processes must all measure the same candidates, or they would wait for ever.
    others = [r for r in comm.all_gather(row) if r["status"] != "measured"]
    if others and row["status"] == "measured":
        row = {"name": name, "status": others[0]["status"], "reason": others[0]["reason"]}
    return (candidate if row["status"] == "measured" else None), row, seconds


def summarize(values: List[float]) -> Dict[str, float]:
    """Median and quartiles of a list of numbers."""
    q1, median, q3 = np.percentile(values, (25, 50, 75))
    return {"median": float(median), "q1": float(q1), "q3": float(q3)}


def measure_group(
    group: Group, device: torch.device, warmup: int = 2, min_time: float = 0.02
) -> Dict:
    """Measures the candidates of a group side by side.

    All are built, each is run a few times, and its launches and memory are counted. Then they are
    timed in rounds. Each round times all of them in turn and begins with another one, so that a
    drift of the machine affects all alike. A ratio is taken within each round, and the median is
    taken over the rounds.

    Args:
        group: what to measure.
        device: where to run.
        warmup: runs before anything is measured, 1 or more.
        min_time: in seconds; a run that takes less is repeated within a round.

    Returns:
        dict: the fields of the group, ``device``, ``kernels_refused`` (Triton's kernels that did
        not pass their check until then), and ``rows``. Each row has the ``name`` of a candidate and
        its ``status``, "measured", "not run" or "failed". A candidate that was not measured has a
        ``reason``. One that was measured has

        - ``seconds`` (median, q1, q3), ``seconds_by_round`` and ``parameters``;
        - ``ratios``: the median, q1 and q3 by base;
        - ``launches``: forward and backward; None if they cannot be counted;
        - ``saved_bytes``: memory kept for the backward;
        - ``peak_bytes``: the most that a run allocates on a GPU in addition to weights and
          momentum; None on a CPU.
    """
    rows, candidates, repeats = [], {}, {}
    for name in group.candidates:
        candidate, row, seconds = _prepare(group, name, device, warmup)
        rows.append(row)
        if candidate is not None:
            candidates[name] = candidate
            needed = max(1, math.ceil(min_time / max(seconds, 1e-6)))
            repeats[name] = max(comm.all_gather(needed))
    gc.collect()
    times = {name: [] for name in candidates}
    names = list(candidates)
    for round_ in range(group.rounds):
        start = round_ % max(len(names), 1)
        for name in names[start:] + names[:start]:
            times[name].append(_seconds(candidates[name], repeats[name], device))
    for row in rows:
        if row["status"] != "measured":
            continue
        own = times[row["name"]]
        row["seconds"] = summarize(own)
        row["seconds_by_round"] = own
        row["ratios"] = {
            base: summarize([a / b for a, b in zip(own, times[base])])
            for base in group.bases
            if base in times
        }
    candidates.clear()
    if device.type == "cuda" and torch.cuda.is_available():
        torch.cuda.empty_cache()
    if group.what == "compiled":
        torch._dynamo.reset()
    result = {**dataclasses.asdict(group), "device": device.type, "rows": rows}
    return {**result, "kernels_refused": triton.refused()}
