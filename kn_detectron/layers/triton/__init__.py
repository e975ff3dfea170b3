"""Chooses between torch's operators and Triton's kernels for the operations on vectors.

Triton's kernels are optional. They run on a GPU on float32 vectors, and need one launch where
torch's operators need dozens (:mod:`.kernels`). Each variant of a kernel is compared with torch's
operators before its first use (:mod:`.check`). A variant that disagrees or does not compile is
never used. With the environment variable KN_DETECTRON_TRITON=0 no kernel is used.
"""

import functools
import logging
import os
from typing import Dict, Iterator, List, Tuple

import torch
from torch import Tensor

from ..introspection import is_traced

__all__ = ["fastest", "refused", "switched_off", "tensors_in"]

logger = logging.getLogger(__name__)

# Triton's interpreter runs the kernels on a CPU, slowly: for tests.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Whether a variant may be used, by operation, variant and device.
_verdicts: Dict[Tuple, bool] = {}


def tensors_in(values) -> Iterator[Tensor]:
    """The tensors in nested tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from tensors_in(value)


def fastest(operation, *arguments):
    """The implementation of an operation to use: torch's operators, or Triton's kernels.

    Args:
        operation: a class with the static methods ``forward`` and ``backward``, which use torch's
            operators.
        arguments: the arguments of ``forward``.

    Returns:
        ``operation`` itself, or the class of :mod:`.kernels` with the same name.
    """
    if torch.compiler.is_compiling() or switched_off():
        return operation
    tensors = list(tensors_in(arguments))
    first = tensors[0]
    if not (first.is_cuda or _INTERPRETED) or is_traced(first):
        return operation
    if any(t.dtype != torch.float32 for t in tensors if t.is_floating_point()):
        return operation
    # Torch's operators say so where tensors are on several devices; a kernel would read what is not
    # there. Triton compiles another form, which is not checked, for an address that is no multiple
    # of 16.
    if any(t.device != first.device or t.data_ptr() % 16 for t in tensors):
        return operation
    kernels = _kernels()
    if kernels is None:
        return operation
    twin = getattr(kernels, operation.__name__)
    variant = twin.variant(*arguments)
    if variant is None or not _may_be_used(operation, twin, variant, first.device):
        return operation
    return twin


def switched_off() -> bool:
    """Whether the environment variable says that no kernel is to be used."""
    return os.environ.get("KN_DETECTRON_TRITON", "1") == "0"


def refused() -> List[str]:
    """The variants of kernels that did not pass their check, among those used until now."""
    return [
        f"{operation} {variant} on {device}"
        for (operation, variant, device), agrees in _verdicts.items()
        if not agrees
    ]


@functools.lru_cache(maxsize=None)
def _kernels():
    """The module of Triton's kernels, or None where Triton is not installed."""
    try:
        from . import kernels
    except ImportError as error:  # Triton is not there for every platform
        logger.warning(
            "Beliefs are computed without Triton's kernels, which needs more launches but gives "
            f"the same results: {error}"
        )
        return None
    return kernels


def _may_be_used(operation, twin, variant: Tuple, device: torch.device) -> bool:
    """Whether a variant agrees with torch's operators. Its first use finds out."""
    key = operation.__name__, variant, str(device)
    if key not in _verdicts:
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if torch.is_inference_mode_enabled() or capturing:
            return False  # the check needs autograd and launches, so a later call makes it
        from .check import disagreement

        found = disagreement(operation, twin, variant, device)
        if found is not None:
            logger.warning(
                f"Triton's {operation.__name__} {variant} is not used on {device}, which needs "
                f"more launches but gives the same results: {found}"
            )
        _verdicts[key] = found is None
    return _verdicts[key]
