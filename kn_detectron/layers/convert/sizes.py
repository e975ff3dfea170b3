"""Sizes: the numbers that a network's code computes from the shapes of its features."""

import operator
from typing import Any, Dict, Optional, Tuple

from torch import fx

from .tracing import IN_PLACE

__all__ = ["IMAGES", "Sizes"]

# Stands for the batch size, which is not known.
IMAGES = object()

_ARITHMETIC = (operator.getitem, operator.floordiv, operator.mul, operator.add, operator.sub)


class Sizes:
    """The nodes that are sizes, or are computed from sizes.

    Numbers of channels have known values, and the batch size is :data:`IMAGES`. Height, width and
    what is computed from these three have the value None.
    """

    def __init__(self):
        self._values: Dict[fx.Node, Any] = {}

    def __contains__(self, node: fx.Node) -> bool:
        return node in self._values

    def value(self, x: Any) -> Any:
        """The value of a node's argument, or None for a size that is not known."""
        return self._values.get(x) if isinstance(x, fx.Node) else x

    def note(self, node: fx.Node, channels: Optional[Tuple[int, ...]]) -> bool:
        """Notes a node if it is a size.

        Args:
            node: an operation in place becomes one out of place, which is the same for numbers.
            channels: the channels of the first argument, if it is a feature and they are known.

        Returns:
            bool: whether the node is a size.
        """
        if node.op == "call_method" and node.target in ("size", "dim"):
            dim = node.kwargs.get("dim", *node.args[1:2]) if node.target == "size" else None
            name = "shape" if node.target == "size" else "ndim"
            self._values[node] = self._attribute(name, channels, dim)
        elif node.op == "call_function" and node.target is getattr:
            self._values[node] = self._attribute(node.args[1], channels)
        elif node.op == "call_function" and all(x in self for x in node.all_input_nodes):
            node.target = IN_PLACE.get(node.target, node.target)
            args = fx.node.map_arg(node.args, self._values.get)
            known = node.target in _ARITHMETIC and None not in args and IMAGES not in args
            self._values[node] = node.target(*args) if known else None
        return node in self

    @staticmethod
    def _attribute(name: str, channels: Optional[Tuple[int, ...]], dim: Any = None) -> Any:
        if channels is None:
            return None
        shape = (IMAGES, *channels, None, None)
        if name == "ndim":
            return len(shape)
        if name != "shape":  # device, dtype
            return None
        return shape if dim is None else shape[dim]
