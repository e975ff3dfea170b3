"""The lists that an annotation file consists of."""

import os

from ...errors import InputError

__all__ = ["check_structure"]

PARTS = ("images", "annotations", "categories")


def check_structure(content, report):
    """Checks that a parsed file is an object with COCO's three lists of objects.

    The test sets of COCO, whose files are named image_info_*, need no annotations.

    Args:
        content: of the file.
        report (Report): of the file.

    Raises:
        InputError: the file holds no such object, or a list is missing, empty or of other things.
    """
    if not isinstance(content, dict):
        raise _is_no_coco(report, f"holds a JSON {type(content).__name__}")
    for part in PARTS:
        if part == "annotations" and part not in content and _is_test_set(report.json_file):
            continue
        entries = content.get(part)
        if not isinstance(entries, list):
            raise _is_no_coco(report, f"has no list {part}")
        if not entries and part != "annotations":
            raise _is_no_coco(report, f"has an empty list {part}")
        for index, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise _is_no_coco(report, f"has no object in entry {index} of {part}")


def _is_test_set(json_file):
    return os.path.basename(json_file).startswith("image_info")


def _is_no_coco(report, fault):
    return InputError(
        f"Annotation file {report.json_file} {fault}: expected COCO instances, a JSON object with "
        "the lists images, annotations and categories."
    )
