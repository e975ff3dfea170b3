"""The one pass over an annotation file before a run: the checks, in their order."""

import contextlib
import gc
from typing import NamedTuple, Optional, Tuple

from .boxes import check_areas, check_boxes, has_area
from .categories import check_categories
from .crowds import check_crowds
from .files import find_images
from .images import check_images
from .keypoints import check_keypoints
from .masks import MaskChecker, cover_crowds
from .reading import read_annotations
from .references import check_ids, check_references
from .report import Report
from .structure import check_structure

__all__ = ["Truth", "Uses", "check_annotations"]


class Uses(NamedTuple):
    """What a run makes use of.

    Attributes:
        masks: whether segmentations are learned or evaluated.
        keypoints: how many keypoints of an object are; 0 for none.
    """

    masks: bool = True
    keypoints: int = 0


class Truth(NamedTuple):
    """What an annotation file holds, as far as a config depends on it.

    Attributes:
        json_file: the file.
        classes: names of the categories, in the order of their ids.
        has_annotations: whether there are any at all; COCO does not publish those of its test sets.
        num_objects: number of objects that can be learned: no crowds, with an area.
        num_without_mask: how many of the objects that are no crowds have no segmentation.
        first_without_mask: place of the first of them in the file, or None.
        has_encoded_masks: whether a segmentation is run-length encoded, crowds aside.
        most_objects: most objects in an image, crowds aside.
        fullest_image: file name of that image, or None.
        most_keypoints: most labelled keypoints in an image, crowds aside; 0 if none are used.
    """

    json_file: str
    classes: Tuple[str, ...]
    has_annotations: bool
    num_objects: int
    num_without_mask: int
    first_without_mask: Optional[int]
    has_encoded_masks: bool
    most_objects: int
    fullest_image: Optional[str]
    most_keypoints: int = 0


def check_annotations(json_file, image_root, dataset_name, uses):
    """Reads an annotation file, and mends what has one clear meaning.

    Args:
        json_file (str): in COCO's format.
        image_root (str): folder of its images.
        dataset_name (str): to be named where images are missing.
        uses (Uses): what the run will use of it.

    Returns:
        tuple[dict, Truth, Report]: the content, its summary, and what was found.

    Raises:
        InputError: an entry has no clear meaning. The error names the file, the entry and what to
        do.
    """
    report = Report(json_file)
    with _garbage_left_alone():
        content = read_annotations(json_file, report)
        truth = _check_content(content, image_root, dataset_name, uses, report)
    return content, truth, report


def _check_content(content, image_root, dataset_name, uses, report):
    check_structure(content, report)
    content["categories"] = check_categories(content["categories"], report)
    content["images"] = check_images(content["images"], report)
    find_images(content["images"], image_root, dataset_name, report)
    objects = list(enumerate(content.get("annotations", ())))
    objects = _check_objects(objects, content, uses, report)
    if "annotations" in content:
        content["annotations"] = [annotation for _, annotation in objects]
    return _truth(content, objects, uses, report)


@contextlib.contextmanager
def _garbage_left_alone():
    """Pauses the garbage collector, which takes a third of the time to visit objects that stay."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _check_objects(objects, content, uses, report):
    """Runs the checks. Each may rely on those before it."""
    images, categories = content["images"], content["categories"]
    sizes = {image["id"]: (image["width"], image["height"]) for image in images}
    objects = check_references(objects, images, categories, report)
    check_ids(objects, report)
    check_crowds(objects, report)
    objects = MaskChecker(sizes, uses.masks, report).check(objects)
    check_boxes(objects, sizes, report)
    if uses.masks:
        cover_crowds(objects, report)
    check_areas(objects, sizes, report)
    check_keypoints(objects, uses.keypoints, report)
    return objects


def _truth(content, objects, uses, report):
    images = {image["id"]: image for image in content["images"]}
    counts, keypoints = dict.fromkeys(images, 0), dict.fromkeys(images, 0)
    without, usable, encoded = [], 0, False
    for index, annotation in objects:
        if annotation["iscrowd"]:
            continue
        image = images[annotation["image_id"]]
        counts[image["id"]] += 1
        if uses.keypoints:
            keypoints[image["id"]] += annotation["num_keypoints"]
        usable += has_area(annotation["bbox"], (image["width"], image["height"]))
        segmentation = annotation.get("segmentation")
        if not segmentation:
            without.append(index)
        encoded |= isinstance(segmentation, dict)
    fullest = max(counts, key=counts.get)
    return Truth(
        json_file=report.json_file,
        classes=tuple(c["name"] for c in sorted(content["categories"], key=lambda c: c["id"])),
        has_annotations="annotations" in content,
        num_objects=usable,
        num_without_mask=len(without),
        first_without_mask=without[0] if without else None,
        has_encoded_masks=encoded,
        most_objects=counts[fullest],
        fullest_image=images[fullest]["file_name"] if counts[fullest] else None,
        most_keypoints=max(keypoints.values()),
    )
