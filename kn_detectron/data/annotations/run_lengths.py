"""Checks of run-length encoded masks, whose lengths pycocotools trusts."""

import numpy as np

__all__ = ["fault_of_run_lengths"]


def fault_of_run_lengths(segmentation, size):
    """Tells what is wrong with an encoded mask. pycocotools would write beyond its memory.

    Args:
        segmentation (dict): with ``size`` and ``counts``, a list or a text.
        size (tuple[int, int]): width and height of its image.

    Returns:
        str or None: the fault, in the words after "a segmentation that".
    """
    width, height = size
    found, counts = segmentation.get("size"), segmentation.get("counts")
    if found != [height, width]:
        return f"has the size {found!r} (height, width) in an image of {width} x {height}"
    if isinstance(counts, str):
        lengths = _decode(counts)
    elif isinstance(counts, list) and all(type(count) is int for count in counts):
        lengths = counts
    else:
        return "has no counts"
    if lengths is None or min(lengths, default=0) < 0 or sum(lengths) != width * height:
        return "has counts that do not add up to the pixels of its image"
    return None


def _decode(text):
    """Gives the lengths that a text encodes, or None if the text ends within a number.

    Each character holds five bits, lowest first, and whether more follow. The fifth bit of the last
    character is the sign. From the fourth number on, a number is the difference to the number two
    places before it.
    """
    try:
        codes = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        return None
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return None
    ends = np.flatnonzero(codes & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    place = np.arange(len(codes)) - np.repeat(starts, ends - starts + 1)
    if place.max() > 7:  # 40 bits
        return None
    values = np.add.reduceat((codes & 31) << (5 * place), starts)
    values -= (codes[ends] & 16 != 0) * (1 << (5 * (place[ends] + 1)))
    # The first three stand for themselves, so the chain of every second one starts at 1 and 2.
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values.tolist()
