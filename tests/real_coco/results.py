"""What runs have written, and the same numbers by pycocotools alone."""

import copy
import json

import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

TWELVE = ("AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl").split()


def losses(folder, step):
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
        assert {name for name in numbers if not name.startswith("AP-")} == set(TWELVE)
    return {task: [numbers[name] for name in TWELVE] for task, numbers in results.items()}


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
