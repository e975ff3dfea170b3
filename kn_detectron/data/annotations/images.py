"""The images that an annotation file lists."""

from .ids import settle_ids
from .values import as_whole

__all__ = ["check_images"]


def check_images(images, report):
    """Checks ids, names and sizes, without looking at the files.

    Args:
        images (list[dict]): changed in place.
        report (Report): gets the counts.

    Returns:
        list[dict]: the images that are left.

    Raises:
        InputError: an image lacks its id, name or size, or two files have the same id.
    """
    settle_ids(images, "images", report)
    by_id, names = {}, set()
    for index, image in enumerate(images):
        name = image.get("file_name")
        if not isinstance(name, str) or not name:
            raise report.fault(
                f"has the file_name {name!r}",
                "give the path of the image within the image folder",
                "images",
                image,
                index,
            )
        for side in ("width", "height"):
            _check_side(image, side, index, report)
        other = by_id.setdefault(image["id"], image)
        if other is image:
            if name in names:
                report.noted(
                    "an image is listed under two ids, and each has only a part of its objects",
                    "images",
                    index,
                )
            names.add(name)
        elif other["file_name"] == name:
            report.mended("an image is listed again and is left out", "images", index)
        else:
            raise report.fault(
                f"gives {name} the id {image['id']!r} that {other['file_name']} has",
                "give each image an id of its own, and its objects that image_id",
                "images",
                image,
                index,
            )
    return list(by_id.values())


def _check_side(image, side, index, report):
    found = image.get(side)
    if type(found) is int and found > 0:
        return
    size = as_whole(found)
    if size is None or size <= 0:
        raise report.fault(
            f"has the {side} {found!r}",
            "give the size of the image in pixels",
            "images",
            image,
            index,
        )
    image[side] = size
    report.mended(
        "a width or height was not written as a whole number and now is one", "images", index
    )
