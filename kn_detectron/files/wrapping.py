"""What training scripts put around the tensors of a network: entries, and prefixes of their names.

A checkpoint is a dict of tensors, or a dict that holds such a dict beside the state of the
training. Wrappers of modules add parts to the names of the tensors, at any depth and in any order,
and a script may put one prefix of its own in front of all names. What is taken off here changes no
tensor, and the log says what it was.
"""

import collections
import logging
import os
from typing import Any, Callable, Dict, List, Tuple

import numpy as np
import torch

__all__ = ["is_numeric", "renamed", "unwrapped_content", "unwrapped_names", "without_wrappers"]

_logger = logging.getLogger(__name__)

# Where the tensors may be: detectron2's training, ours and torchvision's; Lightning's, timm's and
# OpenMMLab's; torch's tutorial; pycls's; Detectron1's.
_KEYS = ("model", "state_dict", "model_state_dict", "model_state", "blobs")

# By DistributedDataParallel and AveragedModel, torch.compile, FSDP, activation checkpointing.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

# AveragedModel counts what it has averaged, in a tensor that is not part of the network.
_COUNTER = "n_averaged"

_SCALARS = (bool, int, float, str, type(None), np.generic)


def is_numeric(value: Any) -> bool:
    """Whether a value is a dense tensor or an array of real numbers of 16 bits or more, or integers."""
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "biuf"
    if not isinstance(value, torch.Tensor) or value.is_complex() or value.is_quantized:
        return False
    is_float8 = value.is_floating_point() and value.element_size() == 1  # few operations take it
    return value.layout is torch.strided and not value.is_meta and not is_float8


def unwrapped_content(content: Dict, path: str) -> Tuple[Any, Dict]:
    """Parts a checkpoint into the entry with the tensors and the rest.

    Args:
        content: what is in the file.
        path: of the file, for the log.

    Returns:
        The entry that should be a dict of tensors, not checked, and all other entries. Single
        numbers and texts beside the tensors count as other entries.
    """
    states = [key for key, value in content.items() if _is_state(value)]
    key = next((key for key in _KEYS if isinstance(content.get(key), dict)), None)
    if key is None and len(states) == 1 and not any(map(is_numeric, content.values())):
        key = states[0]
        _logger.info("%s has its weights under %s.", path, key)
    if key is None:
        state, rest = content, {}
    else:
        state, rest = content[key], {k: v for k, v in content.items() if k != key}
    others = [str(other) for other in states if other != key]
    if key is not None and others:
        _logger.info(
            "%s has the weights %s beside %s: they are not used.", path, ", ".join(others), key
        )
    scalars = [name for name, value in state.items() if isinstance(value, _SCALARS)]
    if scalars and any(map(is_numeric, state.values())):
        _logger.info(
            "%s has entries that are no tensors beside its weights: %s.",
            path,
            ", ".join(map(str, scalars)),
        )
        rest.update((name, state.pop(name)) for name in scalars)
    return state, rest


def _is_state(value) -> bool:
    if not isinstance(value, dict) or not value:
        return False
    return all(isinstance(k, str) and is_numeric(v) for k, v in value.items())


def without_wrappers(name: str) -> str:
    """The name of a tensor without the parts that wrappers of modules add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def unwrapped_names(
    state: Dict[str, torch.Tensor], is_known: Callable[[str], bool], path: str
) -> Dict[str, torch.Tensor]:
    """Removes from the names what wrappers of modules and training scripts have added to them.

    A prefix that all names have in common is removed if some name is known without it, and none is
    known with it.

    Args:
        state: tensors by name; versions of modules that torch notes in it are kept.
        is_known: whether a name is of a network that can be loaded.
        path: of the file, for the log.

    Returns:
        The same tensors by shorter names, or ``state`` itself.
    """
    present = {part for name in state for part in name.split(".")} & set(_WRAPPERS)
    bare = renamed(state, without_wrappers)
    if present and len(bare) == len(state):  # or two networks would become one
        state = bare
        left_out = sorted(present) + ([_COUNTER] if state.pop(_COUNTER, None) is not None else [])
        _logger.info("%s is of a wrapped model: %s left out.", path, ", ".join(left_out))
    prefix = _foreign_prefix(list(state), is_known)
    if prefix:
        state = renamed(state, lambda name: ".".join(name.split(".")[len(prefix) :]))
        _logger.info("%s has %s. in front of all names: left out.", path, ".".join(prefix))
    return state


def _foreign_prefix(names: List[str], is_known: Callable[[str], bool]) -> List[str]:
    common = os.path.commonprefix([name.split(".")[:-1] for name in names])
    for length in range(len(common) + 1):
        if any(is_known(".".join(name.split(".")[length:])) for name in names):
            return common[:length]
    return []


def renamed(
    state: Dict[str, torch.Tensor], rename: Callable[[str], str]
) -> Dict[str, torch.Tensor]:
    """The same tensors by other names, with the versions of modules that torch notes in a state."""
    result = collections.OrderedDict((rename(name), value) for name, value in state.items())
    if hasattr(state, "_metadata"):  # by names of modules
        result._metadata = {rename(name): entry for name, entry in state._metadata.items()}
    return result
