"""A classifier's backbone as a file for MODEL.WEIGHTS of a detector."""

from ..checkpoint.writing import write_weights

__all__ = ["export_backbone"]


def export_backbone(state, path, conventions):
    """Writes the weights of a classifier as those of its backbone, such as a detector's ResNet.

    The names have no prefix, so that stem to res4 and res5 find their places in any detector.

    Args:
        state (dict[str, Tensor]): of an :class:`~kn_detectron.pretraining.ImageClassifier`.
        path (str): file to write or to replace.
        conventions (Conventions): of the config that it was trained with.
    """
    bare = {
        name.removeprefix("backbone."): tensor.detach().cpu().contiguous()
        for name, tensor in state.items()
    }
    write_weights(path, bare, conventions, matching_heuristics=True)
