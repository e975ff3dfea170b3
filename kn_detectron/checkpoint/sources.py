"""Weights of other projects under detectron2's names, and what is known about their origin.

=====================  ===========================================================================
source                 how its tensors are called
=====================  ===========================================================================
Caffe2, Detectron1     ``res2_0_branch2a_w``, ``res2_0_branch2a_bn_s`` or ``_gn_s``; detectron2's
                       own MSRA pickles are of these names
torchvision, timm      ``layer1.0.conv1.weight``, ``layer1.0.bn1.weight``, ``downsample.0``
detectron2             ``stem.conv1.weight``, ``res2.0.conv1.norm.weight``, in detectors behind
                       ``backbone.``, ``backbone.bottom_up.`` and ``roi_heads.``
kn_detectron           detectron2's, and those of ``KN_STATE``
=====================  ===========================================================================
"""

import dataclasses
import re
from typing import Any, Collection, Dict

import torch
from detectron2.checkpoint.c2_model_loading import convert_c2_detectron_names

from ..errors import InputError, one_line
from ..files import (
    check_variances,
    checked_tensors,
    read_container,
    unwrapped_content,
    unwrapped_names,
    without_wrappers,
)
from ..layers import KN_STATE
from .conventions import CHECKPOINT_KEY, Conventions

__all__ = ["Weights", "read_weights"]

_OF_CAFFE2 = re.compile(r"res[2-5]_\d+_branch")
_OF_TORCHVISION = re.compile(r"layer1\.0\.")
_UNPREFIXED = re.compile(r"(stem|res[2-5])\.")
_OF_DETECTRON2 = re.compile(r"((backbone|bottom_up|roi_heads)\.)*(stem|res[2-5])\.")

_AFFINE = "weight|bias|running_mean|running_var|num_batches_tracked"
# What a plain ResNet or ResNeXt of torchvision or timm is made of, and its names in detectron2.
_TORCHVISION_NAMES = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"conv1\.weight", r"stem.conv1.weight"),
        (rf"bn1\.({_AFFINE})", r"stem.conv1.norm.\1"),
        (r"layer([1-4])\.(\d+)\.(conv[1-3])\.weight", r"res{stage}.\2.\3.weight"),
        (rf"layer([1-4])\.(\d+)\.bn([1-3])\.({_AFFINE})", r"res{stage}.\2.conv\3.norm.\4"),
        (r"layer([1-4])\.(\d+)\.downsample\.0\.weight", r"res{stage}.\2.shortcut.weight"),
        (rf"layer([1-4])\.(\d+)\.downsample\.1\.({_AFFINE})", r"res{stage}.\2.shortcut.norm.\3"),
        (r"fc\.(weight|bias)", r"linear.\1"),
    )
]

_RGB = Conventions("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
_BGR = Conventions("BGR", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0))


@dataclasses.dataclass
class Weights:
    """The content of a checkpoint.

    Attributes:
        state: tensors by detectron2's names. Those of a bare ResNet have no prefix.
        source: what it is, for people.
        conventions: what the weights presuppose, as far as it is known.
        matching_heuristics: whether names are to be completed by the prefixes of a model, as
            detectron2's checkpointer does for files with an entry of this name.
        rest: what else is in the file, such as the state of a training run.
    """

    state: Dict[str, torch.Tensor]
    source: str
    conventions: Conventions
    matching_heuristics: bool
    rest: Dict[str, Any]


def read_weights(path: str, own: Collection[str] = ()) -> Weights:
    """Reads the weights of a ResNet or of a detector, whoever wrote them.

    Pickles of detectron2's model zoo (MSRA, FAIR, detectors), of Caffe2 and Detectron1; ``.pth`` of
    torchvision and timm (ResNet-18 to 152, ResNeXt; also their training checkpoints) and timm's
    ``.safetensors``; ``.pth`` of detectron2 and of this package. They are told apart by the names
    in them, not by that of the file. See :mod:`kn_detectron.files.containers` for safety.

    Networks that this package takes from torchvision and timm keep their names. So the names in a
    file of this package, and those of the model itself, are left as they are.

    Args:
        path: local file.
        own: the names of the tensors of the model that is to be loaded, if there is one.

    Raises:
        InputError: the file cannot be read or would run code; it holds something other than finite
            tensors; a variance is negative; its network is a ResNet that detectron2 does not have.
    """
    content = read_container(path)
    own = set(map(without_wrappers, own))
    is_detectron1 = "model" not in content
    state, rest = unwrapped_content(content, path)
    author = rest.get("__author__")
    if author == "Caffe2" or any(_is(_OF_CAFFE2, name) for name in state):
        state = {k: v for k, v in state.items() if not str(k).endswith("_momentum")}
    state = checked_tensors(state, path, may_be_infinite=_is_gain)
    is_own = any("layer1.0." in name and without_wrappers(name) in own for name in state)
    is_final = CHECKPOINT_KEY in rest or is_own
    known = _OF_DETECTRON2.match if is_final else _is_of_a_network
    state = unwrapped_names(state, known, path)
    if author == "Caffe2" or any(map(_OF_CAFFE2.match, state)):
        weights = _from_caffe2(state, rest, path, is_detectron1=is_detectron1)
    elif not is_final and any(map(_OF_TORCHVISION.match, state)):
        weights = _from_torchvision(state, rest, path)
    else:
        weights = _from_detectron2(state, rest, path)
    check_variances(weights.state, path)
    return weights


def _is(pattern, name) -> bool:
    return isinstance(name, str) and pattern.match(name) is not None


def _is_gain(name: str) -> bool:
    # In older checkpoints a gain fixed to 0 or 1 has an infinite logit.
    return name.rpartition(".")[2] == "gain_logit"


def _is_of_a_network(name: str) -> bool:
    return any(p.match(name) for p in (_OF_CAFFE2, _OF_TORCHVISION, _OF_DETECTRON2))


def _from_caffe2(state, rest, path, is_detectron1: bool) -> Weights:
    groups_norm = any(name.endswith("_gn_s") for name in state)
    try:
        state, _ = convert_c2_detectron_names(state)
    except (AssertionError, IndexError, RuntimeError) as error:
        raise InputError(
            f"{path} is not a checkpoint of Caffe2, although its names are ({one_line(error)}): use "
            "another."
        ) from error
    is_resnext = _groups(state) > 1
    conventions = dataclasses.replace(
        _BGR,
        # detectron2's copies of ResNeXt have the deviations out of the first filter.
        pixel_std=_BGR.pixel_std if is_detectron1 or not is_resnext else _RGB.pixel_std[::-1],
        stride_in_1x1=not (groups_norm or is_resnext) if _has_bottlenecks(state) else None,
    )
    source = "Detectron1 or Caffe2" if is_detectron1 else "detectron2's model zoo"
    return Weights(state, source, conventions, True, rest)


def _from_torchvision(state, rest, path) -> Weights:
    renamed = {_from_torchvision_name(name, path): value for name, value in state.items()}
    conventions = dataclasses.replace(
        _RGB, stride_in_1x1=False if _has_bottlenecks(renamed) else None
    )
    return Weights(renamed, "torchvision or timm", conventions, True, rest)


def _from_torchvision_name(name: str, path: str) -> str:
    for pattern, replacement in _TORCHVISION_NAMES:
        found = pattern.fullmatch(name)
        if found:
            stage = int(found[1]) + 1 if name.startswith("layer") else ""
            return found.expand(replacement.replace("{stage}", str(stage)))
    raise InputError(
        f"{path} is of a network that detectron2's ResNet cannot be: it has no place for {name} (a "
        "deep stem, attention and the like); give weights of a plain ResNet or ResNeXt."
    )


def _from_detectron2(state, rest, path) -> Weights:
    author = rest.get("__author__")
    ours = CHECKPOINT_KEY in rest or any(n.rpartition(".")[2] in KN_STATE for n in state)
    if CHECKPOINT_KEY in rest:
        try:
            conventions = Conventions.from_dict(rest[CHECKPOINT_KEY])
        except (OverflowError, ValueError) as error:
            raise InputError(
                f"{path} has an entry {CHECKPOINT_KEY!r} that kn_detectron did not write "
                f"({error}): remove it, or write the checkpoint again."
            ) from error
    elif author == "torchvision":
        stride = False if _has_bottlenecks(state) else None
        conventions = dataclasses.replace(_RGB, stride_in_1x1=stride)
        # Where detectron2's conversion script puts the classifier.
        state = {re.sub(r"^stem\.fc\.", "linear.", n): value for n, value in state.items()}
    elif author == "MSRA":
        conventions = dataclasses.replace(_BGR, stride_in_1x1=True)
    else:
        # Detectors of versions before 2021 have their pixel statistics among their tensors.
        conventions = Conventions(
            pixel_mean=Conventions.statistics(state.get("pixel_mean")),
            pixel_std=Conventions.statistics(state.get("pixel_std")),
        )
    unprefixed = any(map(_UNPREFIXED.match, state))
    return Weights(
        state,
        "kn_detectron" if ours else "detectron2",
        conventions,
        rest.get("matching_heuristics") is True or unprefixed,
        rest,
    )


def _has_bottlenecks(state) -> bool:
    return any(re.search(r"(^|\.)res\d\.0\.conv3\.", name) for name in state)


def _groups(state) -> int:
    outer, inner = (state.get(f"res2.0.{conv}.weight") for conv in ("conv1", "conv2"))
    if outer is None or inner is None or inner.dim() != 4 or not inner.shape[1]:
        return 1
    return outer.shape[0] // inner.shape[1]
