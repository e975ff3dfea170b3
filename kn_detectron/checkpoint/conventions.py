"""What weights presuppose of images and strides: pixel order, pixel statistics, STRIDE_IN_1X1.

A ResNet computes something else when its images come in another order or scale, or when the stride
of its bottleneck blocks sits in another convolution. No tensor shows this. Checkpoints of this
package carry it as an entry; for other projects it is known from the project.
"""

import dataclasses
import math
from typing import Any, Dict, List, Optional, Tuple

import torch
from detectron2.config import CfgNode
from torch import nn

__all__ = ["CHECKPOINT_KEY", "Conventions", "differences"]

# The entry of a checkpoint that holds `Conventions.to_dict()`.
CHECKPOINT_KEY = "kn_detectron"

# The keys of the config that set each of the conventions.
_CONFIG_KEYS = {
    "pixel_format": "INPUT.FORMAT",
    "pixel_mean": "MODEL.PIXEL_MEAN",
    "pixel_std": "MODEL.PIXEL_STD",
    "stride_in_1x1": "MODEL.RESNETS.STRIDE_IN_1X1",
}


@dataclasses.dataclass(frozen=True)
class Conventions:
    """What weights presuppose. A None means: not known, or without meaning for the network.

    Attributes:
        pixel_format: order of the channels, "BGR" or "RGB".
        pixel_mean: what is subtracted from the pixels (0 to 255), per channel in that order.
        pixel_std: what they are then divided by.
        stride_in_1x1: whether bottleneck blocks have their stride in the first 1x1 convolution
            instead of the 3x3 one. Basic blocks (ResNet-18 and 34) have no such choice.
    """

    pixel_format: Optional[str] = None
    pixel_mean: Optional[Tuple[float, ...]] = None
    pixel_std: Optional[Tuple[float, ...]] = None
    stride_in_1x1: Optional[bool] = None

    @classmethod
    def of_config(cls, cfg: CfgNode) -> "Conventions":
        """The conventions of the networks that a detectron2 config describes."""
        bottlenecks = cfg.MODEL.RESNETS.DEPTH >= 50
        return cls(
            pixel_format=cfg.INPUT.FORMAT,
            pixel_mean=_floats(cfg.MODEL.PIXEL_MEAN),
            pixel_std=_floats(cfg.MODEL.PIXEL_STD),
            stride_in_1x1=bool(cfg.MODEL.RESNETS.STRIDE_IN_1X1) if bottlenecks else None,
        )

    @classmethod
    def of_model(cls, model: nn.Module) -> "Conventions":
        """The conventions that a built detector or ResNet shows; None where it shows nothing."""
        return cls(
            pixel_format=getattr(model, "input_format", None),
            pixel_mean=cls.statistics(getattr(model, "pixel_mean", None)),
            pixel_std=cls.statistics(getattr(model, "pixel_std", None)),
            stride_in_1x1=_stride_in_1x1(model),
        )

    @staticmethod
    def statistics(value: Any) -> Optional[Tuple[float, ...]]:
        """The pixel_mean or pixel_std in a buffer of that name, or None where there is none."""
        return _floats(value.flatten().tolist()) if isinstance(value, torch.Tensor) else None

    def to_dict(self) -> Dict[str, Any]:
        """Plain values, for a checkpoint."""
        content = dataclasses.asdict(self)
        for name in ("pixel_mean", "pixel_std"):
            content[name] = None if content[name] is None else list(content[name])
        return content

    @classmethod
    def from_dict(cls, content: Dict[str, Any]) -> "Conventions":
        """Reverses :meth:`to_dict`; entries of other names are ignored.

        Raises:
            ValueError: a value is of another type than :meth:`to_dict` writes.
        """
        if not isinstance(content, dict):
            raise ValueError(f"a dict was expected, not a {type(content).__name__}")
        wanted = {
            "pixel_format": str,
            "pixel_mean": (list, tuple),
            "pixel_std": (list, tuple),
            "stride_in_1x1": bool,
        }
        values = {name: content.get(name) for name in wanted}
        for name, value in values.items():
            if value is not None and not isinstance(value, wanted[name]):
                raise ValueError(f"{name} is a {type(value).__name__}")
            if isinstance(value, (list, tuple)):
                if not all(isinstance(v, (int, float)) for v in value):
                    raise ValueError(f"{name} is not a list of numbers")
                values[name] = _floats(value)
        return cls(**values)

    @property
    def known(self) -> bool:
        """Whether anything is known."""
        return any(value is not None for value in dataclasses.astuple(self))


def differences(source: Conventions, model: Conventions) -> List[str]:
    """Lists where a model differs from the conventions of its weights, if both are known.

    Args:
        source: of the weights.
        model: of the model that gets them.

    Returns:
        list[str]: one clause per difference, with the key of the config, the source's value and
        the model's.
    """
    clauses = []
    for name, key in _CONFIG_KEYS.items():
        wanted, found = getattr(source, name), getattr(model, name)
        if wanted is None or found is None or _same(wanted, found):
            continue
        clause = f"{key} {_shown(wanted)} (the model has {_shown(found)}"
        if isinstance(wanted, tuple) and _same(wanted, found[::-1]):
            clause += ", the same in the other channel order"
        clauses.append(clause + ")")
    return clauses


def _same(a, b) -> bool:
    if isinstance(a, tuple):
        return len(a) == len(b) and all(math.isclose(x, y, rel_tol=1e-3) for x, y in zip(a, b))
    return a == b


def _shown(value) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(f'{v:g}' for v in value)}]"
    return str(value)


def _floats(values) -> Tuple[float, ...]:
    # Rounded, since a model keeps them in float32.
    return tuple(round(float(value), 4) for value in values)


def _stride_in_1x1(model: nn.Module) -> Optional[bool]:
    for name, stage in model.named_modules():
        if name.rpartition(".")[2] != "res3":
            continue
        block = next(stage.children(), None)
        if not hasattr(block, "conv3"):  # a basic block, or nothing of detectron2's
            return None
        strides = [max(getattr(block, conv).stride) for conv in ("conv1", "conv2")]
        return strides[0] > strides[1] if max(strides) > 1 else None
    return None
