"""Images of more than 8 bits. Pillow's conversion to colours would turn them white or black."""

import functools

import numpy as np
from detectron2.data import detection_utils
from PIL import Image

__all__ = ["as_eight_bits", "check_mode", "scale_deep_images"]


def as_eight_bits(image):
    """Scales 16-bit greys to 8 bits, 65535 to 255; other images are returned as they are.

    Pillow cuts values off at 255 when it converts them to RGB. Colours of 16 bits it scales by
    itself when it opens them.

    Args:
        image (PIL.Image.Image): opened, in any mode.

    Returns:
        PIL.Image.Image

    Raises:
        ValueError: the pixels are 32-bit numbers, for which no value is known to be white.
    """
    check_mode(image)
    if not _is_16_bits(image):
        return image
    values = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def check_mode(image):
    """Checks that an image can become one of 8 bits, without decoding it.

    Args:
        image (PIL.Image.Image): opened.

    Raises:
        ValueError: see :func:`as_eight_bits`.
    """
    if image.mode in ("I", "F") and not _is_16_bits(image):
        kind = "whole" if image.mode == "I" else "floating point"
        raise ValueError(
            f"its pixels are {kind} numbers of 32 bits, whose white is unknown; convert them to 8 "
            "or 16 bits"
        )


def _is_16_bits(image):
    # Pillow before 11 opens greys of 16 bits in a PNG as numbers of 32 bits.
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")


# The formats that have colours. Others, and none, may be asked for to read labels or depths.
_COLOURS = ("RGB", "BGR", "YUV-BT.601")


def scale_deep_images():
    """Makes detectron2's ``read_image`` scale what it converts to colours, for whoever calls it.

    In any other format, and without one, it returns what it always did: pixels may be labels.
    """
    convert = detection_utils.convert_PIL_to_numpy

    @functools.wraps(convert)
    def scale_and_convert(image, format):
        return convert(as_eight_bits(image) if format in _COLOURS else image, format)

    detection_utils.convert_PIL_to_numpy = scale_and_convert
