"""Traces a network by torch.fx."""

import inspect
import operator
import os
import traceback
from pathlib import Path

import torch
from torch import fx, nn

from ...errors import InputError, one_line
from ..modes import in_mode
from .rules import is_ruled

__all__ = ["is_frozen_norm", "is_norm", "is_of_torch", "trace"]


def is_of_torch(file: str) -> bool:
    """Whether a file is torch's own, and so is not the code of the network."""
    return file.startswith(str(Path(torch.__file__).parent) + os.sep)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm that becomes KN or GKN."""
    return isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm))


def is_frozen_norm(module: nn.Module) -> bool:
    """Whether a module is a frozen BatchNorm, of detectron2, torchvision or timm."""
    return type(module).__name__ in ("FrozenBatchNorm2d", "FrozenBatchNormAct2d")


def _recorded(function):
    def record(self, other):
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


class _Proxy(fx.Proxy):
    """Records ``y += x`` in place. fx.Proxy would record y = y + x, but y may have other names."""

    __iadd__ = _recorded(operator.iadd)
    __isub__ = _recorded(operator.isub)
    __imul__ = _recorded(operator.imul)
    __itruediv__ = _recorded(operator.itruediv)


class _Tracer(fx.Tracer):
    """Makes one node of each norm, and of each module without norms that cannot be traced."""

    # Buffers are read where forward reads them: they change, and move to other devices.
    proxy_buffer_attributes = True

    def __init__(self):
        super().__init__()
        self.record_stack_traces = True  # for the warnings

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """See :class:`torch.fx.Tracer`."""
        return _Proxy(node, self)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        """See :class:`torch.fx.Tracer`."""
        whole = is_norm(module) or is_frozen_norm(module) or is_ruled(type(module))
        return whole or super().is_leaf_module(module, name)

    def call_module(self, module: nn.Module, forward, args, kwargs):
        """See :class:`torch.fx.Tracer`."""
        if (is_norm(module) or is_frozen_norm(module)) and hasattr(module, "act"):
            # timm's norm with activation, in two steps.
            y = self.create_proxy("call_module", self.path_of_module(module), args, kwargs)
            return module.act(module.drop(y) if hasattr(module, "drop") else y)
        last = next(iter(reversed(self.graph.nodes)))
        modules = getattr(self, "module_stack", {}).copy()
        try:
            return super().call_module(module, forward, args, kwargs)
        except Exception:
            if any(is_norm(child) for child in module.modules()):
                raise
            # The module becomes one node. If something is wrong with it, running it will tell.
            for node in reversed(self.graph.nodes):
                if node is last:
                    break
                self.graph.erase_node(node)
            self.module_stack = modules
            return self.create_proxy("call_module", self.path_of_module(module), args, kwargs)


def _defaults(network: nn.Module) -> dict:
    """The arguments of forward that have defaults. The graph is traced with the defaults."""
    parameters = inspect.signature(network.forward).parameters
    return {n: p.default for n, p in parameters.items() if p.default is not inspect.Parameter.empty}


def _origin(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not is_of_torch(frame.filename)]
    return f"{own[-1].filename}:{own[-1].lineno}, {own[-1].line!r}"


def trace(network: nn.Module, training: bool) -> fx.Graph:
    """Traces what a network does in training or in evaluation.

    Each norm is one node. So is a module that cannot be traced, unless it contains norms.

    Args:
        network: is not changed.
        training: whether to trace it in training mode.

    Returns:
        fx.Graph: the calls of modules, functions and methods.

    Raises:
        InputError: forward cannot be traced, for instance because it depends on the values of its
            input (the error names the line); or torch.fx does not see how the output is computed.
    """
    defaults = _defaults(network)
    with in_mode(network, training):
        try:
            graph = _Tracer().trace(network, defaults or None)
        except Exception as error:  # forward gets proxies, with which anything may fail
            raise InputError(
                f"{type(network).__name__} cannot be traced by torch.fx, which the conversion to "
                f"KN needs: {_origin(error)} ({one_line(error)}). Move code that depends on the values or "
                "sizes of the input out of forward, or convert parts of the network without it."
            ) from error
    if not next(iter(reversed(graph.nodes))).all_input_nodes:
        raise InputError(
            f"{type(network).__name__} returns nothing that torch.fx sees it compute, perhaps "
            "because hooks collect the features: return them from forward, or take them with "
            "torchvision's create_feature_extractor."
        )
    for node in graph.nodes:
        node.type = None  # an annotation has its meaning only where it was written
        if node.op == "placeholder" and node.target.rpartition("_")[0] in defaults:
            node.target = node.target.rpartition("_")[0]  # fx adds numbers to the names of these
    return graph
