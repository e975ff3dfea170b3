"""The real config on real images: training, interruption, evaluation.

The time goes with the number of validation images, which is why a part of COCO is the place for
it: with some 70 images in each set two cores take about three minutes.
"""

import json
import math

import pytest

from ..engine import tiny
from .commands import NUM_STEPS, run_train_net
from .results import assert_same_numbers, losses, numbers_by_pycocotools, twelve_numbers


def test_interrupted_run_saved_its_step(interrupted):
    folder, output, status = interrupted
    assert status == 143, output
    assert "Traceback" not in output
    assert (folder / "last_checkpoint").read_text() == "model_0000001.pth"


def test_resumed_run_is_the_uninterrupted_one(resumed, whole):
    # Weights and momentum are equal to the bit only if the losses of all steps were; those that
    # are written are medians over the steps of a run, and so are not the same here.
    folder, output = resumed
    assert "Starting training from iteration 2" in output
    tiny.assert_same_state(folder / "model_final.pth", whole / "model_final.pth")
    assert twelve_numbers(folder) == twelve_numbers(whole)


def test_training_writes_losses_and_a_checkpoint(whole):
    found = losses(whole, NUM_STEPS - 1)
    assert len(found) == 6  # five losses and their sum
    assert all(math.isfinite(value) and value > 0 for value in found.values())
    checkpoint = tiny.read(whole / "model_final.pth")
    assert checkpoint["iteration"] == NUM_STEPS - 1
    # The network is of full width.
    assert checkpoint["model"]["roi_heads.res5.2.conv3.weight"].shape == (2048, 512, 1, 1)
    assert all(value.isfinite().all() for value in checkpoint["model"].values())
    # The last step is at 5/6 of the schedule, and the gain falls from 0.6 to 0.9 of it.
    scale = checkpoint["model"]["roi_heads.res5.2.conv3.norm.gain_scale"]
    assert scale == pytest.approx((0.9 - 5 / 6) / 0.3)


def test_evaluation_gives_cocos_numbers(whole, runs, datasets):
    folder = runs / "evaluation"
    weights = whole / "model_final.pth"
    status, output = run_train_net("--eval-only", "OUTPUT_DIR", folder, "MODEL.WEIGHTS", weights)
    assert status == 0, output
    numbers = twelve_numbers(folder)
    # On images in which there is everything.
    assert None not in numbers["bbox"] + numbers["segm"]
    assert numbers == twelve_numbers(whole)

    detections = json.loads(
        (folder / "inference/coco_2017_val/coco_instances_results.json").read_text()
    )
    json_file = datasets / "coco/annotations/instances_val2017.json"
    images = {image["id"] for image in json.loads(json_file.read_text())["images"]}
    assert {detection["image_id"] for detection in detections} == images
    assert_same_numbers(numbers, numbers_by_pycocotools(json_file, detections))


def test_weights_that_cannot_be_downloaded_are_a_sentence(runs, monkeypatch):
    # Where nothing listens there is no network, whatever the machine has.
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("FVCORE_CACHE", str(runs / "cache"))
    weights = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
    status, output = run_train_net("OUTPUT_DIR", runs / "offline", "MODEL.WEIGHTS", weights)
    assert status == 1, output
    assert "Traceback" not in output
    (sentence,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert sentence.startswith(f"error: MODEL.WEIGHTS {weights} cannot be downloaded")
    assert 'MODEL.WEIGHTS ""' in sentence
