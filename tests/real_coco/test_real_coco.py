"""The real config on real images: training, interruption, evaluation.

The time goes with the number of validation images, which is why a part of COCO is the place for
it: with some 70 images in each set two cores take about three minutes.
"""

import copy
import json
import math

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Boxes, BoxMode, Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from kn_detectron import add_kn_config
from kn_detectron.engine import Trainer
from kn_detectron.engine.evaluation import build_coco_evaluator

from ..engine import tiny
from .commands import NUM_STEPS, config, run_train_net, small

_TWELVE = ("AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl").split()


def losses(folder, step=NUM_STEPS - 1):
    """The losses that a run has written in its last step, as medians over all of them."""
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    (line,) = [line for line in lines if "total_loss" in line]
    assert line["iteration"] == step
    return {name: value for name, value in line.items() if "loss" in name}


def twelve_numbers(folder):
    """COCO's numbers of an evaluation in percent; None is what cannot be had."""
    results = json.loads((folder / "inference/results.json").read_text())
    assert set(results) == {"bbox", "segm"}
    for numbers in results.values():
        assert {name for name in numbers if not name.startswith("AP-")} == set(_TWELVE)
    return {task: [numbers[name] for name in _TWELVE] for task, numbers in results.items()}


def numbers_by_pycocotools(json_file, detections):
    """The same from the file of detections, without any code of this package or detectron2."""
    truth = COCO(json_file)
    numbers = {}
    for task in ("bbox", "segm"):
        found = copy.deepcopy(detections)
        if task == "segm":
            for detection in found:
                del detection["bbox"]  # or pycocotools takes areas from boxes
        evaluation = COCOeval(truth, truth.loadRes(found), task)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        numbers[task] = [100 * value if value >= 0 else None for value in evaluation.stats]
    return numbers


def assert_same_numbers(one, other):
    for task in ("bbox", "segm"):
        assert one[task] == pytest.approx(other[task], rel=1e-9), task


def test_training_writes_losses_and_a_checkpoint(whole):
    found = losses(whole)
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


def test_interrupted_run_saved_its_step(interrupted):
    folder, output, status = interrupted
    assert status == 143, output
    assert "Traceback" not in output
    assert (folder / "last_checkpoint").read_text() == "model_0000001.pth"


def test_resumed_run_is_the_uninterrupted_one(whole, resumed):
    # Weights and momentum are equal to the bit only if the losses of all steps were; those that
    # are written are medians over the steps of a run, and so are not the same here.
    folder, output = resumed
    assert "Starting training from iteration 2" in output
    tiny.assert_same_state(folder / "model_final.pth", whole / "model_final.pth")
    assert twelve_numbers(folder) == twelve_numbers(whole)


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


def _boxes_near_the_truth(image, rng):
    """Predictions for an image that are right for some objects and some thresholds."""
    objects = [o for o in image["annotations"] if not o["iscrowd"]]
    height, width = image["height"], image["width"]
    boxes = [BoxMode.convert(o["bbox"], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS) for o in objects]
    boxes = torch.tensor(boxes).view(-1, 4)
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    boxes += 0.15 * sides * torch.from_numpy(rng.standard_normal(boxes.shape)).float()
    boxes = Boxes(boxes)
    boxes.clip((height, width))
    found = Instances((height, width), pred_boxes=boxes)
    found.scores = torch.from_numpy(rng.random(len(objects)))
    found.pred_classes = torch.tensor([o["category_id"] for o in objects], dtype=torch.long)
    found.pred_masks = torch.zeros(len(objects), height, width, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(found.pred_masks, boxes.tensor.round().int().tolist()):
        mask[y0:y1, x0:x1] = True
    return found


def test_evaluator_agrees_with_pycocotools_on_good_detections(tmp_path):
    cfg = get_cfg()
    cfg.MODEL.MASK_ON = True
    cfg.OUTPUT_DIR = str(tmp_path)
    evaluator = build_coco_evaluator(cfg, "coco_2017_val")
    evaluator.reset()
    rng = np.random.default_rng(0)
    for image in DatasetCatalog.get("coco_2017_val"):
        evaluator.process([image], [{"instances": _boxes_near_the_truth(image, rng)}])
    results = evaluator.evaluate()
    numbers = {task: [results[task][name] for name in _TWELVE] for task in ("bbox", "segm")}
    assert all(1 < number < 99 for number in numbers["bbox"] + numbers["segm"])
    detections = json.loads(
        (tmp_path / "inference/coco_2017_val/coco_instances_results.json").read_text()
    )
    json_file = MetadataCatalog.get("coco_2017_val").json_file
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


@pytest.fixture
def few_images(tmp_path):
    """The name of a dataset: the first four validation images."""
    metadata = MetadataCatalog.get("coco_2017_val")
    with open(metadata.json_file) as file:
        content = json.load(file)
    content["images"] = content["images"][:4]
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
    (tmp_path / "few.json").write_text(json.dumps(content))
    register_coco_instances("few", {}, str(tmp_path / "few.json"), metadata.image_root)
    yield "few"
    DatasetCatalog.remove("few")
    MetadataCatalog.remove("few")


@pytest.mark.parametrize("norm", ["BN", "GN", "GKN", "KN_paper"])
def test_other_norms_train_and_evaluate(norm, few_images, runs):
    cfg = get_cfg()
    add_kn_config(cfg)
    cfg.merge_from_file(config(norm))
    one_step = ["SOLVER.MAX_ITER", 1, "SOLVER.IMS_PER_BATCH", 1, "DATASETS.TEST", (few_images,)]
    cfg.merge_from_list(small(*one_step, "OUTPUT_DIR", runs / norm))
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    results = trainer.train()
    assert set(results) == {"bbox", "segm"}
    assert all(set(_TWELVE) <= set(numbers) for numbers in results.values())
    assert all(math.isfinite(value) for value in losses(runs / norm, step=0).values())
