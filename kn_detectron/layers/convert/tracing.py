"""From a network to the graph of what it does, by torch.fx."""

import contextlib
import inspect
import operator
import os
import traceback
from pathlib import Path
from typing import Iterator

import torch
from torch import fx, nn

from ...errors import InputError
from .rules import is_ruled

__all__ = ["in_mode", "is_frozen_norm", "is_norm", "is_of_torch", "trace"]


def is_of_torch(file: str) -> bool:
    """Whether a file is torch's own, which says nothing about where a network does what."""
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
    """Keeps ``y += x`` in place, which a Proxy would make y = y + x: y may have other names."""

    __iadd__ = _recorded(operator.iadd)
    __isub__ = _recorded(operator.isub)
    __imul__ = _recorded(operator.imul)
    __itruediv__ = _recorded(operator.itruediv)


class _Tracer(fx.Tracer):
    """Takes norms for one step each, and what cannot be traced too unless there are norms in it."""

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
            # It stays as it is: whatever is wrong with it is seen when it runs.
            for node in reversed(self.graph.nodes):
                if node is last:
                    break
                self.graph.erase_node(node)
            self.module_stack = modules
            return self.create_proxy("call_module", self.path_of_module(module), args, kwargs)


@contextlib.contextmanager
def in_mode(network: nn.Module, training: bool) -> Iterator[None]:
    """Has a network in training or in evaluation, and every module as it was afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    try:
        network.train(training)
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _defaults(network: nn.Module) -> dict:
    """The arguments of forward that have defaults, which are those that the graph is made for."""
    parameters = inspect.signature(network.forward).parameters
    return {n: p.default for n, p in parameters.items() if p.default is not inspect.Parameter.empty}


def _origin(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not is_of_torch(frame.filename)]
    return f"{own[-1].filename}:{own[-1].lineno}, {own[-1].line!r}"


def trace(network: nn.Module, training: bool) -> fx.Graph:
    """What a network does, in training or in evaluation, as a graph.

    Norms are one step each. So is a module that cannot be traced, unless there are norms in it.

    Args:
        network: stays as it is.
        training: in which mode.

    Returns:
        fx.Graph: of modules, functions and methods.

    Raises:
        InputError: if forward does what depends on the values of its input. It names the line.
    """
    defaults = _defaults(network)
    with in_mode(network, training):
        try:
            graph = _Tracer().trace(network, defaults or None)
        except Exception as error:  # whatever a forward function does with what is no tensor
            raise InputError(
                f"{type(network).__name__} cannot be traced by torch.fx, which the conversion to "
                f"KN needs: {_origin(error)} ({error}). Take what depends on the values or sizes "
                "of the input out of forward, or convert the parts of the network that do without."
            ) from error
    if not next(iter(reversed(graph.nodes))).all_input_nodes:
        raise InputError(
            f"{type(network).__name__} returns nothing that torch.fx sees it compute, as where hooks "
            "collect the features: return them from forward, or take them with torchvision's "
            "create_feature_extractor."
        )
    for node in graph.nodes:
        node.type = None  # what annotations mean is known where they were written only
        if node.op == "placeholder" and node.target.rpartition("_")[0] in defaults:
            node.target = node.target.rpartition("_")[0]  # fx numbers those that it fixes
    return graph
