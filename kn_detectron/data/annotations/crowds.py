"""Crowds: objects that are neither learned nor counted."""

from .values import as_whole

__all__ = ["check_crowds"]


def check_crowds(objects, report):
    """Makes iscrowd 0 or 1 in all objects, and leaves ``ignore`` out.

    COCO has one flag for objects that detections may find and need not find. Other formats call it
    ignore or difficult. Tools that convert these formats keep the name, which detectron2 refuses
    and pycocotools overlooks.

    Args:
        objects (list[tuple[int, dict]]): with their places in the file; changed in place.
        report (Report): gets the counts.

    Raises:
        InputError: a flag is neither 0 nor 1.
    """
    for index, annotation in objects:
        found = annotation.get("iscrowd")
        if not (type(found) is int and found in (0, 1)):
            annotation["iscrowd"] = _flag(annotation, "iscrowd", index, report)
            report.mended(
                (
                    "iscrowd is missing or null, and is taken as 0"
                    if found is None
                    else "iscrowd is not written as a number, and now is"
                ),
                "annotations",
                index,
            )
        if "ignore" in annotation:
            found = annotation["ignore"]
            ignored = _flag(annotation, "ignore", index, report)
            if found == 0:
                continue  # as detectron2 has it
            del annotation["ignore"]
            if ignored:
                annotation["iscrowd"] = 1
            report.mended(
                (
                    "an object with ignore is taken as a crowd: it is not learned and not counted"
                    if ignored
                    else "ignore is not written as a number, and is taken as 0"
                ),
                "annotations",
                index,
            )


def _flag(annotation, key, index, report):
    found = annotation.get(key)
    if found is None or found == "":
        return 0
    flag = int(found) if isinstance(found, bool) else as_whole(found)
    if flag not in (0, 1):
        raise report.fault(
            f"has the {key} {found!r}", "give 0 or 1", "annotations", annotation, index
        )
    return flag
