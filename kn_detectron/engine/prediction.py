"""Detections on photographs: which ones a picture shows, and their form in COCO's results."""

from typing import Dict, List

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from torchvision.ops import batched_nms, nms

from ..data.requirements import num_classes_node

__all__ = ["class_names", "coco_results", "shown"]

# Boxes that overlap by more are taken for one object, if they are of one class and if they are not.
_SAME_OBJECT_OF_A_CLASS = 0.4
_SAME_OBJECT = 0.7


def shown(instances: Instances, min_score: float) -> Instances:
    """Selects the detections that a picture shows: one for each object.

    A detector keeps boxes that overlap by half, and boxes of two classes on one object, as COCO's
    evaluation wants it. In a picture they look like a mistake. Of boxes whose intersection is more
    than 0.4 of their union, or 0.7 if their classes differ, the best is taken.

    Args:
        instances: of a detector, with pred_boxes and scores.
        min_score: detections below are left out.

    Returns:
        Instances: the best first.
    """
    instances = instances[instances.scores >= min_score]
    boxes, scores, classes = instances.pred_boxes.tensor, instances.scores, instances.pred_classes
    kept = batched_nms(boxes, scores, classes, _SAME_OBJECT_OF_A_CLASS)
    return instances[kept[nms(boxes[kept], scores[kept], _SAME_OBJECT)]]


def class_names(cfg: CfgNode) -> List[str]:
    """What the classes of a detector are called.

    Args:
        cfg: of the detector; the names are DATASETS.CLASS_NAMES, or else those of the first dataset
            in DATASETS.TEST.

    Returns:
        list[str]: empty if there is not one name for each class, as with the names of another
        dataset. For a model of another project, whose number of classes is not known, all names.
    """
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0]) if cfg.DATASETS.TEST else Metadata()
    names = cfg.DATASETS.CLASS_NAMES or metadata.get("thing_classes") or []
    node = num_classes_node(cfg)
    return list(names) if node is None or len(names) == cfg.MODEL[node].NUM_CLASSES else []


def coco_results(instances: Instances, file_name: str, classes: List[str]) -> List[Dict]:
    """Detections in the form of COCO's results, with names in place of ids.

    Args:
        instances: of one image, on the CPU.
        file_name: of the image.
        classes: what the classes are called; without names they are numbers.

    Returns:
        list[dict]: each with ``file_name``, ``category``, ``score``, ``bbox`` (x, y, width, height
        in pixels) and, from a detector with masks, ``segmentation`` (COCO's run-length encoding).
    """
    results = instances_to_coco_json(instances, 0)
    for result in results:
        del result["image_id"]
        number = result.pop("category_id")
        result["file_name"] = file_name
        result["category"] = classes[number] if number < len(classes) else number
    return results
