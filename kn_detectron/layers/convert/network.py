"""A converted network: the modules of the original, and generated code that calls them."""

import copy
import itertools
import linecache
import re
import weakref
from collections import OrderedDict
from types import ModuleType
from typing import Any, Dict, Tuple

import torch
from torch import fx, nn

from ...errors import InputError, one_line
from ..calibration import can_be_calibrated, fit_prior, is_fresh, on_priors
from ..kalman_norm import check_takes_prior, kalman_layers
from ..modes import in_mode
from .chain import Chain
from .walk import CHAIN

__all__ = ["KalmanNetwork", "Program"]

_numbers = itertools.count()


class Program:
    """A function that was generated from a graph. It is copied and pickled as its source."""

    def __init__(self, source: str):
        self.source = source
        # So that tracebacks show its lines.
        name = f"<kn_detectron program {next(_numbers)}>"
        linecache.cache[name] = len(source), None, source.splitlines(True), name
        weakref.finalize(self, linecache.cache.pop, name, None)
        names: Dict[str, Any] = {}
        exec(compile(source, name, "exec"), names)
        self._function = names["forward"]

    @classmethod
    def of_graph(cls, graph: fx.Graph) -> "Program":
        """The function of a module and the graph's inputs that computes a graph."""
        code = graph.python_code("self")
        words = set(re.findall(r"\w+", code.src))
        imports = [_import(name, value) for name, value in code.globals.items() if name in words]
        return cls("\n".join(imports) + code.src)

    def __call__(self, module: nn.Module, *args, **kwargs):
        return self._function(module, *args, **kwargs)

    def __reduce__(self):
        return Program, (self.source,)


def _import(name: str, value: Any) -> str:
    if isinstance(value, ModuleType):
        return f"import {value.__name__} as {name}"
    if value is type(None):
        return f"{name} = type(None)"
    if isinstance(value, float):  # inf and nan
        return f"{name} = float({str(value)!r})"
    return f"from {value.__module__} import {value.__qualname__} as {name}"


class KalmanNetwork(nn.Module):
    """A network that :func:`~.convert_kalman_norm` made.

    It has the modules, parameters and mode of the original, and its attributes unless it was a
    torch.fx.GraphModule. Its norms are KN or GKN, and it has one more module. Its ``forward`` is
    generated code, which passes beliefs along with the features and calls the innermost modules one
    by one, up to the last norm. The ``forward`` functions and hooks of the modules around them would
    pass no beliefs, and are not called. For the same reason it has no other method of the original's
    class, nor is it an instance of that class.

    If it is given weights with running statistics and without a filter, as of the original, the
    priors are calibrated to the statistics.

    Attributes:
        kalman_chain (Chain): the additional module, without parameters, which computes the beliefs.
    """

    def __init__(self, network: nn.Module, chain: Chain, programs: Dict[str, Program]):
        super().__init__()
        self._graphs = None
        if isinstance(network, fx.GraphModule):  # its attributes include its graph and its code
            self._original, self._graphs = _kind_and_graphs(network)
            self.training = network.training
            for kind in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
                setattr(self, kind, getattr(network, kind))
        else:
            self._original = type(network)
            self.__dict__.update(network.__dict__)
            self._compiled_call_impl = None  # it would call the original
        self._programs = programs
        self._norms: Dict[str, nn.Module] = {}
        self.add_module(CHAIN, chain.train(self.training))
        self._load_state_dict_post_hooks = OrderedDict(self._load_state_dict_post_hooks)
        self.register_load_state_dict_post_hook(_calibrate_to_what_was_loaded)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            original = self.__dict__.get("_original")
            if original is None or not hasattr(original, name):
                raise
            raise AttributeError(
                f"{name} belongs to {original.__name__}, and a converted network has only its "
                "forward(): call it on the network before the conversion, or on restored()"
            ) from None

    @property
    def code(self) -> str:
        """The Python code of :meth:`forward` in the present mode.

        In evaluation with moving statistics it is the original's, without beliefs.
        """
        return self._program.source

    @property
    def _keeps_beliefs(self) -> bool:
        return self.training or getattr(self, CHAIN).in_evaluation

    @property
    def _program(self) -> Program:
        if self.training:
            return self._programs["training"]
        return self._programs["online" if self._keeps_beliefs else "moving"]

    def forward(self, *args, **kwargs):
        """Computes what the original's ``forward`` computes, with Kalman Normalization.

        Raises:
            TypeError: a norm was replaced by one that takes no prior.
            InputError: a norm is in training in a network that is not, or an argument that the
                conversion left at its default has another value.
        """
        try:
            return self._program(self, *args, **kwargs)
        except TypeError as error:
            for name in self._norms:
                check_takes_prior(self.get_submodule(name), error)
            raise
        except AssertionError as error:  # of fx
            if "has been specialized" not in str(error):
                raise
            raise InputError(
                f"A converted network has the defaults of its arguments only ({one_line(error)}): "
                "convert a subclass whose forward has the default that you need"
            ) from error
        except ValueError as error:
            norms = [self.get_submodule(name) for name in self._norms]
            lacks_prior = any(getattr(norm, "needs_prior", False) for norm in norms)
            if lacks_prior and not self._keeps_beliefs:
                raise InputError(
                    "A KN layer is in training mode, but its network is in evaluation mode and "
                    "keeps no beliefs: call train() of the whole network, and then eval() of those "
                    "norms that should keep their statistics"
                ) from error
            raise

    @torch.no_grad()
    def pass_beliefs(self) -> Any:
        """Calls every norm on an empty batch with its prior in closed form, for calibration.

        The priors of the network variant depend on parameters only, so no images are needed.

        Returns:
            The beliefs about the output, if ``forward`` returns them too, else None.
        """
        _renew_filters(self)
        with in_mode(self, training=True):
            return self._programs["beliefs"](self, getattr(self, CHAIN).in_closed_form())

    def fit_priors(self, layers: Dict[str, nn.Module]) -> None:
        """Calibrates layers whose statistics are not the initial ones, as far as they can be."""
        layers = {
            name: layer
            for name, layer in layers.items()
            if can_be_calibrated(layer) and not is_fresh(layer)
        }
        if layers:
            with on_priors(layers, lambda name, prior: fit_prior(layers[name], prior)):
                self.pass_beliefs()

    def put_norm(self, name: str, layer: nn.Module) -> None:
        """Replaces a norm, wherever it is used, by a Kalman layer, which takes over its tensors."""
        norm = self.get_submodule(name)
        # The very same tensors: an optimiser may have them already.
        trained = [parameter.requires_grad for parameter in norm.parameters()]
        if trained and not any(trained):
            layer.requires_grad_(False)  # as it is frozen, so are the gain and the process model
        layer._parameters.update(norm._parameters)
        layer._buffers.update(norm._buffers)
        layer._modules.update(norm._modules)  # timm's activation
        layer.train(norm.training)
        _replace(self, norm, layer)
        norm._parameters = dict.fromkeys(norm._parameters)
        norm._buffers = dict.fromkeys(norm._buffers)
        self._norms[name] = norm

    def restored(self) -> nn.Module:
        """A copy of the network as it was before its conversion, with the present weights."""
        _renew_filters(self)  # what a training step has made of them cannot be copied
        copied = copy.deepcopy(self)
        for name, norm in copied._norms.items():
            layer = copied.get_submodule(name)
            norm._parameters = {key: layer._parameters[key] for key in norm._parameters}
            norm._buffers = {key: layer._buffers[key] for key in norm._buffers}
            norm._modules = layer._modules
            norm.train(layer.training)
            _replace(copied, layer, norm)
        network = self._original.__new__(self._original)
        if copied._graphs is not None:
            _put_graphs(network, copied._graphs, self.training)
        network.__dict__.update(copied.__dict__)
        del network._original, network._graphs, network._programs, network._norms
        del network._modules[CHAIN]
        network._load_state_dict_post_hooks = OrderedDict(
            (key, hook)
            for key, hook in network._load_state_dict_post_hooks.items()
            if hook is not _calibrate_to_what_was_loaded
        )
        return network


def _kind_and_graphs(network: fx.GraphModule) -> Tuple[type, Dict[str, Any]]:
    """The class of a GraphModule, and the attributes that make it compute what it computes.

    torch.fx has a class for each instance, below that of the GraphModule. Some kinds have several
    graphs, as torchvision's create_feature_extractor has one for each mode.
    """
    kept = {name: value for name, value in vars(network).items() if isinstance(value, fx.Graph)}
    kept["_tracer_cls"] = network._tracer_cls
    return type(network).__mro__[1], {"training": network.training, **copy.deepcopy(kept)}


def _put_graphs(network: fx.GraphModule, graphs: Dict[str, Any], training: bool) -> None:
    """Has a new GraphModule, without modules yet, compute what another did in a mode."""
    nn.Module.__init__(network)
    network.__dict__.update(graphs)
    network.graph = network._graph
    network.train(training)  # which may be another graph


@torch.no_grad()
def _renew_filters(network: nn.Module) -> None:
    """Has torch's hooks that make filters, as those of its pruning, make them anew."""
    for module in network.modules():
        for hook in module._forward_pre_hooks.values():
            if type(hook).__module__.startswith("torch.nn.utils."):
                hook(module, ())


def _calibrate_to_what_was_loaded(network: KalmanNetwork, incompatible_keys) -> None:
    layers = kalman_layers(network)
    network.fit_priors({n: layer for n, layer in layers.items() if layer.loaded_statistics_only})


def _replace(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in network.modules():
        for name, child in list(parent._modules.items()):  # named_children has each child once
            if child is old:
                parent._modules[name] = new
