"""tools/predict.py on photographs with the released detector, and with a run's."""

import json
import shutil

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image

from kn_detectron.data import PHOTOS
from kn_detectron.model_zoo import get_config_file

from ..engine import tiny
from ..engine.conftest import datasets, plain  # noqa: F401


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos") / "val"
    folder.mkdir()
    for path in sorted((PHOTOS / "val").iterdir())[:3]:
        shutil.copy(path, folder)
    return folder


def test_a_folder_is_drawn_and_written_down(photos, tmp_path, command):
    status, out, _ = command("predict", photos, "--output", tmp_path)
    results = json.loads((tmp_path / "detections.json").read_text())
    count = sum(r["score"] >= 0.7 for r in results)
    assert status == 0 and f"3 photos with {count} detections drawn" in out
    assert 0 < count < len(results) and f"All {len(results)} detections" in out
    assert {r["file_name"] for r in results} == {str(p) for p in photos.iterdir()}
    assert {r["category"] for r in results} == {"person"}
    assert max(r["score"] for r in results) > 0.5
    for photo in photos.iterdir():
        before, after = (
            np.asarray(Image.open(path).convert("RGB"))
            for path in (photo, tmp_path / f"{photo.stem}.png")
        )
        changed, inside = (before != after).any(2), np.zeros(before.shape[:2], bool)
        for result in results:
            if result["file_name"] == str(photo) and result["score"] >= 0.7:
                left, top, width, height = (round(max(0, value)) for value in result["bbox"])
                inside[top : top + height, left : left + width] = True
        # The label and the line are beyond the box, and a mask leaves its corners.
        assert changed[inside].mean() > 0.5 and changed[~inside].mean() < 0.1


def test_what_is_left_out_of_a_folder_is_counted(photos, tmp_path, command):
    folder = tmp_path / "mixed"
    shutil.copytree(photos, folder / "more")
    shutil.copy(next(photos.iterdir()), folder)
    (folder / "notes.txt").touch()
    status, out, _ = command("predict", folder, "--output", tmp_path / "found")
    assert status == 0 and f"{folder} has 2 more files or folders, which are left out." in out


def test_a_run_is_enough(photos, tmp_path, plain, command):  # noqa: F811
    folder, _ = plain
    (folder / "config.yaml").write_text(tiny.config(folder).dump())
    photo = next(photos.iterdir())
    status, out, _ = command(
        "predict", photo, "--config", folder / "config.yaml", "--output", tmp_path
    )
    assert status == 0 and "1 photo with " in out


def test_an_image_that_cannot_be_read_does_not_cost_the_others(photos, tmp_path, command):
    mixed = tmp_path / "mixed"
    shutil.copytree(photos, mixed)
    (mixed / "000000.jpg").write_bytes(b"no image")
    shutil.copy(next(photos.iterdir()), mixed / "again.png")
    Image.new("RGB", (4000, 1)).save(mixed / "thin.png")
    status, out, error = command("predict", mixed, photos, "--output", tmp_path / "out")
    assert status == 1 and "7 photos with " in out
    assert "000000.jpg cannot be read (" in error and "Traceback" not in error
    assert "thin.png, which is 4000 x 1 pixels, cannot be resized (" in error
    # Photos of the same name in two folders have a picture each.
    assert len(list((tmp_path / "out").glob("*.png"))) == 7


def test_photos_are_never_replaced(tmp_path, photos, command, monkeypatch):
    folder = tmp_path / "my photos"
    folder.mkdir()
    with Image.open(next(photos.iterdir())) as photo:
        photo.save(folder / "one.png")
        photo.save(folder / "two.png")
        photo.save(folder / "two.jpg")
    before = [(folder / name).read_bytes() for name in ("one.png", "two.png")]
    monkeypatch.chdir(tmp_path)
    photos = folder / "one.png", "my photos/two.jpg"  # and not two.png
    status, _, _ = command("predict", *photos, "--output", folder)
    assert status == 0
    assert [(folder / name).read_bytes() for name in ("one.png", "two.png")] == before
    assert (folder / "two_2.png").is_file()
    with Image.open(folder / "one.png") as photo, Image.open(folder / "one_2.png") as drawn:
        assert drawn.size == photo.size


def test_what_it_refuses(photos, tmp_path, command):
    config = get_config_file("photos/mask_rcnn_lite0_FPN_BN.yaml")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    run = tmp_path / "run"  # one that was stopped before its first checkpoint
    run.mkdir()
    (run / "config.yaml").write_text(tiny.config(run).dump())
    other = {}
    for key, value in (("META_ARCHITECTURE", "ProposalNetwork"), ("LOAD_PROPOSALS", True)):
        cfg = tiny.config(run)
        cfg.MODEL[key] = value
        other[key] = tmp_path / f"{key}.yaml"
        other[key].write_text(cfg.dump())
    for arguments, sentence in (
        ((tmp_path / "none.jpg",), "none.jpg does not exist"),
        ((photos, "--min-score", "70"), "--min-score is 70.0: scores are from 0 to 1"),
        ((tmp_path / "empty",), "empty has no images"),
        ((photos, "--config", config), "give --opts MODEL.WEIGHTS FILE"),
        ((photos, "--config", config, "--opts", "MODEL.WEIGHTS", ""), "give --opts MODEL.WEIGHTS"),
        ((tmp_path / ("long" * 100),), "longlong does not exist"),
        ((photos, "--config", run / "config.yaml"), f"{run} has no checkpoint: give the config"),
        *(
            ((photos, "--config", path, "--opts", "MODEL.WEIGHTS", "any.pth"), f"has MODEL.{key} ")
            for key, path in other.items()
        ),
        (
            (photos, "--output", tmp_path / "file"),
            f"--output {tmp_path / 'file'} cannot be created (File exists): give",
        ),
    ):
        status, _, error = command("predict", *arguments)
        assert status == 1 and sentence in error


def test_a_picture_that_cannot_be_written_does_not_cost_the_detections(photos, tmp_path, command):
    first, second, third = sorted(photos.iterdir())
    (tmp_path / f"{third.stem}.png").mkdir()
    status, _, error = command("predict", photos, "--output", tmp_path)
    assert status == 1 and f"{third.stem}.png cannot be written (Is a directory): make" in error
    results = json.loads((tmp_path / "detections.json").read_text())
    assert {r["file_name"] for r in results} == set(map(str, (first, second, third)))


def test_more_classes_than_names_are_numbers(photos, tmp_path, plain, command):  # noqa: F811
    folder, _ = plain
    cfg = tiny.config(folder)
    cfg.DATASETS.TEST = ("photos_val",)  # which has one name
    (folder / "config.yaml").write_text(cfg.dump())
    options = ("--config", folder / "config.yaml", "--output", tmp_path, "--min-score", 0)
    status, out, error = command("predict", next(photos.iterdir()), *options)
    assert status == 0, error
    assert "The names of the classes are not known, so they are numbers" in out
    results = json.loads((tmp_path / "detections.json").read_text())
    assert results and all(isinstance(result["category"], int) for result in results)


def test_keypoints_that_only_the_training_knows_of(photos, tmp_path, command):
    """A dataset with keypoints is registered by the script that trains."""
    heads = {
        "KEYPOINT_ON": True,
        "MASK_ON": False,
        "ROI_HEADS.NAME": "StandardROIHeads",
        "ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
        "ROI_BOX_HEAD.NUM_FC": 1,
        "ROI_BOX_HEAD.FC_DIM": 8,
        "ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": 3,
        "ROI_KEYPOINT_HEAD.CONV_DIMS": (8,),
    }
    options = (word for key, value in heads.items() for word in (f"MODEL.{key}", str(value)))
    cfg = tiny.config(tmp_path, *options)
    cfg.DATASETS.TRAIN, cfg.DATASETS.CLASS_NAMES = ("of_a_script",), list("abcde")
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "model.pth")
    (tmp_path / "tiny.yaml").write_text(cfg.dump())
    options = ("--config", tmp_path / "tiny.yaml", "--output", tmp_path / "found", "--min-score", 0)
    status, _, error = command(
        "predict",
        next(photos.iterdir()),
        *options,
        "--opts",
        "MODEL.WEIGHTS",
        tmp_path / "model.pth",
    )
    assert status == 0, error
    results = json.loads((tmp_path / "found" / "detections.json").read_text())
    assert results and all(len(result["keypoints"]) == 9 for result in results)
    best = max(result["score"] for result in results)
    options = (*options[:-1], 1, "--opts", "MODEL.WEIGHTS", tmp_path / "model.pth")
    _, printed, _ = command("predict", next(photos.iterdir()), *options)
    assert f"The best score is {best:.2f}: a lower --min-score draws more." in printed
