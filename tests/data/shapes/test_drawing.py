import numpy as np
import pytest

from kn_detectron.data import CATEGORIES
from kn_detectron.data.shapes.drawing import cover, outline, rim, texture


def _area(contours):
    """Area of a shape by the shoelace formula; what lies in the second contour is a hole."""
    areas = []
    for points in contours:
        x, y = points.T
        areas.append(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)
    return areas[0] - sum(areas[1:])


@pytest.mark.parametrize("category", CATEGORIES)
def test_coverage_has_the_area_of_the_outline(category):
    shape = outline(category, (30.3, 41.7), 40, angle=0.7, squash=0.9)
    assert cover([shape], 80, 60).sum() == pytest.approx(_area(shape), rel=0.02)


def test_coverage_lies_where_the_outline_does():
    alpha = cover([outline("circle", (20.0, 35.0), 24, angle=0.0, squash=1.0)], 60, 50)
    y, x = np.mgrid[:60, :50] + 0.5
    distance = np.hypot(x - 20, y - 35)
    assert alpha.shape == (60, 50)
    assert (alpha[distance < 11] == 1).all() and (alpha[distance > 13] == 0).all()
    assert 0.1 < alpha[np.abs(distance - 12) < 0.5].mean() < 0.9


def test_shapes_that_leave_the_image_are_cut():
    inside = cover([outline("star", (40.0, 40.0), 30, 0.3, 1.0)], 80, 80)
    moved = cover([outline("star", (0.0, 0.0), 30, 0.3, 1.0)], 80, 80)
    assert inside[40:, 40:].sum() > 50
    np.testing.assert_allclose(moved[:40, :40], inside[40:, 40:], atol=0.26)
    assert moved[40:].sum() == moved[:, 40:].sum() == 0


def test_ring_has_a_hole_and_overlap_counts_once():
    ring = outline("ring", (30.0, 30.0), 40, 0.0, 1.0)
    disk = outline("circle", (30.0, 30.0), 40, 0.0, 1.0)
    assert cover([ring], 60, 60)[28:32, 28:32].max() == 0
    np.testing.assert_array_equal(cover([ring, disk], 60, 60), cover([disk], 60, 60))


def test_rim_lies_on_the_shape_along_its_edge():
    alpha = cover([outline("square", (30.0, 30.0), 28, np.pi / 4, 1.0)], 60, 60)
    line = rim(alpha)
    assert (line <= alpha).all() and line.max() == 1
    assert line[25:35, 25:35].max() == 0


def test_textures_keep_to_their_colours():
    rng = np.random.default_rng(0)
    color = np.array([100.0, 120.0, 140.0])
    for _ in range(40):
        picture = texture(rng, 40, 50, color, contrast=30)
        assert picture.shape == (40, 50, 3)
        assert np.abs(picture - color).max() <= 30 + 1e-9
        assert np.ptp(picture, axis=(0, 1)).max() > 10


def test_unknown_category():
    with pytest.raises(ValueError, match="hexagon"):
        outline("hexagon", (0, 0), 1, 0, 1)
