"""Compares a kernel with torch's operators before its first use on a device."""

import math
from typing import List, Optional, Tuple

import torch
from torch import Tensor

from ...errors import one_line
from ..belief import Belief
from ..filter import Running, Spec, Vectors
from ..sets import Sets
from .kernels import ALIGNED, kind_of_size

__all__ = ["disagreement"]


def disagreement(operation, twin, variant: Tuple, device: torch.device) -> Optional[str]:
    """What is wrong with a variant of a kernel, or None if it agrees with torch's operators.

    Both run forward and backward on the same numbers. Torch's operators run in double precision, so
    that they do not use TF32.

    Args:
        operation: the class with torch's operators.
        twin: the class of the same name with Triton's kernels.
        variant: the variant, as ``twin.variant`` returns it.
        device: the device to compare on.
    """
    run = {"Rectify": _rectify, "Convolve": _convolve, "Filter": _filter}[operation.__name__]
    try:
        # Activation checkpointing must not take what this saves for tensors of the model.
        saved_as_it_is = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
        with torch.autocast(device.type, enabled=False), saved_as_it_is:
            got = run(twin, variant, _Numbers(device, torch.float32))
            want = run(operation, variant, _Numbers(device, torch.float64))
        for a, b in zip(got, want):
            torch.testing.assert_close(a.double(), b.double(), rtol=1e-3, atol=1e-4)
    except Exception as error:  # a compiler that is missing, a GPU that Triton does not know, ...
        return f"{type(error).__name__}: {one_line(error)[:300]}"
    return None


class _Numbers:
    """Makes tensors of evenly spaced numbers, which are the same on any device."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.options = dict(device=device, dtype=dtype)

    def __call__(self, *shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
        count = math.prod(shape)
        # In an order in which neighbours are far apart.
        steps = torch.arange(count, device=self.options["device"]) * 7919 % max(count, 1)
        return (low + (high - low) * steps.to(self.options["dtype"]) / max(count - 1, 1)).view(
            shape
        )

    def belief(self, channels: int) -> Belief:
        return Belief(self(1, channels), self(1, channels, low=0.5, high=2.0))


def _size(kind: int, least: int) -> int:
    """The smallest size of a kind that is not below ``least``, or 1 if only that is of the kind."""
    return next(n for n in (1, *range(least, least + 32)) if kind_of_size(n) == kind)


def _rectify(operation, variant, numbers: _Numbers) -> List[Tensor]:
    size = _size(*variant, 500)
    mean, var = numbers(1, size, low=-8.0, high=8.0), numbers(1, size, low=0.5, high=2.0)
    d_out = numbers(1, size), numbers(1, size, low=0.0)
    moments, saved = operation.forward(mean, var)
    return [*moments, *operation.backward(*saved, *d_out)]


def _convolve(operation, variant, numbers: _Numbers) -> List[Tensor]:
    taps, outputs, inputs = variant
    outputs, inputs = _size(outputs, 37), _size(inputs, 19)
    belief, weight = numbers.belief(inputs), numbers(outputs, inputs, taps, 1)
    d_out = numbers(1, outputs), numbers(1, outputs, low=0.0)
    return [*operation.forward(*belief, weight), *operation.backward(*belief, weight, *d_out)]


def _filter(operation, variant, numbers: _Numbers) -> List[Tensor]:
    paper, _, _, measures, *_ = variant
    results = _filter_once(operation, variant, numbers)
    if paper and measures:  # and a prior so wide that the gate drops it
        results += _filter_once(operation, variant, numbers, prior_width=1000.0)
    return results


def _filter_once(operation, variant, numbers: _Numbers, prior_width: float = 1.0) -> List[Tensor]:
    paper, has_process_model, has_scale, measures, tracks, block, is_aligned = variant
    # Some threads have no channel, if a size of that kind allows it.
    channels, images, pixels = max(block - block // 4, 1), 2, (2, 3)
    if is_aligned != (kind_of_size(channels) == ALIGNED):
        channels = block if is_aligned else channels - 1
    count = images * math.prod(pixels)
    spec = Spec(Sets(images, channels, 1, channels), 1e-5, paper, measures)
    offset, log_scale = numbers(channels), numbers(channels, high=0.5)
    prior = numbers.belief(channels)
    vectors = Vectors(
        prior.mean,
        prior.var * prior_width,
        gain_logit=numbers(1)[0],
        gain_scale=numbers(1, low=0.7)[0],
        mean_offset=offset if has_process_model and not paper else None,
        log_var_scale=log_scale if has_process_model and not paper else None,
        process_noise=offset if has_process_model and paper else None,
        weight=numbers(channels, low=0.5) if has_scale else None,
        bias=numbers(channels, high=0.5) if has_scale else None,
    )
    # Torch's operators give gradients only for tensors that require them.
    vectors = Vectors(*(t if t is None else t.requires_grad_() for t in vectors))
    measured = None
    if measures:
        measured = Belief(numbers(1, channels, high=2.0), numbers(1, channels, low=0.4, high=3.0))
    running = None
    if tracks != "no":
        batches = torch.ones((), dtype=torch.long, device=offset.device)
        statistics = numbers(channels), numbers(channels, low=0.5)
        running = Running(*statistics, batches, None if tracks == "cumulative" else 0.1)
    sums, d_belief = (numbers(channels), numbers(channels, low=0.0)), numbers.belief(channels)
    with torch.no_grad():
        found, kept = operation.forward(vectors, measured, spec, running, count)
    gradients = operation.backward(kept, vectors, measured, spec, sums, d_belief, count)
    results = [found.mean, found.scale, *found.belief]
    results += [
        d
        for name, d in zip(Vectors._fields, gradients.vectors)
        if d is not None and name != "gain_scale"
    ]
    if running is not None:
        results += running[:3]
    if measures:
        x, dy = numbers(images, channels, *pixels), numbers(images, channels, *pixels, low=0.0)
        results.append(gradients.input_pass(dy, x, *gradients.input_vectors))
    return [t.detach() for t in results]
