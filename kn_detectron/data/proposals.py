"""Files of precomputed proposals, as detectron2 reads them."""

import numpy as np
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from ..errors import InputError
from ..files import read_container

__all__ = ["check_proposals"]

# detectron2's names, with those that Detectron gave them.
_NAMES = {"ids": "indexes", "boxes": "boxes", "objectness_logits": "scores"}


def check_proposals(path, dicts):
    """Checks that a file has proposals for each image of a dataset.

    Args:
        path (str): a pickled dict with the lists ``ids`` of image ids, ``boxes`` of arrays (n, 4) in
            pixels, and ``objectness_logits`` of arrays (n,); perhaps with ``bbox_mode``.
        dicts (list[dict]): the images, with their ``image_id``.

    Raises:
        InputError: it has not, or it holds something else.
    """
    advice = "write the file again for the images of this dataset"
    try:
        found = read_container(PathManager.get_local_path(path))
    except InputError as error:  # which speaks of checkpoints
        raise InputError(
            f"{path} is no file of proposals: expected a pickled dict of lists and numpy arrays; "
            f"{advice}."
        ) from error
    lists = {}
    for name, other in _NAMES.items():
        lists[name] = found.get(name, found.get(other))
        if not isinstance(lists[name], (list, tuple, np.ndarray)):
            raise InputError(f"{path} of proposals has no list {name!r}: {advice}.")
    counts = {name: len(values) for name, values in lists.items()}
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise InputError(
            f"{path} of proposals has lists of different lengths ({said}), where each has one entry "
            f"for an image: {advice}."
        )
    if found.get("bbox_mode", BoxMode.XYXY_ABS) not in (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS):
        raise InputError(
            f"{path} of proposals has the bbox_mode {found['bbox_mode']!r}, where 0 (x0, y0, x1, y1) "
            f"or 1 (x0, y0, width, height) was expected: {advice}."
        )
    places = {}
    for place, image_id in enumerate(lists["ids"]):
        if str(image_id) in places:
            raise InputError(
                f"{path} of proposals has image id {image_id} twice, in entries "
                f"{places[str(image_id)]} and {place}: {advice}."
            )
        places[str(image_id)] = place
    for record in dicts:
        image_id = record["image_id"]
        place = places.get(str(image_id))
        if place is None:
            raise InputError(f"{path} of proposals has none for image id {image_id}: {advice}.")
        fault = _fault(lists["boxes"][place], lists["objectness_logits"][place])
        if fault:
            raise InputError(
                f"{path} of proposals has for image id {image_id}, in entry {place}, {fault}: "
                f"{advice}."
            )


def _fault(boxes, logits):
    for name, values in (("boxes", boxes), ("objectness_logits", logits)):
        if not isinstance(values, np.ndarray) or values.dtype.kind not in "iuf":
            return f"{name} that are no array of numbers"
        if not np.isfinite(values).all():
            return f"{name} that are not finite"
    if boxes.ndim != 2 or boxes.shape[1] != 4 or logits.shape != boxes.shape[:1]:
        return (
            f"boxes of shape {boxes.shape} and objectness_logits of shape {logits.shape}, where "
            "(n, 4) and (n,) were expected"
        )
    return None
