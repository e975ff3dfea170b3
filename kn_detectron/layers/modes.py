"""Training and evaluation mode of whole networks."""

import contextlib
from typing import Iterator

from torch import nn

__all__ = ["in_mode"]


@contextlib.contextmanager
def in_mode(network: nn.Module, training: bool) -> Iterator[None]:
    """Puts a network into training or evaluation mode, and every module back afterwards.

    A module may be in another mode than the network: a norm in evaluation mode keeps its statistics
    while the rest is trained.
    """
    modes = [(module, module.training) for module in network.modules()]
    try:
        network.train(training)
        yield
    finally:
        for module, mode in modes:  # a module comes before those in it
            if module.training != mode:
                # Not the flag alone: train() may do more, as torchvision's feature extractors do.
                module.train(mode)
        for module, mode in modes:  # one that has two parents may have followed the other one
            module.training = mode
