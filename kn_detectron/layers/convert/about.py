"""What is known about a feature while a network is converted."""

from dataclasses import dataclass
from typing import Optional, Tuple

from torch import fx

__all__ = ["NO_FEATURE_MAP", "About", "End"]

NO_FEATURE_MAP = "its output is no feature map"


@dataclass(eq=False)
class About:
    """What is known about a feature.

    Attributes:
        channels: the sizes of the dimensions between batch and height. There is one such dimension,
            unless the code has split the channels into groups.
        belief: the node that makes the belief, or None if it was not needed yet.
        source: the node that makes the transition's source, or None if it was not needed yet. At
            least one of ``belief`` and ``source`` is a node.
    """

    channels: Tuple[int, ...]
    belief: Optional[fx.Node] = None
    source: Optional[fx.Node] = None


class End(Exception):
    """The end of a chain: nothing is known about a feature.

    Attributes:
        why: the reason. It is empty if there is nothing to know, as about the image in the paper
            variant.
        node: the first node about whose output nothing is known.
    """

    def __init__(self, why: str = ""):
        super().__init__(why)
        self.why = why
        self.node: Optional[fx.Node] = None
