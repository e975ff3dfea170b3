"""Which tensors of a checkpoint fit which of a model, and which must."""

import dataclasses
import re

import numpy as np
import torch
from detectron2.layers import FrozenBatchNorm2d

from ..errors import InputError
from ..layers import KN_STATE

__all__ = ["Match", "check_tensors", "essential_names", "match"]

# What detectron2's ResNets, and res5 in C4 heads, call their parts.
_RESNET = re.compile(r"(^|\.)(stem|res[2-5])\.")
# Counters and constants: older and newer versions of torch and detectron2 differ in having them.
_INDIFFERENT = re.compile(
    r"\.num_batches_tracked$|anchor_generator\.cell_anchors\.|^pixel_(mean|std)$"
)


@dataclasses.dataclass
class Match:
    """A model's state beside that of a checkpoint; counters and constants are left out.

    Attributes:
        matched: names of the tensors that are in both, with the same shape.
        missing: names of those that only the model has.
        misshapen: (name in the model, shape in the checkpoint, shape in the model) of those with
            another shape.
        unused: names of those that only the checkpoint has.
    """

    matched: list
    missing: list
    misshapen: list
    unused: list

    def __str__(self):
        """What does not fit, with the first of each kind."""
        parts = []
        if self.missing:
            parts.append(f"{len(self.missing)} missing, the first {self.missing[0]}")
        if self.misshapen:
            name, found, wanted = self.misshapen[0]
            parts.append(
                f"{len(self.misshapen)} of another shape, the first {name} with {found} "
                f"instead of {wanted}"
            )
        if self.unused:
            parts.append(f"{len(self.unused)} that the model lacks, the first {self.unused[0]}")
        return f"{len(self.matched)} tensors fit, " + "; ".join(parts or ["none are amiss"])

    def only(self, names):
        """The part of it that concerns these names of the model."""
        return Match(
            [name for name in self.matched if name in names],
            [name for name in self.missing if name in names],
            [entry for entry in self.misshapen if entry[0] in names],
            [],
        )


def match(model_state, state):
    """Compares a model's state_dict with that of a checkpoint.

    Args:
        model_state (dict[str, Tensor]): the model's.
        state (dict[str, Tensor]): the checkpoint's, after its names were aligned.

    Returns:
        Match
    """
    result = Match([], [], [], [])
    misnamed = set()
    for name, tensor in model_state.items():
        if _INDIFFERENT.search(name):
            continue
        # Aligning leaves a tensor of the wrong shape under the name that it had in the file.
        other = name if name in state else _suffix_in(name, state)
        if other is None:
            result.missing.append(name)
        elif state[other].shape != tensor.shape:
            result.misshapen.append((name, tuple(state[other].shape), tuple(tensor.shape)))
            misnamed.add(other)
        elif other == name:
            result.matched.append(name)
        else:
            result.missing.append(name)
    known = set(model_state) | misnamed
    result.unused = [n for n in state if n not in known and not _INDIFFERENT.search(n)]
    return result


def _suffix_in(name, state):
    parts = name.split(".")
    candidates = (".".join(parts[i:]) for i in range(1, len(parts)))
    return next((c for c in candidates if c in state), None)


def essential_names(model):
    """The names of the tensors that an initialising checkpoint must have: those of the ResNet.

    Not what Kalman Normalization adds, which no BatchNorm checkpoint has; nor the statistics of
    frozen norms, which weights with folded statistics lack and detectron2 then sets to 0 and 1.
    """
    folded = {
        f"{name}.{statistic}"
        for name, module in model.named_modules()
        if isinstance(module, FrozenBatchNorm2d)
        for statistic in ("running_mean", "running_var")
    }
    return {
        name
        for name in model.state_dict()
        if _RESNET.search(name)
        and not _INDIFFERENT.search(name)
        and name.rpartition(".")[2] not in KN_STATE
        and name not in folded
    }


def check_tensors(state, source):
    """Checks that a checkpoint's "model" is a dict of finite tensors or arrays.

    Args:
        state: what the checkpoint holds under "model".
        source (str): how to call the checkpoint.

    Raises:
        InputError: it is not.
    """
    if not isinstance(state, dict) or not state:
        raise InputError(
            f"{source} is not a checkpoint of a model: a dict of tensors was expected, or one that "
            'has it under "model"; give the file that a training run wrote.'
        )
    broken = []
    for name, value in state.items():
        if not isinstance(name, str) or not _is_numeric(value):
            raise InputError(
                f"{source} is not a checkpoint of a model: its entry {name!r} is of type "
                f"{type(value).__name__} where a tensor was expected; give the file that a "
                "training run wrote."
            )
        of = torch if isinstance(value, torch.Tensor) else np
        # A gain fixed to 0 or 1 has an infinite logit.
        fixed_gain = name.rpartition(".")[2] == "gain_logit"
        if not (~of.isnan(value) if fixed_gain else of.isfinite(value)).all():
            broken.append(name)
    if broken:
        raise InputError(
            f"{source} has values that are not finite in {len(broken)} of {len(state)} tensors, "
            f"the first {broken[0]}, as a diverged training leaves them: use a checkpoint from "
            "before, with a lower SOLVER.BASE_LR."
        )


def _is_numeric(value):
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "biuf"
    return isinstance(value, torch.Tensor)
