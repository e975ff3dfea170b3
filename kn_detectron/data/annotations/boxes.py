"""Boxes of objects, and their areas."""

import math

from .masks import area_of, box_of
from .values import as_finite, is_plain_number

__all__ = ["check_areas", "check_boxes", "has_area"]


def check_boxes(objects, image_sizes, report):
    """Checks that all boxes are four numbers, [x, y, width, height], near their images.

    Args:
        objects (list[tuple[int, dict]]): with their places in the file and masks that were
            checked; changed in place.
        image_sizes (dict): (width, height) of each image id.
        report (Report): gets the counts.

    Raises:
        InputError: a box is not, and its object has no mask to take a box from; or the boxes are
            corners, or fractions of the images.
    """
    corners, reach = _Corners(), 0.0
    for index, annotation in objects:
        size = image_sizes[annotation["image_id"]]
        if not _is_box(annotation.get("bbox")):
            annotation["bbox"] = _box_that_is_meant(annotation, size, index, report)
        x, y, width, height = annotation["bbox"]
        if width < 0 or height < 0:
            x, y = min(x, x + width), min(y, y + height)
            width, height = abs(width), abs(height)
            annotation["bbox"] = [x, y, width, height]
            report.mended(
                "a bbox has a negative width or height, and is taken from its other corner",
                "annotations",
                index,
            )
        if not _is_near(annotation["bbox"], size):
            raise report.fault(
                f"has the bbox {annotation['bbox']}, far outside its image of {size[0]} x "
                f"{size[1]} pixels,",
                "correct or remove the object",
                "annotations",
                annotation,
                index,
            )
        if not has_area(annotation["bbox"], size):
            report.noted(
                "a bbox has no area within its image, and its object is not learned",
                "annotations",
                index,
            )
        corners.look_at(annotation["bbox"], size, index)
        reach = max(reach, x + width, y + height)
    if 0 < reach <= 1:
        first, annotation = objects[0]
        raise report.fault(
            "has boxes that all lie in the first pixel of their images, as fractions do, the first",
            "write pixels: multiply by width and height of the image",
            "annotations",
            annotation,
            first,
        )
    if corners.are_certain():
        raise report.fault(
            f"has boxes [left, top, right, bottom]: {corners.outside} of them stick out of their "
            "images as [x, y, width, height], the first",
            "write COCO's [x, y, width, height]",
            "annotations",
            dict(objects)[corners.first],
            corners.first,
        )
    if corners.are_likely():
        report.noted(
            "a bbox sticks out of its image if it is [x, y, width, height], while all could be "
            "[left, top, right, bottom], which COCO's are not",
            "annotations",
            corners.first,
        )


def _is_box(box):
    if type(box) is not list or len(box) != 4 or not all(map(is_plain_number, box)):
        return False
    try:
        return math.isfinite(sum(box))
    except OverflowError:  # a whole number beyond all floats
        return False


def _box_that_is_meant(annotation, size, index, report):
    found = annotation.get("bbox")
    if isinstance(found, list) and len(found) == 4:
        numbers = [as_finite(value) for value in found]
        if None not in numbers:
            report.mended("a bbox holds text, which is taken as numbers", "annotations", index)
            return numbers
    if annotation.get("segmentation"):
        report.mended(
            "a bbox is not four numbers, and becomes the box of the segmentation",
            "annotations",
            index,
        )
        return box_of(annotation["segmentation"], size)
    raise report.fault(
        f"has the bbox {found!r}",
        "give four numbers, [x, y, width, height], or remove the object",
        "annotations",
        annotation,
        index,
    )


def _is_near(box, size):
    x, y, width, height = box
    return (
        -size[0] <= x and -size[1] <= y and x + width <= 2 * size[0] and y + height <= 2 * size[1]
    )


def has_area(box, size):
    """Tells whether a box that was checked has an area within an image of a size."""
    x, y, width, height = box
    return (
        width > 0
        and height > 0
        and x < size[0]
        and y < size[1]
        and x + width > 0
        and y + height > 0
    )


class _Corners:
    """Tells boxes that hold two corners from those with a corner and a size."""

    def __init__(self):
        self.first = None
        self.outside = 0
        self._looked_at = 0
        self._all_fit = True

    def look_at(self, box, size, index):
        """Takes a box into account."""
        if not self._all_fit:
            return
        self._looked_at += 1
        x, y, right, bottom = box
        self._all_fit = x < right <= size[0] + 1 and y < bottom <= size[1] + 1
        if x + right > size[0] + 1 or y + bottom > size[1] + 1:
            self.outside += 1
            if self.first is None:
                self.first = index

    def are_certain(self):
        """Whether all boxes can be corners, and most of many can be nothing else."""
        return self._all_fit and self.outside >= max(10, self._looked_at / 2)

    def are_likely(self):
        """Whether all boxes can be corners and some can hardly be anything else."""
        return self._all_fit and self.outside >= 3


def check_areas(objects, image_sizes, report):
    """Gives objects whose area cannot be right the area of their mask, or else of their box.

    Args:
        objects, image_sizes, report: as for :func:`check_boxes`, with boxes that were checked.
    """
    for index, annotation in objects:
        found = annotation.get("area")
        size = image_sizes[annotation["image_id"]]
        _, _, width, height = annotation["bbox"]
        if (
            is_plain_number(found)
            and (0 < found or width * height == 0)
            and 0 <= found <= size[0] * size[1]
        ):
            continue
        if annotation.get("segmentation"):
            area = area_of(annotation["segmentation"], size)
        else:
            area = width * height
        if area != found:
            annotation["area"] = area
            report.mended(
                "area is missing, no number or that of no such object, and becomes that of the "
                "mask or the bbox",
                "annotations",
                index,
            )
