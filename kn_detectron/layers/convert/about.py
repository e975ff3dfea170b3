"""What is known about a feature while a network is converted."""

from dataclasses import dataclass
from typing import Optional, Tuple

from torch import fx

__all__ = ["About", "End"]


@dataclass(eq=False)
class About:
    """What is known about a feature.

    Attributes:
        channels: the sizes of its dimensions between batch and height: one, but where the code has
            split the channels into groups.
        belief: the node that makes the belief.
        source: the node that makes what a convolution reads (a sampled feature map where priors
            are sampled). One of the two may be missing, and is made where it is needed.
    """

    channels: Tuple[int, ...]
    belief: Optional[fx.Node] = None
    source: Optional[fx.Node] = None


class End(Exception):
    """The end of a chain: why nothing is known about a feature, and which node's it was first.

    A feature whose statistics nobody expects to know, such as the image in the paper variant, has
    no reason.
    """

    def __init__(self, why: str = ""):
        super().__init__(why)
        self.why = why
        self.node: Optional[fx.Node] = None
