"""Which tensors of a checkpoint fit which of a model, and which must."""

import dataclasses
import re

from detectron2.layers import FrozenBatchNorm2d

from ..layers import KN_STATE
from ..modeling.network import KNNetwork, PlainNetwork

__all__ = [
    "Match",
    "RESNET_STAGE",
    "essential_names",
    "extra_layers",
    "foreign_networks",
    "leaf",
    "match",
]

# What detectron2's ResNets, and res5 in C4 heads, call their parts.
RESNET_STAGE = re.compile(r"(?:^|\.)(stem|res[2-5])\.")
# Counters and constants, which some versions of torch and detectron2 have and others do not.
_INDIFFERENT = re.compile(
    r"\.num_batches_tracked$|anchor_generator\.cell_anchors\.|^pixel_(mean|std)$"
)
STATISTICS = ("running_mean", "running_var")


def leaf(name):
    """The last part of a tensor's name."""
    return name.rpartition(".")[2]


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


def essential_names(model, with_statistics):
    """The names of the tensors that an initialising checkpoint must have: those of the backbone.

    That is a ResNet of detectron2, or a network of another library.

    What Kalman Normalization adds is left out: no BatchNorm checkpoint has it.

    Args:
        model (nn.Module): detector or backbone.
        with_statistics (bool): whether the checkpoint has running statistics. Where BatchNorm was
            folded into scale and shift there are none, and frozen norms do not need them: 0 and 1,
            as detectron2 sets them.
    """
    exempt = set()
    if not with_statistics:
        exempt = {
            f"{name}.{statistic}"
            for name, module in model.named_modules()
            if isinstance(module, FrozenBatchNorm2d)
            for statistic in STATISTICS
        }
    networks = foreign_networks(model)
    return {
        name
        for name in model.state_dict()
        if (RESNET_STAGE.search(name) or name.startswith(networks))
        and not _INDIFFERENT.search(name)
        and leaf(name) not in KN_STATE
        and name not in exempt
    }


def foreign_networks(model):
    """The prefixes of the networks of other libraries in a model."""
    return tuple(
        f"{name}." if name else ""
        for name, module in model.named_modules()
        if isinstance(module, (KNNetwork, PlainNetwork))
    )


def extra_layers(found, state, model):
    """The filters of a checkpoint that the model lacks, in stages or networks that the model has.

    Such a checkpoint is of a deeper network, or of one with further parts.

    Args:
        found (Match): of the two.
        state (dict[str, Tensor]): the checkpoint's.
        model (nn.Module): detector or backbone.
    """
    stages = {part[1] for part in map(RESNET_STAGE.search, model.state_dict()) if part}
    networks = foreign_networks(model)

    def is_here(name):
        part = RESNET_STAGE.search(name)
        return name.startswith(networks) or (part and part[1] in stages)

    return [n for n in found.unused if n in state and state[n].dim() == 4 and is_here(n)]
