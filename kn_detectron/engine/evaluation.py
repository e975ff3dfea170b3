"""COCO evaluation with all of COCO's numbers."""

import json
import logging
import math
import os

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.evaluation.coco_evaluation import COCOeval, COCOeval_opt
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.utils.logger import create_small_table
from pycocotools.coco import COCO

from ..errors import InputError
from ..files import atomic_write

__all__ = [
    "FullCOCOEvaluator",
    "build_coco_evaluator",
    "check_test_augmentation",
    "write_results",
]

_logger = logging.getLogger(__name__)

_PRECISIONS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_RECALLS = ("AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


class FullCOCOEvaluator(COCOEvaluator):
    """detectron2's evaluator, with the recalls and with numbers for a model that finds nothing.

    detectron2 leaves out six of the twelve numbers that COCO defines for boxes and masks, and
    reports no detections as "not a number", where COCO's precision and recall are 0 if there are
    such objects.
    """

    def __init__(self, *args, **kwargs):
        """See ``COCOEvaluator``."""
        super().__init__(*args, **kwargs)
        # pycocotools 2.0.9 and 2.0.10 fail without it, which is after the training.
        self._coco_api.dataset.setdefault("info", {})

    def _derive_coco_results(self, coco_eval, iou_type, class_names=None):
        if coco_eval is None:
            self._logger.warning("The model finds nothing in any of the images.")
            coco_eval = self._evaluation_of_nothing(iou_type)
        results = super()._derive_coco_results(coco_eval, iou_type, class_names)
        if iou_type not in ("bbox", "segm"):
            return results
        for name, value in zip(_RECALLS, coco_eval.stats[len(_PRECISIONS) :]):
            results[name] = float(value) * 100 if value >= 0 else math.nan
        numbers = {name: results[name] for name in _PRECISIONS + _RECALLS}
        self._logger.info("All numbers of %s:\n%s", iou_type, create_small_table(numbers))
        return results

    def _evaluation_of_nothing(self, iou_type):
        """COCO's evaluation of no detections, which detectron2 leaves out."""
        nothing = COCO()
        nothing.dataset = {**self._coco_api.dataset, "annotations": []}
        nothing.createIndex()
        evaluation = COCOeval(self._coco_api, nothing, iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        return evaluation


def check_test_augmentation(cfg):
    """Checks that detectron2 can do what TEST.AUG.ENABLED asks for.

    Raises:
        InputError: it is True, and detectron2 cannot augment the images for this kind of model.
    """
    if not cfg.TEST.AUG.ENABLED:
        return
    reason = None
    if not issubclass(META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE), GeneralizedRCNN):
        reason = f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE}"
    elif cfg.MODEL.KEYPOINT_ON or cfg.MODEL.LOAD_PROPOSALS:
        reason = f"MODEL.{'KEYPOINT_ON' if cfg.MODEL.KEYPOINT_ON else 'LOAD_PROPOSALS'} True"
    if reason:
        raise InputError(
            f"TEST.AUG.ENABLED is True, which detectron2 cannot do with {reason}: set it to False."
        )


def build_coco_evaluator(cfg, dataset_name, output_folder=None):
    """Builds the evaluator of a dataset for what the config's model predicts.

    Args:
        cfg (CfgNode): detectron2's config.
        dataset_name (str): a registered dataset in COCO's format.
        output_folder (str or None): where the results go; None is OUTPUT_DIR/inference.

    Returns:
        FullCOCOEvaluator: it writes the detections to <output_folder>/<dataset>. For a dataset
        that is named by the path of its images, as with --dataset, <dataset> is the last two parts
        of that path, or more where DATASETS.TEST has another one with the same.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
    is_panoptic = cfg.MODEL.META_ARCHITECTURE == "PanopticFPN"
    if kind not in ("coco", "coco_panoptic_seg") or is_panoptic:
        _logger.warning(
            "%s has the evaluator type %r, and is evaluated with COCO's AP: override "
            "Trainer.build_evaluator for its own measure.",
            dataset_name,
            kind,
        )
    # os.path.join drops what is in front of an absolute path, so the results would lie beside the
    # user's images.
    place = dataset_name
    if os.path.isabs(dataset_name):
        parts = dataset_name.split(os.sep)
        others = [name.split(os.sep) for name in cfg.DATASETS.TEST if name != dataset_name]
        count = 2
        while count < len(parts) and any(parts[-count:] == other[-count:] for other in others):
            count += 1
        place = "_".join(parts[-count:])
    tasks = ["bbox"]
    if cfg.MODEL.MASK_ON:
        tasks.append("segm")
    if cfg.MODEL.KEYPOINT_ON:
        tasks.append("keypoints")
    return FullCOCOEvaluator(
        dataset_name,
        tuple(tasks),
        output_dir=os.path.join(output_folder or os.path.join(cfg.OUTPUT_DIR, "inference"), place),
        kpt_oks_sigmas=tuple(cfg.TEST.KEYPOINT_OKS_SIGMAS),
        # Without the compiled extension both names are the same class.
        use_fast_impl=COCOeval_opt is not COCOeval,
    )


def write_results(cfg, results):
    """Writes the numbers of an evaluation to OUTPUT_DIR/inference/results.json.

    Args:
        cfg (CfgNode): detectron2's config.
        results (dict): what ``Trainer.test`` returns; numbers that are not defined become null,
            and those of numpy and torch become Python's.
    """
    path = os.path.join(cfg.OUTPUT_DIR, "inference", "results.json")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with atomic_write(path) as file:
        file.write(json.dumps(_as_json(results), indent=2).encode())


def _as_json(value):
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    if isinstance(value, (np.generic, np.ndarray, torch.Tensor)):
        return _as_json(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
