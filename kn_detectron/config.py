"""The configuration of Kalman Normalization: ``cfg.MODEL.KN``."""

from typing import Any, Callable, Tuple

from detectron2.config import CfgNode as CN

from .errors import InputError
from .layers.kalman_norm import EVAL_STATISTICS
from .layers.mixin import VARIANTS
from .layers.transition import PREDICTIONS

__all__ = ["add_kn_config", "check_config", "without_kn_config"]

# Of ImageNet's pixels in 0..255, blue, green and red.
IMAGE_STD = (57.375, 57.120, 58.395)


def add_kn_config(cfg: CN) -> None:
    """Adds the node ``MODEL.KN`` and ``DATASETS.CLASS_NAMES``, with defaults, to a detectron2 config.

    The keys of ``MODEL.KN`` apply to the norms "KN" and "GKN" in the backbones and heads of
    :mod:`kn_detectron.modeling`. Calling this again changes no value that is already there.
    """
    if "CLASS_NAMES" not in cfg.DATASETS:
        # What the classes are called, in their order. A run with --dataset notes it in config.yaml.
        cfg.DATASETS.CLASS_NAMES = []
    if "KN" in cfg.MODEL:
        return
    cfg.MODEL.KN = kn = CN()
    # "network": the belief goes through the layer's own normalisation, the chain starts at the
    # image. "paper": Eq. 7 as the authors released it, the chain starts behind the first conv.
    kn.VARIANT = "network"
    # How a belief crosses ReLU and conv: "closed_form", or "monte_carlo" as in Sec. 3.2.
    kn.PREDICTION = "closed_form"
    # Side in pixels of the map that "monte_carlo" samples; 0 is the feature map's own size.
    kn.MONTE_CARLO_SIZE = 0
    # Initial gain q: the weight of the measurement against the prediction. From a BatchNorm
    # checkpoint take 0 with LEARN_GAIN False, or 0.02 with GAIN_ANNEAL (docs/config.md).
    kn.GAIN = 0.1
    # Whether the gain of each layer is learned.
    kn.LEARN_GAIN = True
    # The gain falls linearly to 0 between these two fractions of SOLVER.MAX_ITER, so that training
    # ends with statistics that depend on no batch. Before it falls, the priors are calibrated to
    # the running statistics. The priors of the paper variant and of GKN cannot be calibrated and
    # have to fit by themselves. Off when the fractions are equal; [0.6, 0.9] is a good choice.
    kn.GAIN_ANNEAL = [1.0, 1.0]
    # Whether each layer learns a correction of its prior (b and r, or the paper's R).
    kn.PROCESS_MODEL = True
    # Whether gradients flow through the prior to the layers below. One pair of fine-tunings speaks
    # for it (docs/evidence.md); from scratch it was not measured.
    kn.PRIOR_GRADIENT = True
    # Standard deviation of the pixels of the training images, in 0..255 and the channel order of
    # PIXEL_MEAN: the belief about the image, where the chain starts. The default is ImageNet's.
    kn.IMAGE_STD = list(IMAGE_STD)
    # Inference with "moving" averages (the paper's Option A), or with the filtered statistics of
    # the "batch" at hand (Option B). GKN has no moving averages and always uses the latter.
    kn.EVAL_STATISTICS = "moving"
    # The network of build_kn_network_backbone: a name that build_network takes.
    kn.NETWORK = "resnet50"
    # Its weights, a local file or package://NAME/FILE, in the format of its library; "" starts from
    # scratch.
    kn.NETWORK_WEIGHTS = ""
    # Groups of GKN; must divide all the widths of the network.
    kn.NUM_GROUPS = 32


def without_kn_config(cfg: CN) -> CN:
    """A copy of a config without what :func:`add_kn_config` adds. It is not frozen."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.pop("KN", None)
    cfg.DATASETS.pop("CLASS_NAMES", None)
    return cfg


def _one_of(values: Tuple[str, ...]) -> Tuple[Callable[[Any], bool], str]:
    return lambda v: v in values, f"one of {', '.join(repr(v) for v in values)}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_numbers(value: Any, low: float, high: float) -> bool:
    return isinstance(value, (list, tuple)) and all(
        _is_number(v) and low <= v <= high for v in value
    )


_BOOL = (lambda v: isinstance(v, bool), "True or False")

_RULES = {
    "VARIANT": _one_of(VARIANTS),
    "PREDICTION": _one_of(PREDICTIONS),
    "MONTE_CARLO_SIZE": (
        lambda v: _is_count(v) and (v == 0 or v >= 8),
        "0 (the feature map's own size) or a number of pixels of at least 8",
    ),
    # No int, which yacs would refuse in the config.yaml of the run.
    "GAIN": (lambda v: isinstance(v, float) and 0 <= v <= 1, "a float from 0.0 to 1.0"),
    "LEARN_GAIN": _BOOL,
    "GAIN_ANNEAL": (
        lambda v: _are_numbers(v, 0, 1) and len(v) == 2 and v[0] <= v[1],
        "two fractions of the schedule from 0 to 1, the first not above the second",
    ),
    "PROCESS_MODEL": _BOOL,
    "PRIOR_GRADIENT": _BOOL,
    "IMAGE_STD": (
        lambda v: _are_numbers(v, 1e-6, 1e6),
        "a list of positive numbers, one per channel of MODEL.PIXEL_STD",
    ),
    "EVAL_STATISTICS": _one_of(EVAL_STATISTICS),
    "NETWORK": (lambda v: isinstance(v, str) and v != "", "the name of a network"),
    "NETWORK_WEIGHTS": (lambda v: isinstance(v, str), "the path of a file, or empty"),
    "NUM_GROUPS": (lambda v: _is_count(v) and v > 0, "a positive whole number"),
}


def check_config(cfg: CN) -> None:
    """Checks every key of ``MODEL.KN``.

    Raises:
        InputError: naming the key, the value it has and the values it takes; or there is no
            ``MODEL.KN``.
    """
    if "KN" not in cfg.MODEL:
        raise InputError(
            "The config has no MODEL.KN: call kn_detectron.add_kn_config(cfg) after "
            "detectron2.config.get_cfg(), and before a file is merged into it"
        )
    kn = cfg.MODEL.KN
    for key in kn:
        if key not in _RULES:
            raise InputError(f"MODEL.KN.{key} is unknown: the keys are {', '.join(_RULES)}")
    for key, (accepts, wanted) in _RULES.items():
        if key not in kn:
            raise InputError(
                f"MODEL.KN.{key} is missing: call kn_detectron.add_kn_config(cfg) instead of "
                "making the node MODEL.KN"
            )
        if not accepts(kn[key]):
            raise InputError(f"MODEL.KN.{key} is {kn[key]!r}, but must be {wanted}")
    if len(kn.IMAGE_STD) != len(cfg.MODEL.PIXEL_STD):
        raise InputError(
            f"MODEL.KN.IMAGE_STD has {len(kn.IMAGE_STD)} values, but must have as many as "
            f"MODEL.PIXEL_STD: {len(cfg.MODEL.PIXEL_STD)}"
        )
    if kn.LEARN_GAIN and kn.GAIN in (0, 1):
        raise InputError(
            f"MODEL.KN.GAIN is {kn.GAIN}, which cannot be learned: set MODEL.KN.LEARN_GAIN False, "
            "or a gain strictly between 0 and 1"
        )
