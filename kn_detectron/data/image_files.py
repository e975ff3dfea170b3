"""Image files: how they are read, and what is wrong with one, in a sentence."""

import logging
import os

from detectron2.data import detection_utils
from detectron2.utils.file_io import PathManager
from PIL import ExifTags, Image

from ..errors import InputError, one_line

__all__ = ["check_headers", "fault_of_image", "read_rgb"]

_logger = logging.getLogger(__name__)

_ORIENTATION = ExifTags.Base.Orientation
# These mirror an image, or turn it by half: its sides do not tell whether its annotations do too.
_KEEPS_SIZE = (2, 3, 4)


def check_headers(records, image_root):
    """Opens images, without decoding them, and compares their sizes with the annotated ones.

    Where an EXIF orientation mirrors images or turns them by half, a warning says how many.

    Args:
        records (Iterable[dict]): the images of an annotation file.
        image_root (str): their folder.

    Raises:
        InputError: naming the first one that a run could not use.
    """
    turned = []
    for record in records:
        path = os.path.join(image_root, record["file_name"])
        fault, orientation = _look_at(path, (record["width"], record["height"]), decode=False)
        if fault:
            raise InputError(fault)
        if orientation in _KEEPS_SIZE:
            turned.append(path)
    if turned:
        _logger.warning(
            "%d images have an EXIF orientation that mirrors them or turns them by half, the first "
            "is %s. They are used as that says: check that their annotations are of the turned "
            "images, or remove the tag.",
            *(len(turned), turned[0]),
        )


def read_rgb(path):
    """Reads an image as a detector does, turned as its EXIF orientation says.

    Args:
        path (str): of the file.

    Returns:
        np.ndarray: of shape (H, W, 3), uint8.

    Raises:
        InputError: it cannot be read, or its pixels have more than 8 bits.
    """
    try:
        with PathManager.open(path, "rb") as file, Image.open(file) as image:
            _check_depth(image)
        return detection_utils.read_image(path, "RGB")
    except MemoryError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError and others
        raise InputError(
            f"Image {path} cannot be read ({one_line(error)}): expected an intact image file, "
            "replace it or remove it."
        ) from error


def fault_of_image(path, annotated_size=None):
    """Tells why an image cannot be used. All of it is read.

    Args:
        path (str): of the file.
        annotated_size (tuple[int, int] or None): width and height that it is to have, if any.

    Returns:
        str or None: a sentence, or None for an image that can be used.
    """
    fault, _ = _look_at(path, annotated_size, decode=True)
    return fault


def _look_at(path, annotated_size, decode):
    """What is wrong with an image, or None, and its EXIF orientation."""
    try:
        with PathManager.open(path, "rb") as file, Image.open(file) as image:
            _check_depth(image)
            stored, orientation = image.size, _orientation_of(image)
        if decode:
            detection_utils.read_image(path, "RGB")
    except MemoryError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError and others
        reason = "no such file" if isinstance(error, FileNotFoundError) else one_line(error)
        fault = (
            f"Image {path} of the dataset cannot be read ({reason}): expected an intact image "
            "file, replace it or remove it from the annotations."
        )
        return fault, None
    # detectron2 turns an image as its EXIF orientation says; from 5 on its sides change places.
    seen = stored[::-1] if orientation >= 5 else stored
    if annotated_size in (None, seen):
        return None, orientation
    wanted, there, turned = (f"{w} x {h}" for w, h in (annotated_size, stored, seen))
    if wanted == there:
        fault = (
            f"Image {path} of the dataset is stored as {there} pixels, as its annotation says, but "
            f"its EXIF orientation {orientation} has it turned to {turned}: remove that tag, or "
            "annotate the turned image."
        )
    else:
        fault = (
            f"Image {path} of the dataset is {turned} pixels, but its annotation says {wanted}: "
            "replace the image or correct the annotation."
        )
    return fault, orientation


def _check_depth(image):
    """Refuses numbers of more than 8 bits: converted to colours they are cut off at 255.

    Colours of 16 bits are scaled by Pillow when it opens them.
    """
    if image.mode.startswith("I") or image.mode == "F":  # I, I;16, I;16B, ...
        raise ValueError(
            "its pixels are numbers of more than 8 bits, which would be cut off at 255; convert them "
            "to 8 bits"
        )


def _orientation_of(image):
    # Pillow would decode a whole PNG to look for a tag at its end.
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # a damaged tag is none, for detectron2 as well
        return 1
    return orientation if orientation in range(1, 9) else 1  # as in detectron2
