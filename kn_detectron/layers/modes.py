"""Modes that code runs in: training and evaluation of whole networks, and without autocast."""

import contextlib
from typing import ContextManager, Iterator

import torch
from torch import Tensor, nn

__all__ = ["in_mode", "without_autocast"]


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


def without_autocast(x: Tensor) -> ContextManager:
    """Context in which autocast does not round what is computed on the device of a tensor."""
    # "meta", where nothing is computed, has no autocast.
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
