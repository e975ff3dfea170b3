"""Whether the datasets of a run have what its config asks for."""

import logging
import os

from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import log_first_n

from ..errors import InputError
from ..files import fetch
from .annotations import Uses

__all__ = ["check_requirements", "num_classes_node", "uses_of"]

# The number of detections of a category in an image that COCO's metric looks at.
_COCO_MAX_DETECTIONS = 100

# Where each of detectron2's models has the number of classes.
_NUM_CLASSES = {
    "GeneralizedRCNN": "ROI_HEADS",
    "KNRetinaNet": "RETINANET",
    "PanopticFPN": "ROI_HEADS",
    "RetinaNet": "RETINANET",
}


def num_classes_node(cfg):
    """Gives the node of MODEL that has the number of classes.

    Args:
        cfg (CfgNode): detectron2's config.

    Returns:
        str or None: None for a model that is not of detectron2 or of this package.
    """
    return _NUM_CLASSES.get(cfg.MODEL.META_ARCHITECTURE)


def uses_of(cfg):
    """Gives what a config makes use of.

    Args:
        cfg (CfgNode): detectron2's config.

    Returns:
        Uses
    """
    count = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS if cfg.MODEL.KEYPOINT_ON else 0
    return Uses(masks=cfg.MODEL.MASK_ON, keypoints=count)


def check_requirements(cfg, truths):
    """Checks a config against what its datasets hold.

    Args:
        cfg (CfgNode): detectron2's config.
        truths (dict[str, dict[str, Truth]]): of :func:`~kn_detectron.data.check_datasets`.

    Raises:
        InputError: the config asks for something that the datasets do not have.
    """
    for check in _CHECKS:
        check(cfg, truths)


def _warn_once(sentence):
    # The requirements are checked again by each trainer and evaluation.
    log_first_n(logging.WARNING, sentence, name=__name__, key="message")


def _all(truths):
    return {name: truth for of_key in truths.values() for name, truth in of_key.items()}


def _check_categories_agree(cfg, truths):
    """Classes are numbered in the order of the ids, so the names in that order have to agree."""
    known = list(_all(truths).values())
    for other in known[1:]:
        first = known[0]
        if other.classes != first.classes:
            pairs = list(zip(first.classes, other.classes))
            at = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
            here, there = (
                repr(t.classes[at]) if at < len(t.classes) else "nothing" for t in (first, other)
            )
            raise InputError(
                f"The categories of {first.json_file} and {other.json_file} differ (in the order "
                f"of their ids, number {at + 1} is {here} in one and {there} in the other): give "
                "both annotation files the same list of categories."
            )


def _check_registered_classes(cfg, truths):
    for name, truth in _all(truths).items():
        registered = MetadataCatalog.get(name).get("thing_classes")
        if registered is not None and tuple(registered) != truth.classes:
            raise InputError(
                f"Annotation file {truth.json_file} has the categories "
                f"{_shortened(truth.classes)}, but dataset {name} is registered with "
                f"{_shortened(registered)}: register the file under a name of its own, or give "
                "its folder with --dataset."
            )


def _shortened(names):
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_num_classes(cfg, truths):
    node = num_classes_node(cfg)
    if node is None:
        return
    wanted = cfg.MODEL[node].NUM_CLASSES
    known = _all(truths)
    for name in (name for key in truths for name in cfg.DATASETS[key]):
        if name in known:
            subject, classes = known[name].json_file, known[name].classes
        else:  # in another format: as it is registered, if it says so
            subject, classes = f"dataset {name}", MetadataCatalog.get(name).get("thing_classes")
        if classes is not None and len(classes) != wanted:
            raise InputError(
                f"MODEL.{node}.NUM_CLASSES is {wanted}, but {subject} has {len(classes)} "
                f"categories: give MODEL.{node}.NUM_CLASSES {len(classes)}, or annotations with "
                f"{wanted} categories."
            )


def _check_objects(cfg, truths):
    train = truths.get("TRAIN", {})
    # Where a dataset is in another format nobody knows.
    if train and len(train) == len(cfg.DATASETS.TRAIN):
        if not any(truth.num_objects for truth in train.values()):
            files = " and ".join(truth.json_file for truth in train.values())
            # Objects whose segmentation is no region have been left out.
            with_a_mask = (
                ", and that has a mask, or MODEL.MASK_ON False" if cfg.MODEL.MASK_ON else ""
            )
            raise InputError(
                f"Annotation file {files} has no object to learn from: expected at least one that "
                f"is no crowd and whose bbox has an area within its image{with_a_mask}."
            )
    for truth in truths.get("TEST", {}).values():
        if truth.has_annotations and not truth.num_objects:
            _warn_once(
                f"Annotation file {truth.json_file} has no object to find: there will be no AP."
            )


def _check_masks(cfg, truths):
    if not cfg.MODEL.MASK_ON:
        return
    for truth in _all(truths).values():
        if truth.num_without_mask:
            raise InputError(
                f"Annotation file {truth.json_file} has {truth.num_without_mask} objects without "
                f"segmentation, the first in entry {truth.first_without_mask} of annotations: add "
                "them, or give MODEL.MASK_ON False to learn boxes only."
            )
    if cfg.INPUT.MASK_FORMAT == "polygon":
        for truth in truths.get("TRAIN", {}).values():
            if truth.has_encoded_masks:
                raise InputError(
                    f"Annotation file {truth.json_file} has masks that are not polygons: set "
                    'INPUT.MASK_FORMAT to "bitmask".'
                )


# Of a person. For these pycocotools has the tolerances.
_COCO_KEYPOINTS = 17


def _check_keypoints(cfg, truths):
    if not cfg.MODEL.KEYPOINT_ON:
        return
    for name in _all(truths):
        metadata = MetadataCatalog.get(name)
        for key in ("keypoint_names", "keypoint_flip_map"):
            if metadata.get(key) is None:
                # A folder that is given with --dataset is registered anew each time.
                how = "under a name of your own, " if os.path.isabs(name) else ""
                raise InputError(
                    f"MODEL.KEYPOINT_ON is True, but the metadata of dataset {name} has no {key}: "
                    f"register it {how}with that, or give MODEL.KEYPOINT_ON False."
                )
        names, wanted = metadata.keypoint_names, cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
        if len(names) != wanted:
            raise InputError(
                f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {wanted}, but dataset {name} has "
                f"{len(names)} keypoint_names: give it that number."
            )
    if truths.get("TEST"):
        sigmas = len(cfg.TEST.KEYPOINT_OKS_SIGMAS)
        wanted = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
        if (sigmas or _COCO_KEYPOINTS) != wanted:
            raise InputError(
                f"TEST.KEYPOINT_OKS_SIGMAS has {sigmas} numbers, but the evaluation needs one for "
                f"each of {wanted} keypoints: give as many (0.05 each weighs them alike)."
            )
    train, least = truths.get("TRAIN", {}), cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
    if train and len(train) == len(cfg.DATASETS.TRAIN):
        most = max(train.values(), key=lambda truth: truth.most_keypoints)
        if most.most_keypoints < max(least, 1):
            raise InputError(
                f"MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE is {least}, but no image of "
                f"{most.json_file} has more than {most.most_keypoints} labelled keypoints, so that "
                "none is left to learn from: give that number if it is not 0, or add keypoints."
            )


def _check_segmentation_heads(cfg, truths):
    model = cfg.MODEL.META_ARCHITECTURE
    if model not in ("PanopticFPN", "SemanticSegmentor"):
        return
    truth = next(iter(_all(truths).values()), None)
    if truth is not None:
        raise InputError(
            f"MODEL.META_ARCHITECTURE {model} needs semantic segmentations, which COCO's instances "
            f"in {truth.json_file} do not have: name a dataset that is registered with them, or give "
            "a model that needs none, as GeneralizedRCNN."
        )


def _check_proposals(cfg, truths):
    if not cfg.MODEL.LOAD_PROPOSALS:
        if cfg.MODEL.PROPOSAL_GENERATOR.NAME == "PrecomputedProposals":
            raise InputError(
                "MODEL.PROPOSAL_GENERATOR.NAME is PrecomputedProposals, but MODEL.LOAD_PROPOSALS "
                "is False: set it True and name the files in DATASETS.PROPOSAL_FILES_TRAIN and "
                "_TEST."
            )
        return
    for key in truths:
        names, files = cfg.DATASETS[key], cfg.DATASETS[f"PROPOSAL_FILES_{key}"]
        if len(files) != len(names):
            raise InputError(
                f"MODEL.LOAD_PROPOSALS is True, but DATASETS.PROPOSAL_FILES_{key} has {len(files)} "
                f"files for the {len(names)} datasets of DATASETS.{key}: give one for each."
            )
        for name, path in zip(names, files):
            if "://" in path:  # iopath does not know whether it is there before it downloads it
                fetch(path)
            elif not PathManager.isfile(path):
                raise InputError(
                    f"{path} of DATASETS.PROPOSAL_FILES_{key} does not exist: give a file of "
                    f"proposals for dataset {name}."
                )


def _warn_of_full_images(cfg, truths):
    for truth in truths.get("TEST", {}).values():
        if truth.most_objects > _COCO_MAX_DETECTIONS:
            _warn_once(
                f"Image {truth.fullest_image} of {truth.json_file} has {truth.most_objects} objects, "
                f"but COCO's AP stops at {_COCO_MAX_DETECTIONS} detections of a category in an image, "
                f"and the model at TEST.DETECTIONS_PER_IMAGE {cfg.TEST.DETECTIONS_PER_IMAGE}: what is "
                "beyond counts as not found."
            )


_CHECKS = (
    _check_segmentation_heads,
    _check_proposals,
    _check_categories_agree,
    _check_registered_classes,
    _check_num_classes,
    _check_objects,
    _check_masks,
    _check_keypoints,
    _warn_of_full_images,
)
