"""How a module or an operation is being run: watched by hooks, or recorded and not executed."""

from typing import Callable

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

__all__ = ["forward_of", "has_children", "has_hooks", "is_traced"]


def has_children(module: nn.Module) -> bool:
    """Whether a module contains others. Not their truth values, which call ``len`` of containers."""
    return next(module.children(), None) is not None


def has_hooks(module: nn.Module) -> bool:
    """Whether anybody watches the calls of a module, which then have to be made."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def forward_of(module: nn.Module) -> Callable:
    """The forward function of a module: its own, if it was replaced, or that of its class."""
    return vars(module).get("forward", type(module).forward)


def is_traced(x: Tensor) -> bool:
    """Whether operations on x are recorded and not executed: under torch.compile, torch.export or
    torch.jit.trace, or because x is a fake or meta tensor."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or x.is_meta
        or isinstance(x, FakeTensor)
    )
