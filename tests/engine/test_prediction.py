import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from pycocotools import mask

from kn_detectron.engine.prediction import class_names, coco_results, shown
from kn_detectron.model_zoo import get_config


def instances(boxes, scores, classes):
    masks = torch.zeros(len(boxes), 40, 60, dtype=torch.bool)
    for m, (x0, y0, x1, y1) in zip(masks, boxes):
        m[y0:y1, x0:x1] = True
    return Instances(
        (40, 60),
        pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
        scores=torch.tensor(scores),
        pred_classes=torch.tensor(classes, dtype=torch.long),
        pred_masks=masks,
    )


def test_a_picture_shows_one_detection_for_each_object():
    found = instances(
        [
            [0, 0, 20, 20],
            [1, 0, 20, 20],
            [30, 5, 50, 35],
            [0, 0, 9, 9],
            [30, 5, 50, 23],
            [30, 20, 50, 35],
        ],
        [0.6, 0.9, 0.8, 0.2, 0.7, 0.65],
        [0, 1, 0, 1, 1, 0],
    )
    drawn = shown(found, min_score=0.5)
    # Of two boxes of two classes on one object the better, and no box of a low score. The last but
    # one covers 0.6 of one of another class, as a motorcycle does with its rider. The last covers
    # 0.5 of one of its own class.
    assert drawn.scores.tolist() == torch.tensor([0.9, 0.8, 0.7]).tolist()
    assert drawn.pred_classes.tolist() == [1, 0, 1]
    assert len(shown(found[:0], 0.5)) == 0


def test_results_are_cocos_with_names():
    results = coco_results(instances([[2, 3, 12, 23]], [0.75], [1]), "a.jpg", ["cat", "dog"])
    (result,) = results
    assert (result["file_name"], result["category"], result["score"]) == ("a.jpg", "dog", 0.75)
    assert np.allclose(result["bbox"], [2, 3, 10, 20])
    assert mask.decode(result["segmentation"]).sum() == 200
    (unnamed,) = coco_results(instances([[2, 3, 12, 23]], [0.75], [1]), "a.jpg", [])
    assert unnamed["category"] == 1


def test_names_are_those_of_the_run_or_of_the_dataset_if_there_is_one_for_each_class():
    cfg = get_config("shapes/mask_rcnn_slim_R50_C4_KN.yaml")
    assert class_names(cfg)[0] == "circle"
    names = [f"class {i}" for i in range(cfg.MODEL.ROI_HEADS.NUM_CLASSES)]
    cfg.DATASETS.TEST, cfg.DATASETS.CLASS_NAMES = (), names
    assert class_names(cfg) == names
    for other in (len(names) + 1, len(names) - 1):  # the first of COCO's names would be wrong ones
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = other
        assert class_names(cfg) == []
    cfg.DATASETS.CLASS_NAMES = []
    assert class_names(cfg) == []
    cfg = get_config("retinanet_R50_FPN_KN.yaml")
    cfg.DATASETS.CLASS_NAMES = names
    assert class_names(cfg) == []
    cfg.MODEL.RETINANET.NUM_CLASSES = len(names)
    assert class_names(cfg) == names
