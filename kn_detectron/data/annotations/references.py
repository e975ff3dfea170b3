"""The image and the category that an object belongs to, and its own id."""

from .ids import References
from .values import as_whole

__all__ = ["check_ids", "check_references"]


def check_references(objects, images, categories, report):
    """Resolves image_id and category_id of all objects.

    Args:
        objects (list[tuple[int, dict]]): with their places in the file; changed in place.
        images (list[dict]): with ids that were checked.
        categories (list[dict]): with ids that were checked.
        report (Report): gets the counts.

    Returns:
        list[tuple[int, dict]]: the objects whose image is listed.

    Raises:
        InputError: an object has no image_id, or a category_id that no category has.
    """
    image_ids = References(image["id"] for image in images)
    category_ids = References(category["id"] for category in categories)
    kept = []
    for index, annotation in objects:
        if annotation.get("image_id") is None:
            raise _fault("image_id", "images", annotation, index, report)
        if not _resolve(annotation, "image_id", image_ids, index, report):
            report.mended(
                "an object has an image_id that none of the images has, and is left out",
                "annotations",
                index,
            )
            continue
        if not _resolve(annotation, "category_id", category_ids, index, report):
            raise _fault("category_id", "categories", annotation, index, report)
        kept.append((index, annotation))
    return kept


def _resolve(annotation, key, references, index, report):
    found = annotation.get(key)
    if type(found) in (int, str) and found in references:
        return True
    meant = None if isinstance(found, bool) else references.resolve(found)
    if meant is None:
        return False
    annotation[key] = meant
    report.mended(
        f"{key} is written in another way than the id it refers to, and now is as it",
        "annotations",
        index,
    )
    return True


def _fault(key, part, annotation, index, report):
    return report.fault(
        f"has the {key} {annotation.get(key)!r}, which is none of its {part},",
        f"correct it or add what is missing to {part}",
        "annotations",
        annotation,
        index,
    )


def check_ids(objects, report):
    """Gives each object a positive number of its own where it has none.

    Nothing refers to these ids, but pycocotools needs them. Of several objects with one id it keeps
    only one, and it takes a match with object 0 for no match.

    Args:
        objects, report: as for :func:`check_references`.
    """
    taken, without = set(), []
    for index, annotation in objects:
        found = annotation.get("id")
        # pycocotools makes a float of it.
        usable = type(found) is int and found > 0 and as_whole(found) is not None
        if usable and found not in taken:
            taken.add(found)
        else:
            without.append((index, annotation))
    free = max(taken, default=0)
    for index, annotation in without:
        whole = as_whole(annotation.get("id"))
        if whole is None or whole <= 0 or whole in taken:
            free += 1
            whole = free
        free = max(free, whole)
        taken.add(whole)
        annotation["id"] = whole
        report.mended(
            "the id of an object is not a positive number of its own, and it gets one",
            "annotations",
            index,
        )
