"""What values of a JSON file mean, since annotation tools disagree about types."""

import math

__all__ = ["as_finite", "as_key", "as_whole", "is_plain_number"]


def is_plain_number(value):
    """Tells whether a value is a number as COCO writes it; true and false are not numbers."""
    return type(value) is int or type(value) is float


def as_finite(value):
    """Gives the finite number that a value is or spells, or None.

    Args:
        value: anything that JSON can hold.

    Returns:
        int, float or None
    """
    if isinstance(value, str):
        value = _parsed(value)
    if not is_plain_number(value):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:  # a whole number beyond all floats
        return None


def as_whole(value):
    """Gives the whole number that a value is or spells (7, 7.0, "7"), or None."""
    number = as_finite(value)
    return int(number) if number is not None and number == int(number) else None


def as_key(value):
    """Gives the key to look an id up by: 7, 7.0, "7" and "007" are the same, "a7" is itself."""
    whole = as_whole(value)
    return value if whole is None else whole


def _parsed(text):
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return None
