"""The evaluator on detections that are right for a part of the objects."""

import json

import numpy as np
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances

from kn_detectron.engine.evaluation import build_coco_evaluator

from .results import TWELVE, assert_same_numbers, numbers_by_pycocotools


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
    numbers = {task: [results[task][name] for name in TWELVE] for task in ("bbox", "segm")}
    assert all(1 < number < 99 for number in numbers["bbox"] + numbers["segm"])
    detections = json.loads(
        (tmp_path / "inference/coco_2017_val/coco_instances_results.json").read_text()
    )
    json_file = MetadataCatalog.get("coco_2017_val").json_file
    assert_same_numbers(numbers, numbers_by_pycocotools(json_file, detections))
