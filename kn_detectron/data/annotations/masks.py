"""Segmentations: polygons, run-length encoded masks, and what tools write in their place."""

import itertools

import numpy as np
from pycocotools import mask as mask_util

from .run_lengths import fault_of_run_lengths
from .values import as_finite

__all__ = ["MaskChecker", "area_of", "box_of", "cover_crowds"]

# The number of coordinates that are looked at together.
_CHUNK = 1 << 20

_NO_REGION = "a segmentation has no polygon of three points or more"


class MaskChecker:
    """Checks the segmentations of objects.

    If the run uses masks, a mask without a clear meaning is refused. If it does not, the mask is
    removed and the object keeps its box.
    """

    def __init__(self, image_sizes, used, report):
        """
        Args:
            image_sizes (dict): (width, height) of each image id.
            used (bool): whether the run learns or evaluates masks.
            report (Report): gets the counts.
        """
        self._sizes = image_sizes
        self._used = used
        self._report = report

    def check(self, objects):
        """Checks all objects.

        Args:
            objects (list[tuple[int, dict]]): with their places in the file; changed in place.

        Returns:
            list[tuple[int, dict]]: the objects that are left.

        Raises:
            InputError: the run uses a mask that cannot be used.
        """
        polygons, dropped, waiting = [], set(), 0
        for index, annotation in objects:
            found = annotation.get("segmentation")
            if not found:
                continue  # whether that may be is a matter of the config
            if type(found) is list and all(map(_is_polygon, found)):
                polygons.append((index, annotation))
                waiting += sum(map(len, found))
                if waiting > _CHUNK:
                    self._check_polygons(polygons)
                    polygons, waiting = [], 0
            elif isinstance(found, dict):
                fault = fault_of_run_lengths(found, self._sizes[annotation["image_id"]])
                if fault:
                    self._refuse(f"has a segmentation that {fault},", index, annotation)
            elif not self._rewrite(index, annotation):
                dropped.add(index)
            else:
                polygons.append((index, annotation))
        self._check_polygons(polygons)
        return [entry for entry in objects if entry[0] not in dropped] if dropped else objects

    def _check_polygons(self, objects):
        """Checks that all coordinates are finite and near the image."""
        objects = [(i, a) for i, a in objects if a.get("segmentation")]
        if not objects:
            return
        try:
            points, counts = _points_of(objects)
        except (TypeError, ValueError, OverflowError):  # not all are numbers
            for index, annotation in objects:
                self._check_one(index, annotation)
            return
        starts = np.cumsum(counts) - counts
        low = np.minimum.reduceat(points, starts)
        high = np.maximum.reduceat(points, starts)
        size = np.array([self._sizes[a["image_id"]] for _, a in objects], np.float64)
        # Not a number is not near either.
        near = ((low >= -size) & (high <= 2 * size)).all(1)
        for place in np.flatnonzero(~near):
            self._refuse(
                "has a segmentation with a coordinate that is not a number or lies far outside "
                "the image",
                *objects[place],
            )

    def _check_one(self, index, annotation):
        """Checks an object in a chunk where something is no number."""
        found = annotation["segmentation"]
        numbers = [[as_finite(value) for value in part] for part in found]
        if any(value is None for part in numbers for value in part):
            self._refuse(
                "has a segmentation with a coordinate that is not a number", index, annotation
            )
            return
        if numbers != found:
            annotation["segmentation"] = numbers
            self._report.mended(
                "a coordinate of a segmentation is text and is taken as a number",
                "annotations",
                index,
            )
        self._check_polygons([(index, annotation)])

    def _rewrite(self, index, annotation):
        """Turns a segmentation that is not written as COCO's polygons into such polygons.

        Returns:
            bool: whether the object stays.
        """
        polygons = _as_polygons(annotation["segmentation"])
        if polygons is None:
            self._refuse(
                "has a segmentation that is neither a list of polygons nor a run-length encoded "
                "mask",
                index,
                annotation,
            )
            return True
        regions = [part for part in polygons if _is_polygon(part)]
        if regions:
            annotation["segmentation"] = regions
            self._report.mended(
                (
                    "a segmentation is not written as a list of polygons and now is"
                    if len(regions) == len(polygons)
                    else "a part of a segmentation is no polygon of three points or more and is "
                    "left out"
                ),
                "annotations",
                index,
            )
            return True
        if self._used:
            self._report.mended(f"{_NO_REGION}, and its object is left out", "annotations", index)
            return False
        self._take_away(index, annotation)
        return True

    def _refuse(self, fault, index, annotation):
        if self._used:
            raise self._report.fault(
                fault,
                "correct it, or give MODEL.MASK_ON False to learn boxes only",
                "annotations",
                annotation,
                index,
            )
        self._take_away(index, annotation)

    def _take_away(self, index, annotation):
        del annotation["segmentation"]
        self._report.mended(
            "a segmentation cannot be used and is left out, since MODEL.MASK_ON is False",
            "annotations",
            index,
        )


def _is_polygon(part):
    # What its elements are is looked at for many polygons together.
    return type(part) is list and len(part) >= 6 and len(part) % 2 == 0 and _is_flat(part)


def _is_flat(part):
    return type(part[0]) is not list


def _as_polygons(found):
    """Gives a list of flat lists, some of which may be no polygons; None for other forms."""
    if not isinstance(found, list):
        return None
    lists = [isinstance(part, list) for part in found]
    if any(isinstance(part, dict) for part in found):
        return None
    if not any(lists):
        return [found]  # the numbers themselves
    if not all(lists):
        return None
    if len(found) >= 3 and all(len(p) == 2 and not isinstance(p[0], list) for p in found):
        return [list(itertools.chain.from_iterable(found))]  # points
    polygons = []
    for part in found:
        if part and isinstance(part[0], list):  # a polygon of points
            if not all(isinstance(point, list) and len(point) == 2 for point in part):
                return None
            part = list(itertools.chain.from_iterable(part))
        polygons.append(part)
    return polygons


def _points_of(objects):
    """Gives all points of the objects, shape (P, 2), and how many each object has."""
    parts = [part for _, annotation in objects for part in annotation["segmentation"]]
    flat = list(itertools.chain.from_iterable(parts))
    if not set(map(type, flat)) <= {int, float}:
        raise TypeError
    counts = [sum(map(len, annotation["segmentation"])) // 2 for _, annotation in objects]
    return np.array(flat, np.float64).reshape(-1, 2), np.array(counts)


def cover_crowds(objects, report):
    """Gives a crowd without a mask the mask of its box, since pycocotools needs one.

    Args:
        objects (list[tuple[int, dict]]): with boxes that were checked; changed in place.
        report (Report): gets the counts.
    """
    for index, annotation in objects:
        if annotation["iscrowd"] and not annotation.get("segmentation"):
            x, y, width, height = annotation["bbox"]
            right, bottom = x + width, y + height
            annotation["segmentation"] = [[x, y, right, y, right, bottom, x, bottom]]
            report.mended(
                "a crowd has no segmentation, and its bbox becomes it", "annotations", index
            )


def area_of(segmentation, size):
    """Gives the number of pixels of a mask.

    Args:
        segmentation (list or dict): one that was checked.
        size (tuple[int, int]): width and height of its image.

    Returns:
        float
    """
    return float(mask_util.area(_encoded(segmentation, size)))


def box_of(segmentation, size):
    """Gives the box of a mask, [x, y, width, height]: see :func:`area_of`.

    A box of polygons is that of their points, which the pixels round.
    """
    if isinstance(segmentation, dict):
        return mask_util.toBbox(_encoded(segmentation, size)).tolist()
    points = np.concatenate([np.asarray(part, float).reshape(-1, 2) for part in segmentation])
    low, high = points.min(0), points.max(0)
    return [*low.tolist(), *(high - low).tolist()]


def _encoded(segmentation, size):
    width, height = size
    if isinstance(segmentation, list):
        return mask_util.merge(mask_util.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return mask_util.frPyObjects(segmentation, height, width)
    return segmentation
