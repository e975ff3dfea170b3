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

__all__ = ["check_detectron2_keys"]

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

# What detectron2 looks for before it asks the registry.
_UNREGISTERED = {"MODEL.PROPOSAL_GENERATOR.NAME": "PrecomputedProposals"}


def _is_device(name):
    try:
        torch.device(name)
    except RuntimeError:
        return False
    return True


_RULES = {
    "MODEL.DEVICE": (_is_device, "a device of torch, such as 'cuda' or 'cpu'"),
    "INPUT.FORMAT": (
        lambda name: name in ("BGR", "YUV-BT.601", *Image.MODES),
        "'BGR', 'RGB' or another mode of Pillow's",
    ),
    "INPUT.MIN_SIZE_TRAIN": (len, "one size or more"),
    "INPUT.RANDOM_FLIP": (
        ("horizontal", "vertical", "none").__contains__,
        "'horizontal', 'vertical' or 'none'",
    ),
    "INPUT.MASK_FORMAT": (("polygon", "bitmask").__contains__, "'polygon' or 'bitmask'"),
    "DATALOADER.NUM_WORKERS": (lambda number: number >= 0, "0 or more"),
    "SOLVER.MAX_ITER": (lambda number: number >= 1, "1 or more"),
    "SOLVER.BASE_LR": (lambda rate: rate >= 0, "0 or more"),
    "SOLVER.STEPS": (lambda steps: list(steps) == sorted(set(steps)), "in ascending order"),
    "SOLVER.WARMUP_METHOD": (("linear", "constant").__contains__, "'linear' or 'constant'"),
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
        if not accepts(value):
            raise InputError(f"{key} is {value!r}, but must be {wanted}.")
