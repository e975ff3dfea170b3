"""How a module or an operation is being run: watched by hooks, or recorded and not executed."""

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

__all__ = ["has_hooks", "is_traced"]


def has_hooks(module: nn.Module) -> bool:
    """Whether anybody watches the calls of a module, which then have to be made."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def is_traced(x: Tensor) -> bool:
    """Whether operations on x are recorded and not executed: under torch.compile, torch.export or
    torch.jit.trace, or because x is a fake or meta tensor."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or x.is_meta
        or isinstance(x, FakeTensor)
    )
