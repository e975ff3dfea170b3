"""tools/predict.py on images of the generated shapes, with released weights and with a run's."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from kn_detectron.data import ShapesSpec, generate_shapes
from kn_detectron.model_zoo import get_config_file

from ..engine import tiny
from ..engine.conftest import datasets, plain  # noqa: F401

RELEASED = "mask_rcnn_slim_R50_C4_KN"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    generate_shapes(str(folder / "shapes"), ShapesSpec(num_train=1, num_val=3, seed=3))
    return folder / "shapes" / "val"


def released():
    config = get_config_file(f"shapes/{RELEASED}.yaml")
    return "--config", config, "--opts", "MODEL.WEIGHTS", f"kn://{RELEASED}.pth"


def test_a_folder_is_drawn_and_written_down(photos, tmp_path, command):
    status, out, _ = command("predict", photos, "--output", tmp_path, *released())
    assert status == 0 and "detections in 3 photos" in out
    results = json.loads((tmp_path / "detections.json").read_text())
    assert {r["file_name"] for r in results} == {str(p) for p in photos.iterdir()}
    assert {r["category"] for r in results} <= {"circle", "square", "triangle", "star", "ring"}
    assert max(r["score"] for r in results) > 0.5
    for photo in photos.iterdir():
        drawn = np.asarray(Image.open(tmp_path / f"{photo.stem}.png").convert("RGB"))
        assert drawn.shape == np.asarray(Image.open(photo).convert("RGB")).shape
    assert any(
        (Image.open(tmp_path / f"{p.stem}.png").tobytes() != Image.open(p).tobytes())
        for p in photos.iterdir()
    )


def test_a_run_is_enough(photos, tmp_path, plain, command):  # noqa: F811
    folder, _ = plain
    (folder / "config.yaml").write_text(tiny.config(folder).dump())
    photo = next(photos.iterdir())
    status, out, _ = command(
        "predict", photo, "--config", folder / "config.yaml", "--output", tmp_path
    )
    assert status == 0 and "in 1 photos" in out


def test_an_image_that_cannot_be_read_does_not_cost_the_others(photos, tmp_path, command):
    mixed = tmp_path / "mixed"
    shutil.copytree(photos, mixed)
    (mixed / "000000.jpg").write_bytes(b"no image")
    shutil.copy(next(photos.iterdir()), mixed / "again.png")
    status, out, error = command(
        "predict", mixed, photos, "--output", tmp_path / "out", *released()
    )
    assert status == 1 and "in 7 photos" in out
    assert "000000.jpg cannot be read (" in error and "Traceback" not in error
    # Photos of the same name in two folders have a picture each.
    assert len(list((tmp_path / "out").glob("*.png"))) == 7


def test_what_it_refuses(photos, tmp_path, command):
    config = get_config_file(f"shapes/{RELEASED}.yaml")
    (tmp_path / "empty").mkdir()
    for arguments, sentence in (
        ((tmp_path / "none.jpg", *released()), "none.jpg does not exist"),
        ((tmp_path / "empty", *released()), "empty has no images"),
        ((photos, "--config", config), "give MODEL.WEIGHTS FILE"),
    ):
        status, _, error = command("predict", *arguments)
        assert status == 1 and sentence in error
