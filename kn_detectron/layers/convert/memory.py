"""Memory: which features change if one of them is changed in place."""

import operator
from typing import Dict, List, Optional, Tuple

from torch import fx, nn

from .tracing import IN_PLACE

__all__ = ["Memory"]

_PERHAPS_VIEWS = {"view", "reshape", "flatten", "transpose", "permute", "contiguous", "chunk"}
_PERHAPS_VIEWS |= {"split", "getitem", "narrow", "unsqueeze", "squeeze", "to", "float", "dropout"}
_PERHAPS_VIEWS |= {"type_as", "half", "bfloat16", "double", "detach", "select", "unbind", "movedim"}
_PERHAPS_VIEWS |= {"unflatten", "view_as", "expand", "expand_as", "stochastic_depth", "swapaxes"}
_PERHAPS_VIEW_MODULES = (nn.Dropout, nn.Dropout2d, nn.Flatten, nn.Unflatten, nn.ChannelShuffle)
# Of torchvision and timm. Where they drop nothing, they return what they get.
_PERHAPS_VIEW_NAMES = ("StochasticDepth", "DropPath")


class Memory:
    """The features that share memory, as far as the nodes noted so far tell."""

    def __init__(self, network: nn.Module):
        self._network = network
        # For each node, the node that its memory comes from, and whether both are the same feature.
        self._origin: Dict[fx.Node, Tuple[fx.Node, bool]] = {}

    def note(self, node: fx.Node) -> Tuple[List[fx.Node], List[fx.Node]]:
        """Notes a node, in the order of the graph.

        Returns:
            The nodes that are now the same feature as this one, because it was computed in their
            place, and the nodes that it changed in an unknown way.
        """
        first = node.kwargs.get("out") or (node.args[0] if node.args else None)
        first = first if isinstance(first, fx.Node) else None
        sharing = _sharing(node, self._network)
        if first is None or sharing is None:
            self._origin[node] = node, True
            return [], []
        origin, same = self._origin.get(first, (first, True))
        if sharing != "changes":
            self._origin[node] = origin, same and sharing == "same"
            return [], []
        group = [n for n, (other, _) in self._origin.items() if other is origin]
        also = [n for n in group if n is first or (same and self._origin[n][1])]
        self._origin[node] = origin, same
        return also, [n for n in group if n not in also]


def _sharing(node: fx.Node, network: nn.Module) -> Optional[str]:
    """How a node shares memory with its first argument: it "changes" it in place, is the "same", is
    "perhaps" a view of it, or shares nothing (None)."""
    if node.op == "call_module":
        module = network.get_submodule(node.target)
        if getattr(module, "inplace", False):
            return "changes"
        if isinstance(module, nn.Identity):
            return "same"
        named = type(module).__name__ in _PERHAPS_VIEW_NAMES
        return "perhaps" if named or isinstance(module, _PERHAPS_VIEW_MODULES) else None
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    in_place = node.target in (*IN_PLACE, operator.setitem)
    in_place |= bool(node.kwargs.get("inplace")) or node.kwargs.get("out") is not None
    if in_place or (name.endswith("_") and not name.endswith("__")):
        return "changes"
    is_data = node.target is getattr and node.args[1] == "data"
    return "perhaps" if is_data or name in _PERHAPS_VIEWS else None
