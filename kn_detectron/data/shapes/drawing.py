"""Outlines, masks and textures of the shapes dataset: pure functions of their arguments.

Everything that decides a pixel is integer arithmetic or float64 arithmetic on the draws of a
given numpy generator, so that a seed means the same picture on every machine.
"""

import functools

import cv2
import numpy as np
import pycocotools.mask as mask_util

CATEGORIES = ("circle", "square", "triangle", "star", "ring")

# Masks are rasterised on a grid this many times finer than the pixels, which gives smooth edges.
_SUBPIXELS = 4


def outline(category, center, size, angle, squash):
    """Gives the outline of one shape.

    Args:
        category (str): one of `CATEGORIES`.
        center (tuple[float, float]): x and y in pixels.
        size (float): rough extent in pixels.
        angle (float): rotation in radians.
        squash (float): ratio of the two axes before rotation; 1 keeps the proportions.

    Returns:
        list[ndarray]: closed contours of shape (K, 2), x and y in pixels; what lies inside an odd
        number of them is inside the shape.
    """
    if category == "circle":
        contours = [_polygon(48)]
    elif category == "square":
        contours = [_polygon(4) * 1.4]
    elif category == "triangle":
        contours = [_polygon(3) * 1.2]
    elif category == "star":
        star = _polygon(10) * 1.25
        star[1::2] *= 0.42
        contours = [star]
    elif category == "ring":
        contours = [_polygon(48), _polygon(48) * 0.55]
    else:
        raise ValueError(f"unknown category {category!r}")
    cos, sin = np.cos(angle), np.sin(angle)
    axes = np.array([[cos, sin], [-sin * squash, cos * squash]])
    # Written out instead of `contour @ axes`: a matrix library may round differently per machine.
    return [
        c[:, :1] * axes[0] * (size / 2) + c[:, 1:] * axes[1] * (size / 2) + np.array(center)
        for c in contours
    ]


def cover(shapes, height, width):
    """Rasterises the union of several shapes.

    Args:
        shapes (list[list[ndarray]]): outlines as `outline` gives them.
        height (int), width (int): size of the image in pixels.

    Returns:
        ndarray: float64 of shape (height, width), the share of each pixel that is covered.
    """
    fine_size = height * _SUBPIXELS, width * _SUBPIXELS
    union = np.zeros(fine_size, np.uint8, order="F")
    for contours in shapes:
        # By pycocotools and not by cv2.fillPoly, whose result differs between OpenCV's releases.
        polygons = [(contour * _SUBPIXELS).ravel().tolist() for contour in contours]
        masks = [mask_util.decode(rle) for rle in mask_util.frPyObjects(polygons, *fine_size)]
        union |= functools.reduce(np.bitwise_xor, masks)
    # Along the storage order first: numpy adds long runs ten times as fast as small blocks.
    columns = union.T.reshape(width, _SUBPIXELS, -1).sum(axis=1, dtype=np.uint8)
    counts = sum(columns[:, i::_SUBPIXELS] for i in range(_SUBPIXELS))
    return np.ascontiguousarray(counts.T) / _SUBPIXELS**2


def rim(alpha):
    """Gives the line along the inner side of a shape's edge, about two pixels wide.

    Args:
        alpha (ndarray): float64 of shape (height, width), the shape as `cover` gives it.

    Returns:
        ndarray: float64 of the same shape, how much each pixel belongs to the line.
    """
    cross = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], np.uint8)
    return alpha - cv2.erode(alpha, cross, iterations=2)


def texture(rng, height, width, color, contrast):
    """Draws a random texture: a plain slope, stripes, checks, dots or clouds of two colours.

    Args:
        rng (numpy.random.Generator): source of all choices.
        height (int), width (int): size in pixels.
        color (ndarray): first colour, shape (3,), 0 to 255.
        contrast (float): how far the second colour lies from the first, 0 to 255.

    Returns:
        ndarray: float64 of shape (height, width, 3).
    """
    kind = rng.integers(5)
    angle = rng.uniform(0, np.pi)
    period = rng.uniform(7, 18)
    y, x = np.mgrid[:height, :width].astype(np.float64)
    u = (x * np.cos(angle) + y * np.sin(angle)) / period
    v = (y * np.cos(angle) - x * np.sin(angle)) / period
    if kind == 0:
        pattern = (u - u.min()) / (u.max() - u.min())
    elif kind == 1:
        pattern = np.clip(3 * _wave(u) - 1, 0, 1)
    elif kind == 2:
        pattern = (np.floor(u) + np.floor(v)) % 2
    elif kind == 3:
        pattern = np.clip(2.2 - 2.5 * (_wave(u) + _wave(v)), 0, 1)
    else:
        pattern = _clouds(rng, height, width, period * 1.5)
    step = rng.uniform(-1, 1, 3)
    second = color + step * contrast / np.abs(step).max()
    return color + (second - color) * pattern[:, :, None]


def _polygon(corners):
    """Gives a regular polygon of radius 1 around 0, shape (corners, 2), its first corner on top."""
    turn = 2 * np.pi * np.arange(corners) / corners
    return np.stack([np.sin(turn), -np.cos(turn)], axis=1)


def _wave(t):
    """A triangle wave of period 1 between 0 and 1."""
    return np.abs(2 * (t - np.floor(t)) - 1)


def _clouds(rng, height, width, cell):
    """Random values on a coarse grid, `cell` pixels apart, interpolated: (height, width)."""
    knots = rng.random((int(height / cell) + 2, int(width / cell) + 2))
    y, x = np.arange(height) / cell, np.arange(width) / cell
    top, left = y.astype(int), x.astype(int)
    fy, fx = (y - top)[:, None], (x - left)[None, :]
    rows = knots[top] * (1 - fy) + knots[top + 1] * fy
    return rows[:, left] * (1 - fx) + rows[:, left + 1] * fx
