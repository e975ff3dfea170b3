"""Converting the ResNet of a checkpoint, of any source, to another norm.

This does once what a config does at every start when it loads MODEL.WEIGHTS. It needs no config:
the architecture is read off the tensors.
"""

import dataclasses
import logging
import os
from typing import Dict

import torch
from torch import Tensor

from ..errors import InputError, one_line
from ..files import fetch
from ..layers import KN_STATE
from ..layers.gain import GAINS
from ..layers.mixin import VARIANTS
from .architecture import resnet_of
from .loading import load_weights
from .matching import RESNET_STAGE, leaf
from .sources import Weights, read_weights
from .writing import write_weights

__all__ = ["NORMS", "convert_weights"]

_logger = logging.getLogger(__name__)

# "same" leaves the norms, and so the network, as they are.
NORMS = ("KN", "GKN", "BN", "GN", "same")


def convert_weights(
    source: str, target: str, norm: str = "KN", variant: str = "network", half: bool = False
) -> None:
    """Writes the weights of any checkpoint as those of a network with another norm.

    The ResNet, bare or in a detector (C4, FPN), gets the norm; everything outside of it is carried
    through. Scales, shifts and filters stay as they are. "KN" gets calibrated process models
    (:func:`~kn_detectron.checkpoint.calibrate`). Gains and process models of the source are kept if
    they are for the same priors. The config that loads the file chooses what is not in it, such as
    the gains (MODEL.KN.GAIN). Loading ``target`` gives the same model as loading ``source``. The
    stem's process model is left to the loading, since its prior depends on the images
    (MODEL.KN.IMAGE_STD and PIXEL_STD).

    Args:
        source: file or address of weights; see :func:`~kn_detectron.checkpoint.read_weights`.
        target: ``.pth`` file to write or to replace. It is never left half written.
        norm: "KN", "GKN", "BN" or "GN"; "same" converts nothing, and takes other networks too, but
            no ResNets with other layers than detectron2's. It makes a small file of a training's
            checkpoint, without the optimiser and with ``half``.
        variant: of "KN", "network" or "paper".
        half: whether to write filters in float16, which halves the file. The tensors of the norms
            stay as they are: they are small, and a small variance would become 0.

    Raises:
        InputError: the source cannot be read or converted, or the target cannot be written.
    """
    if norm not in NORMS or variant not in VARIANTS:
        raise ValueError(f"norm is one of {NORMS} and variant of {VARIANTS}")
    source = fetch(source)
    _check_target(source, target)
    weights = read_weights(source)
    state = weights.state
    if norm != "same":
        state = _with_norm(weights, source, norm, variant)
    if half:
        state = {name: t if _is_constant(name) else _halved(t) for name, t in state.items()}
    write_weights(target, state, weights.conventions, weights.matching_heuristics)


def _is_constant(name: str) -> bool:
    """Whether a tensor is one of those that old versions of detectron2 save, such as anchors."""
    return name in ("pixel_mean", "pixel_std") or ".cell_anchors." in name


def _halved(t: Tensor) -> Tensor:
    """A filter in float16; any other tensor, or one whose values float16 does not have, as it is."""
    if t.dim() < 2 or not t.is_floating_point():
        return t
    half = t.half()
    return half if torch.equal(half.isfinite(), t.isfinite()) else t


def _with_norm(weights: Weights, path: str, norm: str, variant: str) -> Dict[str, Tensor]:
    """The tensors of a checkpoint whose ResNet has got another norm."""
    resnet = _Resnet(weights.state, path)
    inside = set(resnet.names.values())
    state = {name: tensor for name, tensor in weights.state.items() if name not in inside}
    _logger.info("%d tensors outside of the ResNet are carried through.", len(state))
    for name, tensor in _convert(resnet, weights, path, norm, variant).items():
        state[resnet.prefix_of(name) + name] = tensor
    return state


def _check_target(source: str, target: str) -> None:
    if os.path.exists(target) and os.path.samefile(source, target):
        raise InputError(f"{target} is the file to convert as well: give another name to write to.")
    if not target.endswith(".pth"):
        raise InputError(f"{target} does not end in .pth, which names the format that is written.")
    if not os.path.isdir(os.path.dirname(target) or "."):
        raise InputError(f"{target} is in a folder that does not exist: make it first.")


class _Resnet:
    """The ResNet among the tensors of a checkpoint.

    Attributes:
        names (dict[str, str]): names in the checkpoint by those without prefix.
        tensors (dict[str, Tensor]): by names without prefix.
    """

    def __init__(self, state: Dict[str, Tensor], path: str):
        found = {name: RESNET_STAGE.search(name) for name in state}
        self.names = {name[m.start(1) :]: name for name, m in found.items() if m}
        self.tensors = {bare: state[name] for bare, name in self.names.items()}
        self._prefixes = {}
        for name, part in found.items():
            if part and name[: part.start(1)] != self._prefixes.setdefault(
                part[1], name[: part.start(1)]
            ):
                raise InputError(
                    f"{path} has more than one {part[1]}, as in {name}: give weights of one ResNet."
                )
        if "stem.conv1.weight" not in self.tensors:
            raise InputError(
                f"{path} has no ResNet that detectron2 knows (stem.conv1.weight is missing): give "
                "weights of a plain ResNet or ResNeXt, or of a detector with one."
            )

    def prefix_of(self, name: str) -> str:
        """The prefix that the checkpoint puts in front of this name."""
        return self._prefixes[name.partition(".")[0]]


def _convert(
    resnet: _Resnet, weights: Weights, path: str, norm: str, variant: str
) -> Dict[str, Tensor]:
    try:
        model = resnet_of(resnet.tensors, norm, variant)
    except (AssertionError, IndexError, KeyError, ValueError, ZeroDivisionError) as error:
        reason = one_line(error) + (" is missing" if isinstance(error, KeyError) else "")
        raise InputError(
            f"{path} has a ResNet whose architecture cannot be read off its tensors ({reason}): "
            "give weights of a plain ResNet or ResNeXt."
        ) from error
    bare = dataclasses.replace(weights, state=dict(resnet.tensors), matching_heuristics=False)
    found = load_weights(model, bare, path)
    taken = set(found.matched)
    process = {n for n in found.missing if leaf(n) in KN_STATE and leaf(n) not in GAINS}
    fitted = {n for n in process if norm == "KN" and not n.startswith("stem.")}
    state = {}
    for name, tensor in model.state_dict().items():
        if name in taken or (leaf(name) == "num_batches_tracked" and name in resnet.tensors):
            state[name] = resnet.tensors[name]
        elif name in fitted:
            state[name] = tensor
    return state
