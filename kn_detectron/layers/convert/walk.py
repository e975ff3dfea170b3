"""Inserts the nodes that make beliefs into a graph, beside the nodes that make the features."""

import inspect
import operator
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple, Union

import torch
from torch import fx, nn

from ...errors import InputError
from . import channels as on_channels
from .about import NO_FEATURE_MAP, About, End
from .memory import Memory
from .rules import find_rule
from .sizes import IMAGES, Sizes
from .tracing import is_frozen_norm, is_norm

__all__ = ["CHAIN", "NormCall", "Walk"]

CHAIN = "kalman_chain"  # the name of the module Chain in a converted network

# torch's names of the first argument, and timm's; and other names that torch takes.
_FIRST = ("input", "x", "tensor")
_ALIASES = {"axis": "dim", "keepdims": "keepdim", "split_size": "split_size_or_sections"}


class NormCall(NamedTuple):
    """A call of a norm.

    Attributes:
        node: its node.
        end: why it has no prior, or None if it has one.
    """

    node: fx.Node
    end: Optional[End]


# None is for constants and sizes, which are no features.
Known = Union[About, Tuple[About, ...], End, None]


class Walk:
    """One pass over a graph, in its order.

    Args:
        network: the traced network, with its original norms.
        graph: its graph, which is changed in place: nodes are added, and norms get ``prior=``.
        channels: number of channels of the images, or None if the first norm is to be the head of
            the chain.

    Attributes:
        norms: the calls of norms that become Kalman layers.
        left: the norms that stay as they are, by name, and why.
        own (set): the nodes that were added for beliefs.
        chain: the node that is the module :class:`~.chain.Chain`.
    """

    def __init__(self, network: nn.Module, graph: fx.Graph, channels: Optional[int]):
        self.network = network
        self.graph = graph
        self.norms: List[NormCall] = []
        self.left: Dict[str, End] = {}
        self._known: Dict[fx.Node, Known] = {}
        self._constants: Set[fx.Node] = set()
        self._grouped = any(isinstance(module, nn.GroupNorm) for module in network.modules())
        self._sizes = Sizes()
        self._memory = Memory(network)
        self._beliefs: Any = None  # the beliefs about the output, if they are returned

        nodes = list(graph.nodes)
        inputs = [node for node in nodes if node.op == "placeholder"]
        with graph.inserting_after(inputs[-1]):
            self.chain = graph.create_node("get_attr", CHAIN, name="chain")
        self.own = {self.chain}
        self._here = self.chain
        for self._node in nodes:
            if self._node.op == "placeholder":
                self._learn(self._input(channels, is_image=self._node is inputs[0]))
                continue
            self._here = self._node
            if self._node.op == "get_attr":
                self._constants.add(self._node)
            elif self._node.op != "output":
                self._learn(self._follow())

    # What rules may ask for.

    def about(self, x: Any) -> About:
        """What is known about an argument of a node. If nothing is known, raises an :class:`End`."""
        known = self._known.get(x) if isinstance(x, fx.Node) else None
        if isinstance(known, End):
            raise known
        if not isinstance(known, About):
            raise End("it takes an argument that is no feature")
        return known

    def pieces(self, x: Any) -> Optional[Tuple[About, ...]]:
        """What is known about the features in a tuple, or None if the argument is no such tuple."""
        known = self._known.get(x) if isinstance(x, fx.Node) else None
        return known if isinstance(known, tuple) else None

    def is_constant(self, x: Any) -> bool:
        """Whether an argument is a number or depends on parameters only."""
        return isinstance(x, (int, float)) or x in self._constants

    @torch.no_grad()
    def constant(self, x: Any) -> Any:
        """The present value of a constant argument."""
        if not isinstance(x, fx.Node):
            return x
        if x.op == "get_attr":
            return operator.attrgetter(x.target)(self.network)
        args, kwargs = fx.node.map_arg((x.args, x.kwargs), self.constant)
        if x.op == "call_module":
            return self.network.get_submodule(x.target)(*args, **kwargs)
        if x.op == "call_method":
            return getattr(args[0], x.target)(*args[1:], **kwargs)
        return x.target(*args, **kwargs)

    def size(self, x: Any) -> Any:
        """The value of an argument, even if it is computed from sizes; None if it is not known."""
        return None if self.is_batch_size(x) else self._sizes.value(x)

    def is_batch_size(self, x: Any) -> bool:
        """Whether an argument is the batch size of a feature."""
        return self._sizes.value(x) is IMAGES

    def check_channels(self, about: About, channels: int) -> None:
        """Checks that a layer takes as many channels as its input is known to have.

        Raises:
            InputError: the layers fit each other, so the images must have other channels.
        """
        known = on_channels.one_channel_dimension(about)
        if known != channels:
            raise InputError(
                f"image_mean and image_std are about images of {known} channels, but the network "
                f"takes {channels}: give one number for each channel of its images."
            )

    def belief(self, about: About) -> fx.Node:
        """The node that makes the belief. It is added if there is none yet."""
        if about.belief is None:
            about.belief = self._insert("moments", about.source)
        return about.belief

    def make(self, channels: Sequence[int], method: str, *args) -> About:
        """A feature whose belief a method of :class:`~.chain.Chain` makes."""
        return About(tuple(channels), belief=self._insert(method, *args))

    def activated(self, about: About, name: str, *parameters) -> About:
        """A feature behind an activation, which is the present node."""
        belief = self.belief(about)
        source = self._insert("activation", belief, self._node, name, *parameters)
        return About(about.channels, source=source)

    def convolved(self, x: fx.Node, channels: int, *arguments) -> About:
        """A feature behind a convolution, which is the present node.

        Args:
            x: its input.
            channels: number of channels of its output.
            arguments: its other arguments, if it is not a module.
        """
        about = self.about(x)
        if about.source is None:
            about.source = self._insert("source", about.belief, x)
        if arguments:
            return self.make([channels], "conv2d", about.source, *arguments)
        return self.make([channels], "conv", about.source, self._module_itself())

    # The results.

    def finish(self, heads: Set[str], return_beliefs: bool) -> None:
        """Removes the priors of heads, and all added nodes that nothing uses.

        Args:
            heads: the names of the norms that have no prior in at least one call.
            return_beliefs: whether the beliefs about the output are returned with it.
        """
        for call in self.norms:
            if call.node.target in heads:
                call.node.kwargs = {"prior": None}
        if return_beliefs:
            output = next(iter(reversed(self.graph.nodes)))
            self._here = output.prev
            self._beliefs = fx.node.map_arg(output.args[0], self._returned)
            output.args = ((output.args[0], self._beliefs),)
        _remove_unused(self.graph, self.own)

    def _returned(self, x: fx.Node) -> Optional[fx.Node]:
        known = self._known.get(x)
        return self.belief(known) if isinstance(known, About) else None

    def beliefs_alone(self) -> fx.Graph:
        """A graph without features. Its input is the Chain, and it calls norms on empty batches.

        It returns the beliefs about the output, if :meth:`finish` was told to return them.
        """
        graph = fx.Graph()
        copies = {self.chain: graph.placeholder("chain")}
        norms = {call.node for call in self.norms}
        constants = set()
        for node in self.graph.nodes:
            if node in norms:
                channels = _channels(self.network.get_submodule(node.target))
                nothing = graph.call_method("nothing", (copies[self.chain], channels))
                prior = copies.get(node.kwargs["prior"])
                copies[node] = graph.call_module(node.target, (nothing,), {"prior": prior})
            elif node in self._constants or (node in self.own and node is not self.chain):
                copies[node] = graph.node_copy(node, copies.get)
                if node in self._constants:
                    constants.add(copies[node])
        graph.output(fx.node.map_arg(self._beliefs, copies.get))
        _remove_unused(graph, constants)
        return graph

    def join_convolutions(self) -> None:
        """Makes one call of each norm and the convolution in front of it.

        A convolution whose output is used elsewhere too stays by itself. Afterwards ``norms`` is
        out of date.
        """
        for node, *_ in self.norms:
            conv, prior = node.args[0], node.kwargs["prior"]
            if prior is None or conv.op != "call_module" or len(conv.users) > 1:
                continue
            if len(conv.args) != 1 or conv.kwargs:
                continue
            if not isinstance(self.network.get_submodule(conv.target), nn.Conv2d):
                continue
            grouped = prior.target == "of_batch"
            behind_conv = prior.args[1] if grouped else prior
            # Where the convolution was: what comes later may change its input in place.
            self._here = prior
            modules = [self._add("get_attr", n.target) for n in (conv, node)]
            arguments = (self.chain, *conv.args, *modules, behind_conv.args[1], grouped)
            joined = self._add("call_method", "conv_norm", arguments, node.name)
            node.replace_all_uses_with(joined)
            self.graph.erase_node(node)
            self.graph.erase_node(conv)
        _remove_unused(self.graph, self.own)

    # The pass itself.

    def _insert(self, method: str, *args) -> fx.Node:
        return self._add("call_method", method, (self.chain, *args), f"about_{self._node.name}")

    def _module_itself(self) -> fx.Node:
        return self._add("get_attr", self._node.target)

    def _add(self, op: str, target: str, args: tuple = (), name: Optional[str] = None) -> fx.Node:
        with self.graph.inserting_after(self._here):
            self._here = self.graph.create_node(op, target, args, name=name)
        self.own.add(self._here)
        return self._here

    def _input(self, channels: Optional[int], is_image: bool) -> Known:
        if not is_image:
            return End("nothing is known about this input")
        return End() if channels is None else self.make([channels], "start")

    def _follow(self) -> Known:
        node = self._node
        if all(x in self._constants for x in node.all_input_nodes):
            self._constants.add(node)
            return None
        module = self.network.get_submodule(node.target) if node.op == "call_module" else None
        rule = find_rule(node.op, node.target if module is None else module)
        if rule is not None or is_norm(module):
            _put_first_argument_first(node)
        first = self._known.get(node.args[0]) if node.args else None
        channels = first.channels if isinstance(first, About) else None
        if self._sizes.note(node, channels):
            return None
        try:
            if is_norm(module):
                return self._norm(module)
            if is_frozen_norm(module):
                return self.make([module.weight.numel()], "frozen", self._module_itself())
            if rule is None:
                return self._unknown()
            return self._by_rule(rule, *([] if module is None else [module]))
        except End as end:
            return end

    def _by_rule(self, rule: Callable, *module: nn.Module) -> Known:
        kwargs = {_ALIASES.get(name, name): value for name, value in self._node.kwargs.items()}
        try:
            call = inspect.signature(rule).bind(self, *module, *self._node.args, **kwargs)
        except TypeError:
            raise End("there is no rule for these arguments") from None
        return rule(*call.args, **call.kwargs)

    def _unknown(self) -> End:
        for x in self._node.all_input_nodes:  # the first cause counts
            if isinstance(self._known.get(x), End) and self._known[x].why:
                return self._known[x]
        return End("there is no rule for it")

    def _norm(self, norm: nn.Module) -> About:
        node, end, prior = self._node, None, None
        self._here = node.prev
        try:
            about = self.about(node.args[0])
            if len(about.channels) == 1:  # where a norm is the first layer, nothing else checks it
                self.check_channels(about, _channels(norm))
            prior = self.belief(about)
            if self._grouped and not isinstance(norm, nn.GroupNorm):
                self._here = prior  # where a joined convolution can follow it
                prior = self._insert("of_batch", prior)
        except End as reason:
            takes_vectors = reason.why == NO_FEATURE_MAP or self._is_linear(node.args[0])
            if takes_vectors and not isinstance(norm, nn.BatchNorm2d):
                self.left[node.target] = reason
                raise
            end = reason
        self._here = node
        node.kwargs = {"prior": prior}
        y = self._add("call_function", operator.getitem, (node, 0), node.name)
        self.own.remove(y)
        node.replace_all_uses_with(y, delete_user_cb=lambda user: user is not y)
        belief = self._add("call_function", operator.getitem, (node, 1), f"about_{node.name}")
        about = About((_channels(norm),), belief=belief)
        self.norms.append(NormCall(node, end))
        self._known[y] = about
        self._memory.note(y)
        return about

    def _is_linear(self, node: Any) -> bool:
        """Whether a linear layer made a feature, with no convolution behind it."""
        while isinstance(node, fx.Node):
            module = self.network.get_submodule(node.target) if node.op == "call_module" else None
            if isinstance(module, nn.Linear) or node.target is nn.functional.linear:
                return True
            if isinstance(module, nn.Conv2d) or not node.args:
                return False
            node = node.args[0]
        return False

    def _learn(self, known: Known) -> None:
        """Notes what is known about the present node, and about the features that it changed."""
        node = self._node
        if isinstance(known, End) and known.node is None:
            known.node = node
        self._known[node] = known
        also, unknown = self._memory.note(node)
        self._known.update(dict.fromkeys(also, known))
        if unknown:
            end = End("it was changed in place under another name")
            end.node = node
            self._known.update(dict.fromkeys(unknown, end))


def _put_first_argument_first(node: fx.Node) -> None:
    """Gives a node its first argument by position, as rules expect it, if it has it by name."""
    for name in _FIRST:
        if not node.args and name in node.kwargs:
            kwargs = dict(node.kwargs)
            node.args, node.kwargs = (kwargs.pop(name),), kwargs


def _remove_unused(graph: fx.Graph, nodes: Set[fx.Node]) -> None:
    for node in reversed(graph.nodes):
        if node in nodes and not node.users:
            graph.erase_node(node)
            nodes.remove(node)


def _channels(norm: nn.Module) -> int:
    return norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features
