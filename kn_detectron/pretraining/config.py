"""From the config of a detector to that of the pre-training of its backbone."""

import copy
import math
import os
import re
from typing import Optional

from detectron2.config import CfgNode, get_cfg

from ..config import add_kn_config
from ..errors import InputError

__all__ = [
    "DECIDED_KEYS",
    "NORMS",
    "add_pretraining_config",
    "classification_config",
    "micro_batch",
]

# The norms that have statistics of the batch and of the past.
_BATCH_NORMS = ("BN", "KN", "BRN")
NORMS = (*_BATCH_NORMS, "GN", "GKN", "LN", "WN")

# Other forms of BatchNorm, with frozen statistics or with the statistics of all GPUs.
_OTHER_BATCH_NORMS = ("FrozenBN", "SyncBN", "nnSyncBN", "naiveSyncBN")

# Keys that are taken over, so that the weights fit the detector. The gain and its schedule are not
# taken over: a detector's config has values for fine-tuning there.
_MODEL_KEYS = ("BACKBONE", "RESNETS", "KN", "PIXEL_MEAN", "PIXEL_STD", "DEVICE")
_SCHEDULE_KEYS = ("GAIN", "LEARN_GAIN", "GAIN_ANNEAL", "EVAL_STATISTICS")

# Keys whose values classification_config derives or takes over, and which a classifier needs as
# they are. Mixed precision and the device are as read_config has checked them.
DECIDED_KEYS = (
    "MODEL.META_ARCHITECTURE",
    "MODEL.BACKBONE.NAME",
    "MODEL.BACKBONE.FREEZE_AT",
    "MODEL.RESNETS.NORM",
    "MODEL.RESNETS.OUT_FEATURES",
    "MODEL.DEVICE",
    "SOLVER.AMP.ENABLED",
)


def add_pretraining_config(cfg: CfgNode) -> None:
    """Adds the node ``PRETRAINING`` with its defaults to a detectron2 config."""
    cfg.PRETRAINING = node = CfgNode()
    # Folder of images in ImageNet's layout: train/<class>/ and val/<class>/ (or test/<class>/).
    node.DATA = ""
    # A network to train in place of the config's ResNet, by the name that build_network takes.
    node.NETWORK = ""
    # What there is in train/.
    node.NUM_CLASSES = 1000
    node.NUM_IMAGES = 1281167
    # Side in pixels of the square that the model sees.
    node.IMAGE_SIZE = 224
    # "BN", "KN", "GN", "GN<n>", "GKN", "LN", "WN" or "BRN".
    node.NORM = "BN"
    # MODEL.RESNETS.NORM of the detector, for the log.
    node.DETECTOR_NORM = ""
    # Images that are normalised together in training; 0 is all of a process's batch.
    node.NORM_BATCH_SIZE = 0


def micro_batch(cfg: CfgNode) -> Optional[int]:
    """How many images are normalised together in training.

    None means all of a process's batch, or each image on its own for norms that do so anyway.
    """
    pretraining = cfg.PRETRAINING
    return (pretraining.NORM_BATCH_SIZE or None) if pretraining.NORM in _BATCH_NORMS else None


def classification_config(
    detection: CfgNode,
    *,
    data: str,
    num_classes: int,
    num_images: int,
    norm: Optional[str] = None,
    norm_batch_size: int = 0,
    epochs: float = 100,
    batch_size: int = 256,
    lr: Optional[float] = None,
    weight_decay: float = 1e-4,
    image_size: int = 224,
    network: str = "",
) -> CfgNode:
    """The config that pre-trains the ResNet of a detector on images of one object each.

    Architecture, norm, MODEL.KN, pixel format and statistics, device, seed and number of workers
    are the detector's, so the weights fit it by construction. Nothing is frozen, and
    MODEL.KN.GAIN, GAIN_ANNEAL and EVAL_STATISTICS are the defaults, since a detector's config has
    values for fine-tuning there. OUTPUT_DIR is ``pretraining_<norm>`` inside the detector's,
    or ``pretraining_<network>_<norm>``.

    The schedule is the usual one of ImageNet: momentum 0.9, a warm-up over the first twentieth (5
    epochs of 100), then a cosine down to 0. The trainer evaluates and writes a checkpoint after
    every tenth of the schedule, but at most once per epoch.

    Args:
        detection: config of a detector with a ResNet, with or without FPN.
        data: folder of the images.
        num_classes, num_images: of the training images.
        norm: one of :data:`NORMS` or GN<n>; None is MODEL.RESNETS.NORM, where a frozen or
            synchronised BatchNorm becomes BatchNorm.
        norm_batch_size: images that are normalised together in training; 0 is all of them. Norms
            that treat every image on its own ignore it.
        epochs: passes over the training images; fractions are allowed.
        batch_size: images per step, on all GPUs together.
        lr: learning rate; None is 0.1 per 256 images.
        weight_decay: for all parameters except those of the norms.
        image_size: side in pixels of the square that the model sees.
        network: trained in place of the ResNet, with the same norms and pixels; see
            :func:`~kn_detectron.networks.build_network`.

    Returns:
        CfgNode: not frozen.

    Raises:
        InputError: an argument is out of range or unknown, or the detector has no ResNet and no
            network is named.
    """
    for name, value in (
        ("--epochs", epochs),
        ("--batch-size", batch_size),
        ("--lr", 1 if lr is None else lr),
        ("--image-size", image_size),
    ):
        if not 0 < value < math.inf:
            raise InputError(f"{name} is {value}: give a positive number.")
    if not 0 <= weight_decay < math.inf:
        raise InputError(f"--weight-decay is {weight_decay}: give 0 or a positive number.")
    if image_size < 32:
        raise InputError(f"--image-size is {image_size}: a ResNet needs 32 pixels or more.")
    if num_images < batch_size:
        raise InputError(
            f"{data} has {num_images} training images, fewer than a batch: give a --batch-size "
            f"of at most {num_images}, not {batch_size}."
        )
    cfg = get_cfg()
    add_kn_config(cfg)
    add_pretraining_config(cfg)
    defaults = copy.deepcopy(cfg.MODEL.KN)
    for key in _MODEL_KEYS:
        cfg.MODEL[key] = copy.deepcopy(detection.MODEL[key])
    for key in _SCHEDULE_KEYS:
        cfg.MODEL.KN[key] = defaults[key]
    cfg.INPUT.FORMAT = detection.INPUT.FORMAT
    cfg.DATALOADER.NUM_WORKERS = detection.DATALOADER.NUM_WORKERS
    cfg.SOLVER.AMP.ENABLED = detection.SOLVER.AMP.ENABLED
    cfg.CUDNN_BENCHMARK = detection.CUDNN_BENCHMARK
    cfg.SEED = detection.SEED

    cfg.MODEL.META_ARCHITECTURE = "NetworkClassifier" if network else "ImageClassifier"
    cfg.PRETRAINING.NETWORK = network
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    _set_norm(cfg, norm, norm_batch_size)

    pretraining = cfg.PRETRAINING
    pretraining.DATA = data
    pretraining.NUM_CLASSES = num_classes
    pretraining.NUM_IMAGES = num_images
    pretraining.IMAGE_SIZE = image_size

    solver = cfg.SOLVER
    solver.IMS_PER_BATCH = batch_size
    solver.BASE_LR = 0.1 * batch_size / 256 if lr is None else lr
    solver.WEIGHT_DECAY = solver.WEIGHT_DECAY_BIAS = weight_decay
    solver.MAX_ITER = math.ceil(epochs * num_images / batch_size)
    solver.LR_SCHEDULER_NAME = "WarmupCosineLR"
    solver.WARMUP_ITERS = solver.MAX_ITER // 20
    period = math.ceil(max(solver.MAX_ITER / 10, num_images / batch_size))
    solver.CHECKPOINT_PERIOD = cfg.TEST.EVAL_PERIOD = period
    # Not the detector's own folder: who resumes there has to find the detector.
    trained = [*network.split("/"), pretraining.NORM] if network else [pretraining.NORM]
    cfg.OUTPUT_DIR = os.path.join(detection.OUTPUT_DIR, "_".join(["pretraining", *trained]))
    return cfg


def _set_norm(cfg, norm, norm_batch_size):
    model = cfg.MODEL
    network = cfg.PRETRAINING.NETWORK
    if not network and "resnet" not in model.BACKBONE.NAME:
        raise InputError(
            f"MODEL.BACKBONE.NAME is {model.BACKBONE.NAME}: only ResNets can be pre-trained, with "
            "or without FPN, and what --network names."
        )
    name = model.RESNETS.NORM if norm is None else norm
    if name in _OTHER_BATCH_NORMS:
        name = "BN"
    if name not in NORMS and not re.fullmatch(r"GN[1-9]\d*", name):
        origin = "MODEL.RESNETS.NORM" if norm is None else "--norm"
        raise InputError(f"{origin} is {name!r}: give one of {', '.join(NORMS)} or GN<n>.")
    if name == "WN" and network and not network.startswith("cifar_resnet"):
        raise InputError(
            "--norm WN is made for the ResNet of the config and for those named cifar_resnet<n>: "
            f"give another norm for {network}."
        )
    if norm_batch_size < 0:
        raise InputError(
            f"--norm-batch-size is {norm_batch_size}: give a positive number, or leave it out."
        )
    cfg.PRETRAINING.NORM = name
    cfg.PRETRAINING.DETECTOR_NORM = model.RESNETS.NORM
    cfg.PRETRAINING.NORM_BATCH_SIZE = norm_batch_size
    if name == "WN":
        # WN does not normalise the scale of its input. The config may be changed, since no detector
        # gets these weights.
        model.PIXEL_STD = list(model.KN.IMAGE_STD)
    # BRN takes the place of BatchNorm when the model is built; LN is one group.
    model.RESNETS.NORM = {"BRN": "BN", "LN": "GN1", "WN": ""}.get(name, name)
    has_priors = name in ("KN", "GKN")
    model.BACKBONE.NAME = "build_kn_resnet_backbone" if has_priors else "build_resnet_backbone"
