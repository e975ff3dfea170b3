"""Groups of candidates that are compared with each other, and presets, which are sets of groups."""

import itertools
import math
from dataclasses import dataclass
from typing import Dict, Iterable, List, Optional, Sequence, Tuple

from kn_detectron.errors import InputError

__all__ = ["DTYPES", "FORMATS", "Group", "NORMS", "PRESETS", "WHATS", "make_groups"]

DTYPES = ("float32", "bfloat16", "float16")
FORMATS = ("contiguous", "channels_last")

# The norms by name, with their meanings.
NORMS = {
    "BN": "live BatchNorm",
    "FrozenBN": "detectron2's FrozenBatchNorm2d",
    "FrozenBN-affine": "frozen statistics with trainable scale and shift (layer only)",
    "SyncBN": "BatchNorm over several GPUs",
    "GN": "GroupNorm with 32 groups",
    "KN": "network variant",
    "KN-gain0": "KN with the gain at 0: nothing is measured",
    "KN-paper": "paper variant, prediction in closed form",
    "KN-paper-MC": "paper variant, prediction by Monte Carlo",
    "GKN": "Group Kalman Normalization with 32 groups",
    "KN-prediction": "KN's prediction alone: beliefs, no images (step only)",
}

# What can be measured.
WHATS = {
    "layer": "one layer, forward and backward",
    "backbone": "R50-C4 backbone, forward and backward",
    "compiled": "the backbone under torch.compile, which fails at a graph break",
    "evaluation": "R50-C4 backbone in evaluation",
    "step": "training step of Mask R-CNN: forward, backward, optimiser",
    "prediction": "all predictions of a step of R50-C4, forward and backward, by image size",
    "size": "one prediction and one layer over image size",
    "channels": "one prediction and one layer over channels",
}

# Ratios are taken to these candidates if they are in the group.
_BASES = {
    "layer": ("BN", "FrozenBN-affine"),
    "backbone": ("BN",),
    "compiled": ("BN",),
    "evaluation": ("FrozenBN",),
    "step": ("BN", "GN", "KN"),
    "size": ("closed form",),
    "channels": ("closed form",),
}

_CURVE = ("closed form", "Monte Carlo", "KN", "BN")


@dataclass(frozen=True)
class Group:
    """Candidates that are run in turn in one loop, so that their times can be compared.

    Attributes:
        what: a key of ``WHATS``.
        candidates: names of norms; ``"norm@pixels"`` for "prediction"; for the curves "closed form"
            and "Monte Carlo" for the prediction, "KN" and "BN" for the layer.
        bases: the candidates that ratios are taken to.
        shape: of the features for "layer", "size" and "channels", else of the images, (N, C, H, W).
        dtype: "float32", or the half precision of autocast.
        memory_format: "contiguous" or "channels_last".
        rounds: how often each candidate is timed.
        regions: regions of interest per image in a step; None for the config's.
        kernel: side of the filter that a curve predicts through.
        at: the image size or the number of channels, for a point of a curve.
        slim: whether the networks are the narrow ones of ``configs/quick_schedules``.
    """

    what: str
    candidates: Tuple[str, ...]
    bases: Tuple[str, ...]
    shape: Tuple[int, int, int, int]
    dtype: str = "float32"
    memory_format: str = "contiguous"
    rounds: int = 5
    regions: Optional[int] = None
    kernel: int = 1
    at: Optional[int] = None
    slim: bool = False


_LAYER_NORMS = tuple(norm for norm in NORMS if norm != "KN-prediction")
_STEP_NORMS = tuple(norm for norm in NORMS if norm != "FrozenBN-affine")
_NETWORK_NORMS = tuple(norm for norm in _STEP_NORMS if norm != "KN-prediction")

_NETWORK = dict(
    norms=_NETWORK_NORMS,
    images=(1,),
    size=(320, 320),
    dtypes=("float32",),
    formats=("contiguous",),
    regions=None,
    slim=False,
    rounds=5,
)

# The settings of each kind of measurement, unless a preset has others.
_DEFAULTS = {
    "layer": dict(
        norms=_LAYER_NORMS,
        shapes=((1, 256, 100, 168), (2, 64, 100, 168), (64, 512, 7, 7)),
        dtypes=("float32",),
        formats=("contiguous",),
        rounds=9,
    ),
    "backbone": _NETWORK,
    "compiled": {**_NETWORK, "norms": ("BN", "KN")},
    "evaluation": {**_NETWORK, "norms": ("FrozenBN", "BN", "KN")},
    "step": {**_NETWORK, "norms": _STEP_NORMS},
    "prediction": dict(
        norms=("KN", "KN-paper", "KN-paper-MC"), sizes=(400, 1333), slim=False, rounds=5
    ),
    "size": dict(sizes=(200, 400, 800, 1333), channels=(256,), kernel=3, rounds=5),
    "channels": dict(sizes=(800,), channels=(64, 128, 256, 512, 1024, 2048), kernel=1, rounds=5),
}

# Features of res2, stem and res5 at full size, for which the project has targets.
_SHAPES = ((1, 256, 200, 336), (2, 64, 400, 672), (512, 2048, 7, 7), (128, 512, 7, 7))

_ON_A_GPU = dict(size=(800, 1333), images=(1, 2), rounds=11)

# By name: what is measured, and with which settings in place of the defaults.
PRESETS: Dict[str, Dict[str, Dict]] = {
    # Shows in seconds whether everything works. The networks are slim, and the times mean nothing.
    "quick": {
        "layer": dict(shapes=((2, 32, 8, 8),), rounds=2),
        "backbone": dict(norms=("BN", "KN"), size=(64, 64), slim=True, rounds=2),
        "evaluation": dict(size=(64, 64), slim=True, rounds=2),
        "step": dict(
            norms=("BN", "KN", "KN-prediction"), size=(64, 64), regions=8, slim=True, rounds=2
        ),
        "prediction": dict(sizes=(64, 128), slim=True, rounds=2),
        "size": dict(sizes=(64, 128), channels=(32,), rounds=2),
        "channels": dict(sizes=(64,), channels=(32, 64), rounds=2),
    },
    # A few minutes on two cores.
    "cpu": {
        "layer": dict(shapes=_SHAPES, dtypes=("float32", "bfloat16"), formats=FORMATS, rounds=5),
        "evaluation": {},
        "step": dict(
            norms=("BN", "FrozenBN", "GN", "KN", "KN-paper", "KN-paper-MC", "GKN", "KN-prediction"),
            regions=32,
        ),
        # A sampled map of 1333 pixels would take half of the time.
        "prediction": dict(norms=("KN",)),
        "size": dict(rounds=3),
        "channels": dict(rounds=3),
    },
    # Everything that the project has targets for, on a GPU. On a CPU it would take hours.
    "gpu": {
        "step": dict(_ON_A_GPU, dtypes=("float32", "float16")),
        "layer": dict(
            shapes=_SHAPES,
            dtypes=DTYPES,
            formats=FORMATS,
            rounds=11,
        ),
        "prediction": dict(rounds=11),
        "evaluation": _ON_A_GPU,
        "compiled": dict(_ON_A_GPU, images=(1,)),
        "backbone": _ON_A_GPU,
        "size": dict(rounds=11),
        "channels": dict(rounds=11),
    },
}


def _layer_groups(shapes, norms, dtypes, formats, rounds) -> List[Group]:
    return [
        Group("layer", norms, _BASES["layer"], shape, dtype, memory_format, rounds)
        for shape, dtype, memory_format in itertools.product(shapes, dtypes, formats)
    ]


def _network_groups(what, images, size, norms, dtypes, formats, **settings) -> List[Group]:
    return [
        Group(what, norms, _BASES[what], (count, 3, *size), dtype, memory_format, **settings)
        for count, dtype, memory_format in itertools.product(images, dtypes, formats)
    ]


def _prediction_groups(sizes, norms, **settings) -> List[Group]:
    candidates = tuple(f"{norm}@{size}" for norm, size in itertools.product(norms, sizes))
    return [Group("prediction", candidates, candidates[:1], (0, 3, sizes[0], sizes[0]), **settings)]


def _curve_groups(what, sizes, channels, **settings) -> List[Group]:
    groups = []
    for size, width in itertools.product(sizes, channels):
        side = math.ceil(size / 16)  # of res4, where a pixel is 16 of the image
        at = size if what == "size" else width
        shape = (1, width, side, side)
        groups.append(Group(what, _CURVE, _BASES[what], shape, at=at, **settings))
    return groups


def make_groups(preset: str, whats: Optional[Sequence[str]] = None, **changes) -> List[Group]:
    """The groups of a preset, with changes.

    Args:
        preset: a key of ``PRESETS``.
        whats: keys of ``WHATS`` to measure; None for those of the preset. A key that the preset
            does not have gets the default settings. For "compiled" these are the settings of
            "backbone" in the preset.
        changes: ``norms``, ``shapes``, ``images``, ``size``, ``dtypes``, ``formats``, ``regions``
            or ``rounds``, which replace the settings of the preset. None changes nothing.

    Returns:
        list: in the order in which they are to be measured.

    Raises:
        InputError: if a name is unknown, a number is not positive, or no group has a setting that
            is to be changed.
    """
    changes = {key: value for key, value in changes.items() if value is not None}
    _check_names("preset", [preset], PRESETS)
    _check_names("measurement", whats or [], WHATS)
    _check_names("norm", changes.get("norms", ()), NORMS)
    _check_names("dtype", changes.get("dtypes", ()), DTYPES)
    _check_names("memory format", changes.get("formats", ()), FORMATS)
    for key in {"rounds", "regions"} & set(changes):
        _check_positive(key, [changes[key]])
    for key in {"images", "size"} & set(changes):
        _check_positive(key, changes[key])
    for shape in changes.get("shapes", ()):
        _check_positive("shapes", shape)
    groups, used = [], set()
    for what in whats or PRESETS[preset]:
        named = PRESETS[preset].get("backbone" if what == "compiled" else what, {})
        settings = {**_DEFAULTS[what], **named, **PRESETS[preset].get(what, {})}
        settings.update((key, value) for key, value in changes.items() if key in settings)
        used |= settings.keys()
        if what == "layer":
            groups += _layer_groups(**settings)
        elif what == "prediction":
            groups += _prediction_groups(**settings)
        elif what in ("size", "channels"):
            groups += _curve_groups(what, **settings)
        else:
            groups += _network_groups(what, **settings)
    for key in changes.keys() - used:
        raise InputError(
            f"{key} is no setting of {' or '.join(whats or PRESETS[preset])}: leave it out, or "
            "measure something that has it"
        )
    return groups


def _check_names(kind: str, names: Sequence[str], known: Iterable[str]) -> None:
    for name in names:
        if name not in known:
            raise InputError(f"there is no {kind} {name!r}: choose from {', '.join(known)}")


def _check_positive(key: str, values: Sequence[int]) -> None:
    for value in values:
        if value < 1:
            raise InputError(f"{key} has the value {value}, but must be 1 or more")
