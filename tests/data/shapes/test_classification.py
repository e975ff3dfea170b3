import cv2
import numpy as np
import pytest

from kn_detectron.data import (
    CATEGORIES,
    SingleShapesSpec,
    draw_single_shape,
    generate_shapes,
    generate_single_shapes,
)
from kn_detectron.errors import InputError

SPEC = SingleShapesSpec(num_train=12, num_val=7, size=48, seed=3)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("single") / "shapes"
    generate_single_shapes(root, SPEC)
    return root


def test_layout_is_imagenets(root):
    assert sorted(p.name for p in (root / "train").iterdir()) == sorted(CATEGORIES)
    found = {s: sorted(p.name for p in (root / s).rglob("*.png")) for s in ("train", "val")}
    assert found["train"] == [f"{i:06d}.png" for i in range(12)]
    assert len(found["val"]) == 7
    assert len(list((root / "train" / "circle").iterdir())) == 3  # 0, 5 and 10


def test_files_are_the_drawn_images(root):
    image = cv2.imread(str(root / "val" / "triangle" / "000002.png"))
    assert image.shape == (48, 48, 3)
    np.testing.assert_array_equal(image, draw_single_shape(SPEC, "val", 2))


def test_seed_split_and_index_change_the_image():
    images = [
        draw_single_shape(SPEC, "train", 0),
        draw_single_shape(SPEC, "train", 5),
        draw_single_shape(SPEC, "val", 0),
        draw_single_shape(SingleShapesSpec(seed=4, size=48), "train", 0),
    ]
    for i, image in enumerate(images):
        assert all((image != other).any() for other in images[:i])


def test_a_shape_is_told_from_its_ground_and_fills_much_of_the_image():
    # Where the centre lies inside the shape its colour differs from that of the corners.
    for index in range(0, 50, 5):  # circles
        image = draw_single_shape(SingleShapesSpec(), "train", index).astype(float)
        corners = np.mean([image[:6, :6], image[-6:, -6:], image[:6, -6:]], axis=(0, 1, 2))
        assert np.abs(image[32:48, 32:48].mean((0, 1)) - corners).max() > 20


def test_what_is_there_is_kept_and_something_else_refused(root, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*.png")}
    generate_single_shapes(root, SPEC)
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*.png")} == before
    with pytest.raises(InputError, match="other parameters .num_train 12, not 13"):
        generate_single_shapes(root, SingleShapesSpec(13, 7, 48, 3))
    with pytest.raises(InputError, match="other parameters .kind classes, not instances"):
        generate_shapes(root)
    (tmp_path / "thesis.txt").write_text("dear")
    for marker in (None, "", "[1]", "{"):
        if marker is not None:
            (tmp_path / "shapes.json").write_text(marker)
        with pytest.raises(InputError, match="not a shapes dataset"):
            generate_single_shapes(tmp_path, SPEC)


@pytest.mark.parametrize("wrong", [{"num_train": 4}, {"size": 8}, {"seed": -1}, {"num_val": 5.5}])
def test_impossible_parameters_are_named(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        SingleShapesSpec(**wrong)
