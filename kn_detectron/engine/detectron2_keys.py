"""Checks keys of detectron2's that it would refuse late, and without naming them."""

import difflib
from operator import attrgetter

import torch
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_KEYPOINT_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
)
from detectron2.modeling.proposal_generator import RPN_HEAD_REGISTRY
from PIL import Image

from ..errors import InputError
from ..modeling.stock_names import STOCK_NAMES
from ..registration import WITHOUT_PRIORS

__all__ = ["check_builders", "check_detectron2_keys"]

_REGISTRIES = {
    "MODEL.META_ARCHITECTURE": META_ARCH_REGISTRY,
    "MODEL.BACKBONE.NAME": BACKBONE_REGISTRY,
    "MODEL.PROPOSAL_GENERATOR.NAME": PROPOSAL_GENERATOR_REGISTRY,
    "MODEL.ANCHOR_GENERATOR.NAME": ANCHOR_GENERATOR_REGISTRY,
    "MODEL.ROI_HEADS.NAME": ROI_HEADS_REGISTRY,
    # The name of a head may be empty where there is none, as with R50-C4.
    "MODEL.ROI_BOX_HEAD.NAME": ROI_BOX_HEAD_REGISTRY,
    "MODEL.ROI_MASK_HEAD.NAME": ROI_MASK_HEAD_REGISTRY,
    "MODEL.ROI_KEYPOINT_HEAD.NAME": ROI_KEYPOINT_HEAD_REGISTRY,
    "MODEL.RPN.HEAD_NAME": RPN_HEAD_REGISTRY,
}

# The heads of each kind of model that take features by name.
_HEADS = {
    "GeneralizedRCNN": ("RPN", "ROI_HEADS"),
    "PanopticFPN": ("RPN", "ROI_HEADS", "SEM_SEG_HEAD"),
    "ProposalNetwork": ("RPN",),
    "SemanticSegmentor": ("SEM_SEG_HEAD",),
    "RetinaNet": ("RETINANET",),
    "KNRetinaNet": ("RETINANET",),
}

_WITH_PRIORS = {stock: name for name, stock in STOCK_NAMES.items()}

# What detectron2 looks for before it asks the registry.
_UNREGISTERED = {"MODEL.PROPOSAL_GENERATOR.NAME": "PrecomputedProposals"}


def _is_device(name):
    try:
        torch.device(name)
    except RuntimeError:
        return False
    return True


def _in_order(steps):
    return list(steps) == sorted(set(steps)) and all(
        isinstance(step, (int, float)) for step in steps
    )


def _one_of(*names):
    return names.__contains__, f"{', '.join(map(repr, names[:-1]))} or {names[-1]!r}"


_RULES = {
    "MODEL.DEVICE": (_is_device, "a device of torch, such as 'cuda' or 'cpu'"),
    "INPUT.FORMAT": (
        lambda name: name in ("BGR", "YUV-BT.601", *Image.MODES),
        "'BGR', 'RGB' or another mode of Pillow's",
    ),
    "INPUT.MIN_SIZE_TRAIN": (len, "one size or more"),
    "INPUT.MIN_SIZE_TEST": (
        lambda size: size >= 0,
        "a size in pixels, or 0 to leave images as they are",
    ),
    "MODEL.PIXEL_STD": (
        lambda values: min(values, default=0) > 0,
        "positive, one for each channel",
    ),
    "MODEL.ANCHOR_GENERATOR.SIZES": (len, "one list of sizes or more"),
    "INPUT.MAX_SIZE_TRAIN": (lambda size: size >= 1, "a size in pixels"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": _one_of("choice", "range"),
    "INPUT.CROP.TYPE": _one_of("relative_range", "relative", "absolute", "absolute_range"),
    "INPUT.RANDOM_FLIP": _one_of("horizontal", "vertical", "none"),
    "INPUT.MASK_FORMAT": _one_of("polygon", "bitmask"),
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": (lambda number: number >= 1, "1 or more"),
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": (lambda number: number >= 1, "1 or more"),
    "DATALOADER.NUM_WORKERS": (lambda number: number >= 0, "0 or more"),
    "SOLVER.MAX_ITER": (lambda number: number >= 1, "1 or more"),
    "SOLVER.BASE_LR": (lambda rate: rate >= 0, "0 or more"),
    "SOLVER.MOMENTUM": (lambda momentum: momentum >= 0, "0 or more"),
    "SOLVER.WEIGHT_DECAY": (lambda decay: decay >= 0, "0 or more"),
    "SOLVER.STEPS": (_in_order, "numbers in ascending order"),
    "SOLVER.WARMUP_METHOD": _one_of("linear", "constant"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": _one_of("value", "norm"),
}


def check_detectron2_keys(cfg):
    """Checks names of models, the device, and some numbers.

    Args:
        cfg (CfgNode): detectron2's config.

    Raises:
        InputError: naming the key, the value it has and what it takes.
    """
    for key, registry in _REGISTRIES.items():
        name = attrgetter(key)(cfg)
        if name in registry or name == _UNREGISTERED.get(key) or (name == "" and "_HEAD." in key):
            continue
        near = difflib.get_close_matches(name, [known for known, _ in registry])
        hint = f" (is {' or '.join(near)} meant?)" if near else ""
        raise InputError(
            f"{key} is {name!r}, which is not registered{hint}: correct it, or import the module "
            "that registers it."
        )
    for key, (accepts, wanted) in _RULES.items():
        value = attrgetter(key)(cfg)
        try:
            accepted = accepts(value)
        except TypeError:  # such as None, where a YAML file has a key without a value
            accepted = False
        if not accepted:
            raise InputError(f"{key} is {value!r}, but must be {wanted}.")
    if len(cfg.MODEL.PIXEL_MEAN) != len(cfg.MODEL.PIXEL_STD):
        raise InputError(
            f"MODEL.PIXEL_MEAN is {cfg.MODEL.PIXEL_MEAN} and MODEL.PIXEL_STD is "
            f"{cfg.MODEL.PIXEL_STD}, but both must have one number for each channel."
        )
    _check_box_head(cfg)
    _check_features(cfg)


def check_builders(cfg):
    """Checks that what builds a detector with KN passes priors: without, it is live BatchNorm.

    Args:
        cfg (CfgNode): detectron2's config.

    Raises:
        InputError: naming the key, and the name that passes priors.
    """
    norm = cfg.MODEL.RESNETS.NORM
    if norm not in ("KN", "GKN"):
        return
    builders = {"MODEL.BACKBONE.NAME": cfg.MODEL.BACKBONE.NAME}
    if (
        cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
        and cfg.MODEL.ROI_HEADS.NAME == "Res5ROIHeads"
    ):
        builders["MODEL.ROI_HEADS.NAME"] = "Res5ROIHeads"  # other heads do not build with this norm
    for key, name in builders.items():
        if name in _WITH_PRIORS:
            raise InputError(
                f"{key} is {name!r}, which passes no priors to the norms {norm!r} of "
                f"MODEL.RESNETS.NORM, so that they would be live {WITHOUT_PRIORS[norm]}: give {key} "
                f"{_WITH_PRIORS[name]}, or another norm."
            )


def _check_box_head(cfg):
    """Checks that there is a box head where the ROI heads do not bring one, as those of res5 do."""
    heads = cfg.MODEL.ROI_HEADS.NAME
    takes_one = heads.removeprefix("KN") in ("StandardROIHeads", "CascadeROIHeads")
    is_used = cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
    if is_used and takes_one and not cfg.MODEL.ROI_BOX_HEAD.NAME:
        raise InputError(
            f"MODEL.ROI_BOX_HEAD.NAME is empty, but MODEL.ROI_HEADS.NAME {heads!r} needs a box "
            "head: give FastRCNNConvFCHead, or KNFastRCNNConvFCHead for one with KN."
        )


def _check_features(cfg):
    """Checks that detectron2's heads take features that a ResNet, with an FPN or without, has."""
    out = list(cfg.MODEL.RESNETS.OUT_FEATURES)
    parts = ("stem", "res2", "res3", "res4", "res5")
    levels = [name.replace("res", "p") for name in cfg.MODEL.FPN.IN_FEATURES]
    by_backbone = {
        "resnet_backbone": out,
        "resnet_fpn_backbone": [*levels, "p6"],
        "retinanet_resnet_fpn_backbone": [*levels, "p6", "p7"],
    }
    name = cfg.MODEL.BACKBONE.NAME
    features = by_backbone.get(name.removeprefix("build_").removeprefix("kn_"))
    if features is None:
        return
    if not out or not set(out) <= set(parts):
        raise InputError(
            f"MODEL.RESNETS.OUT_FEATURES is {out}, but must be some of {', '.join(parts)}."
        )
    if "fpn" in name:
        inputs = cfg.MODEL.FPN.IN_FEATURES
        if not inputs or not set(inputs) <= set(out):
            raise InputError(
                f"MODEL.FPN.IN_FEATURES is {inputs}, but must be some of MODEL.RESNETS.OUT_FEATURES, "
                f"which has {', '.join(out)}."
            )
        if "retinanet" in name and "res5" not in out:
            raise InputError(
                f"MODEL.RESNETS.OUT_FEATURES is {out}, but MODEL.BACKBONE.NAME {name!r} makes P6 of "
                "res5: add res5."
            )
    for head in _HEADS.get(cfg.MODEL.META_ARCHITECTURE, ()):
        wanted = cfg.MODEL[head].IN_FEATURES
        if head == "RPN" and cfg.MODEL.PROPOSAL_GENERATOR.NAME == "PrecomputedProposals":
            continue
        if not set(wanted) <= set(features):
            raise InputError(
                f"MODEL.{head}.IN_FEATURES is {wanted}, but MODEL.BACKBONE.NAME {name!r} has "
                f"{', '.join(features)}: take a backbone with an FPN for features p2 to p7, and one "
                "without for res2 to res5."
            )
