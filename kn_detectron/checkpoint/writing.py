"""The file of a network's weights, without the state of a training."""

from typing import Dict

import torch
from torch import Tensor

from ..files import atomic_write, explained_write_errors
from .conventions import CHECKPOINT_KEY, Conventions

__all__ = ["write_weights"]


def write_weights(
    path: str, state: Dict[str, Tensor], conventions: Conventions, matching_heuristics: bool
) -> None:
    """Writes weights for MODEL.WEIGHTS, with what they presuppose.

    Args:
        path: local file to write or to replace.
        state: tensors by name.
        conventions: of the images and strides that the weights are for.
        matching_heuristics: whether detectron2 may look for a tensor's place by the end of its
            name.

    Raises:
        InputError: the file cannot be written.
    """
    content = {
        "model": state,
        "matching_heuristics": matching_heuristics,
        "__author__": "kn_detectron",
        CHECKPOINT_KEY: conventions.to_dict(),
    }
    with explained_write_errors(path, "give another place for it."):
        with atomic_write(path) as file:
            torch.save(content, file)
