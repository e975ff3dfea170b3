"""Which implementation of an operation on vectors runs: torch's operators, or Triton's kernels.

Triton's kernels are optional. They run on a GPU, on float32 vectors, and do in one launch what are
dozens of tiny operations otherwise (:mod:`.kernels`). Each variant of a kernel is compared with torch's
operators before its first use (:mod:`.check`); one that disagrees or does not compile is never used.
Set the environment variable KN_DETECTRON_TRITON=0 to use none.
"""

import logging
import os
from typing import Dict, Iterator, Tuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

__all__ = ["fastest", "is_traced"]

logger = logging.getLogger(__name__)

# Triton's interpreter runs the kernels on a CPU, slowly: for tests.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Whether a variant may be used, by operation, variant and device.
_verdicts: Dict[Tuple, bool] = {}


def is_traced(x: Tensor) -> bool:
    """Whether what is done with x is recorded, by torch.compile, torch.export, torch.jit.trace or a
    fake tensor, rather than done."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or x.is_meta
        or isinstance(x, FakeTensor)
    )


def _tensors(values) -> Iterator[Tensor]:
    """The tensors in nested tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)


def fastest(operation, *arguments):
    """The implementation to use of an operation: itself, or the class of Triton's of its name.

    Args:
        operation: a class with the static methods ``forward`` and ``backward``, by torch's operators.
        arguments: those of ``forward``.
    """
    if torch.compiler.is_compiling():
        return operation
    tensors = list(_tensors(arguments))
    first = tensors[0]
    if not (first.is_cuda or _INTERPRETED) or is_traced(first):
        return operation
    if first.is_cuda and first.device.index != torch.cuda.current_device():
        return operation  # Triton launches on the current one
    if any(t.dtype != torch.float32 for t in tensors if t.is_floating_point()):
        return operation
    kernels = _kernels()
    if kernels is None:
        return operation
    twin = getattr(kernels, operation.__name__)
    variant = twin.variant(*arguments)
    if variant is None or not _may_be_used(operation, twin, variant, first.device):
        return operation
    return twin


def _kernels():
    """The module of Triton's kernels, or None where there are none."""
    if os.environ.get("KN_DETECTRON_TRITON", "1") == "0":
        return None
    if "kernels" not in _loaded:
        try:
            from . import kernels
        except ImportError as error:  # Triton is not installed on every platform
            logger.warning(
                "Beliefs are computed without Triton's kernels, which takes more launches but gives "
                f"the same results: {error}"
            )
            kernels = None
        _loaded["kernels"] = kernels
    return _loaded["kernels"]


_loaded: Dict[str, object] = {}


def _may_be_used(operation, twin, variant: Tuple, device: torch.device) -> bool:
    """Whether a variant agrees with torch's operators, which is found out at its first use."""
    key = operation.__name__, variant, str(device)
    if key not in _verdicts:
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if torch.is_inference_mode_enabled() or capturing:
            return False  # the check needs autograd, and launches: at a later call
        from .check import disagreement

        found = disagreement(operation, twin, variant, device)
        if found is not None:
            logger.warning(
                f"Triton's {operation.__name__} {variant} is not used on {device}, which takes more "
                f"launches but gives the same results: {found}"
            )
        _verdicts[key] = found is None
    return _verdicts[key]
