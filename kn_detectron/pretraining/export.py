"""A classifier's backbone as a file for MODEL.WEIGHTS of a detector."""

import torch

from ..checkpoint.conventions import CHECKPOINT_KEY
from ..files import atomic_write

__all__ = ["export_backbone"]


def export_backbone(state, path, conventions):
    """Writes the weights of a classifier as those of a detector's ResNet.

    The names have no prefix, so that stem to res4 and res5 find their places in any detector.

    Args:
        state (dict[str, Tensor]): of an :class:`~kn_detectron.pretraining.ImageClassifier`.
        path (str): file to write or to replace.
        conventions (Conventions): of the config that it was trained with.
    """
    model = {
        name.removeprefix("backbone."): tensor.detach().cpu().contiguous()
        for name, tensor in state.items()
    }
    content = {
        "model": model,
        "matching_heuristics": True,
        "__author__": "kn_detectron",
        CHECKPOINT_KEY: conventions.to_dict(),
    }
    with atomic_write(path) as file:
        torch.save(content, file)
