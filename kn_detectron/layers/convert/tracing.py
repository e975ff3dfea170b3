"""Traces a network by torch.fx."""

import contextlib
import inspect
import operator
import os
import random
import sysconfig
import traceback
from pathlib import Path
from typing import Collection, Iterable, List, Set

import numpy as np
import torch
from torch import fx, nn

from ...errors import InputError, one_line
from ..introspection import has_children, has_hooks
from ..modes import in_mode
from .rules import is_ruled

__all__ = ["IN_PLACE", "behind_all_norms", "is_frozen_norm", "is_norm", "is_of_tracing", "trace"]

# Operators in place, and what each is for numbers. fx.Proxy would record y += x as y = y + x, but y
# may have other names.
IN_PLACE = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod,
    operator.ipow: operator.pow,
}


def is_of_tracing(file: str) -> bool:
    """Whether a file is torch's, Python's or this one, and so is not the code of the network."""
    paths = sysconfig.get_paths()
    if file == __file__ or file.startswith(str(Path(torch.__file__).parent) + os.sep):
        return True
    of_python = file.startswith(paths["stdlib"] + os.sep)
    # Installed packages may lie in a folder of Python's own.
    return of_python and not file.startswith((paths["purelib"] + os.sep, paths["platlib"] + os.sep))


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
    """Records operators in place as such, and knows that the image has four dimensions."""

    def dim(self):
        """See :class:`torch.Tensor`."""
        return 4 if self._is_image else self.tracer.create_proxy("call_method", "dim", (self,), {})

    @property
    def ndim(self):
        """See :class:`torch.Tensor`."""
        return 4 if self._is_image else fx.proxy.Attribute(self, "ndim")

    @property
    def _is_image(self) -> bool:
        return self.node is next(iter(self.node.graph.nodes))


for _function in IN_PLACE:
    setattr(_Proxy, f"__{_function.__name__}__", _recorded(_function))


class _Unrecorded(Exception):
    """Forward does something that is no node of the graph, and would be lost."""


def _contexts() -> tuple:
    """Changes within ``torch.no_grad()``, ``inference_mode()`` and ``autocast()``."""
    nesting = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return torch.is_grad_enabled(), nesting


def _random_states() -> tuple:
    """Changes where a random number is drawn; not those of dropout, which is recorded."""
    numpy_state = np.random.get_state()[1:3]
    numpy_state = numpy_state[0].tobytes(), numpy_state[1]
    return random.getstate(), numpy_state, torch.get_rng_state().numpy().tobytes()


@contextlib.contextmanager
def _must_be_recorded(module: nn.Module):
    """Context of a module's forward. It undoes what forward leaves behind.

    Raises:
        _Unrecorded: forward draws a random number or keeps a feature as an attribute.
    """
    attributes, states = dict(vars(module)), _random_states()
    numpy_state, torch_state = np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        kept = [name for name, value in vars(module).items() if isinstance(value, fx.Proxy)]
        for name in kept:
            delattr(module, name)
            if name in attributes:
                setattr(module, name, attributes[name])
        drew = _random_states() != states
        random.setstate(states[0])
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
    name = type(module).__name__
    if kept:
        raise _Unrecorded(f"forward of {name} keeps a feature as self.{kept[0]}: return it instead")
    if drew:
        raise _Unrecorded(
            f"forward of {name} draws a random number, which would be drawn once and for all: "
            "drop features by torchvision.ops.StochasticDepth or dropout"
        )


class _Tracer(fx.Tracer):
    """Makes one node of each norm, and of each module without norms that cannot be traced.

    Args:
        whole: names of modules of which it makes one node each, too.
    """

    # Buffers are read where forward reads them: they change, and move to other devices.
    proxy_buffer_attributes = True

    def __init__(self, whole: Collection[str] = ()):
        super().__init__()
        self._whole = whole
        self.record_stack_traces = True  # for the warnings
        self._contexts = _contexts()

    def create_node(self, *args, **kwargs) -> fx.Node:
        """See :class:`torch.fx.Tracer`."""
        if _contexts() != self._contexts:
            raise _Unrecorded(
                "forward has a with statement of torch.no_grad, inference_mode or autocast around "
                f"{_line(traceback.extract_stack())}: use detach(), requires_grad_(False), or "
                "autocast around the whole network"
            )
        return super().create_node(*args, **kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """See :class:`torch.fx.Tracer`."""
        return _Proxy(node, self)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        """See :class:`torch.fx.Tracer`."""
        whole = name in self._whole or is_norm(module)
        whole = whole or is_frozen_norm(module) or is_ruled(type(module))
        # Hooks are called where the module is, and would not be if its parts were.
        whole = whole or (has_hooks(module) and not has_children(module))
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
            with _must_be_recorded(module):
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


def _line(frames: traceback.StackSummary) -> str:
    """The innermost line of the network's own code."""
    own = [frame for frame in frames if not is_of_tracing(frame.filename)]
    if not own:  # as where torch's own containers call each other
        return "its forward"
    return f"{own[-1].filename}:{own[-1].lineno}, {own[-1].line!r}"


def behind_all_norms(network: nn.Module, graphs: Iterable[fx.Graph]) -> Set[str]:
    """The names of the modules that hold others and are only called when all norms have been.

    No belief has to pass through these, so they can stay in one piece.

    Args:
        network: the traced network.
        graphs: what it does, in each mode.
    """
    before, behind = set(), set()
    for graph in graphs:
        found: List[str] = []
        for node in graph.nodes:
            found += [path for path, _ in node.meta.get("nn_module_stack", {}).values() if path]
            if node.op == "call_module" and is_norm(network.get_submodule(node.target)):
                before.update(found)
                found = []
        behind.update(found)
    modules = {path: network.get_submodule(path) for path in behind - before}
    return {path for path, module in modules.items() if has_children(module)}


def trace(network: nn.Module, training: bool, whole: Collection[str] = ()) -> fx.Graph:
    """Traces what a network does in training or in evaluation.

    Each norm is one node. So is a module that cannot be traced, unless it contains norms.

    Args:
        network: is not changed.
        training: whether to trace it in training mode.
        whole: names of modules that become one node each.

    Returns:
        fx.Graph: the calls of modules, functions and methods.

    Raises:
        InputError: forward cannot be traced, for instance because it depends on the values of its
            input (the error names the line); it does something that the graph would lose; or
            torch.fx does not see how the output is computed.
    """
    defaults = _defaults(network)
    # With gradients, so that a no_grad() in forward makes a difference.
    with in_mode(network, training), torch.enable_grad():
        try:
            with _must_be_recorded(network):
                graph = _Tracer(whole).trace(network, defaults or None)
        except _Unrecorded as error:
            raise InputError(
                f"{type(network).__name__} cannot be converted to KN, because torch.fx does not "
                f"see all that it does: {error}."
            ) from error
        except Exception as error:  # forward gets proxies, with which anything may fail
            frames = traceback.extract_tb(error.__traceback__)
            raise InputError(
                f"{type(network).__name__} cannot be traced by torch.fx, which the conversion to "
                f"KN needs: {_line(frames)} ({one_line(error)}). Move code that depends on the "
                "values or sizes of the input out of forward, or convert parts of the network without it."
            ) from error
    if not next(iter(reversed(graph.nodes))).all_input_nodes:
        raise InputError(
            f"{type(network).__name__} returns nothing that torch.fx sees it compute, perhaps "
            "because hooks collect the features: return them from forward, or take them with "
            "torchvision's create_feature_extractor."
        )
    names = inspect.signature(network.forward).parameters
    for node in graph.nodes:
        node.type = None  # an annotation has its meaning only where it was written
        name = node.target.rpartition("_")[0] if node.op == "placeholder" else None
        if name in defaults and node.target not in names:
            node.target = name  # fx adds numbers to the names of these
    return graph
