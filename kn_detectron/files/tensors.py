"""Whether what a file holds can be the tensors of a network."""

from typing import Any, Callable, Dict

import numpy as np
import torch

from ..errors import InputError
from .wrapping import is_numeric

__all__ = ["check_variances", "checked_tensors"]


def checked_tensors(
    state: Any, path: str, may_be_infinite: Callable[[str], bool] = lambda name: False
) -> Dict[str, torch.Tensor]:
    """Checks that there is a dict of finite tensors or arrays, and makes tensors of them, in place.

    An OrderedDict stays one, with the versions of modules that torch notes in it.

    Args:
        state: what should be tensors by name.
        path: of the file, for the message.
        may_be_infinite: tells by its name whether a tensor may hold infinity. None may hold NaN.

    Returns:
        ``state``.

    Raises:
        InputError: it is something else, or a value is not finite.
    """
    if not isinstance(state, dict) or not state:
        raise InputError(
            f"{path} is not a checkpoint of a model: a dict of tensors was expected, or one that "
            'has it under "model"; give the file that a training run wrote.'
        )
    broken = []
    for name, value in state.items():
        if not isinstance(name, str):
            raise InputError(
                f"{path} is not a checkpoint of a model: the name of its entry {name!r} is no text; "
                "give the file that a training run wrote."
            )
        if not is_numeric(value):
            raise InputError(
                f"{path} is not a checkpoint of a model: its entry {name!r} is {_what(value)} where "
                "a dense tensor of real numbers was expected; give the file that a training run wrote."
            )
        if isinstance(value, np.ndarray):
            # Arrays out of a pickle may be read-only or of another byte order.
            value = torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("=")))
            state[name] = value
        if not (~value.isnan() if may_be_infinite(name) else value.isfinite()).all():
            broken.append(name)
    if broken:
        raise InputError(
            f"{path} has values that are not finite in {len(broken)} of {len(state)} tensors, "
            f"the first {broken[0]}, as a diverged training leaves them: use a checkpoint from "
            "before, with a lower SOLVER.BASE_LR."
        )
    return state


def _what(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of {value.dtype}, {value.layout} on {value.device.type}"
    return f"of type {type(value).__name__}"


def check_variances(state: Dict[str, torch.Tensor], path: str) -> None:
    """Checks that no running variance is negative.

    Args:
        state: tensors by name.
        path: of the file, for the message.

    Raises:
        InputError: one is.
    """
    negative = [n for n, v in state.items() if n.endswith("running_var") and (v < 0).any()]
    if negative:
        raise InputError(
            f"{path} has negative variances in {len(negative)} tensors, the first {negative[0]}, "
            "which no training writes: copy it again, or use another checkpoint."
        )
