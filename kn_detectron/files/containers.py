"""Reading files of tensors that others wrote, without trusting them.

A pickle can run any code when it is read. The readers here run none. They read three formats, told
apart by their content and not by their name: archives of ``torch.save``, with torch's own reader
for weights only; ``.safetensors``; and plain pickles of numpy arrays. Nothing is loaded
twice, so the object that is returned is the one that was checked.
"""

import argparse
import contextlib
import pickle
import re
import zipfile

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..errors import InputError, one_line

__all__ = ["read_container", "unreadable_type"]


def _plain_dtype(*args):
    """numpy.dtype of numbers and text only: an array of objects would hold pointers from the file."""
    dtype = np.dtype(*args)
    if dtype.kind not in "biufcSU":
        raise pickle.UnpicklingError(f"it holds an array of {dtype}")
    return dtype


# What numpy needs to unpickle plain arrays, under its old and its new module names.
_NUMPY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
_HARMLESS = {
    ("_codecs", "encode"),
    ("collections", "OrderedDict"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
    *((module, name) for module in _NUMPY_MODULES for name in ("_reconstruct", "scalar")),
}

_ZIP = b"PK\x03\x04"
# How files of torch.save began before they were zip archives: a pickled magic number.
_OLD_TORCH = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)


def read_container(path):
    """Reads the dict in a file of ``torch.save``, a ``.safetensors`` file or a pickle of arrays.

    Args:
        path (str): local file.

    Returns:
        dict: of tensors, numpy arrays and plain containers; not checked further.

    Raises:
        InputError: the file is damaged, is of another kind, or would run code.
    """
    with open(path, "rb") as file:
        start = file.read(max(len(_OLD_TORCH), 9))
    if not start:
        raise InputError(_truncated(path))
    if start.startswith((_ZIP, _OLD_TORCH)):
        content = _read_torch(path)
    elif start[5:9] == b"\0\0\0{":  # eight bytes of a length below 2^40, then JSON
        content = _read_safetensors(path)
    else:
        content = _read_pickle(path)
    if not isinstance(content, dict):
        raise InputError(
            f"{path} is not a checkpoint: it holds a {type(content).__name__} where a dict of "
            "tensors was expected; give the file that a training run wrote."
        )
    return content


def _allowing_harmless_globals():
    """Lets torch read the plain values that training scripts save beside tensors."""
    if not hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):
        return contextlib.nullcontext()  # torch before 2.6 takes no names, and refuses such a file
    # numpy's arrays and numbers, whose constructors old and new versions of it name differently.
    constructors = {
        "_reconstruct": np.zeros(1).__reduce__()[0],
        "scalar": np.float64(0.0).__reduce__()[0],
    }
    named = [(f, f"{m}.{name}") for name, f in constructors.items() for m in _NUMPY_MODULES]
    named.append((_plain_dtype, "numpy.dtype"))
    types = {type(np.dtype(code)) for code in np.typecodes["AllInteger"] + "?efd"}
    return torch.serialization.safe_globals([argparse.Namespace, np.ndarray, *types, *named])


def unreadable_type(path):
    """What in a file of ``torch.save`` :func:`read_container` would refuse.

    Args:
        path (str): local file, complete.

    Returns:
        str or None: the name of a type or function; None if there is none, or with a torch before
        2.6, which cannot tell.
    """
    find = getattr(torch.serialization, "get_unsafe_globals_in_checkpoint", None)
    if find is None:
        return None
    with _allowing_harmless_globals():
        return min(find(path), default=None)


def _read_torch(path):
    _check_archive(path)
    try:
        # Opened here, since new versions of torch would choose their reader by the file's name.
        with open(path, "rb") as file, _allowing_harmless_globals():
            return torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # torch reports bytes it cannot read with nearly every type
        if isinstance(error, pickle.UnpicklingError):
            found = re.search(r"GLOBAL (\S+)", str(error))  # as torch words it
            example = f" (the first is {found[1]})" if found else ""
            raise InputError(
                f"{path} holds more than tensors and plain containers{example}, which could run code "
                "when read: load it where you trust it and save only its state_dict with torch.save."
            ) from error
        if "can't allocate memory" in str(error):  # torch's way to lack memory
            raise
        # The directory of a zip archive is at its end, so a truncated one has only the beginning.
        if not zipfile.is_zipfile(path):
            raise InputError(_truncated(path)) from error
        raise InputError(_damaged(path)) from error


def _check_archive(path):
    """Refuses a zip archive that is complete but not one of torch.save, and says what it is."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.rpartition("/")[2] for name in archive.namelist()]
    except zipfile.BadZipFile as error:
        raise InputError(_damaged(path)) from error
    if "constants.pkl" in names:
        raise InputError(
            f"{path} is a TorchScript program and not a checkpoint: give the checkpoint that it was "
            "made from, or write one with torch.save(torch.jit.load(path).state_dict(), new_path)."
        )
    if all(name.endswith(".npy") for name in names):
        raise InputError(
            f"{path} is an archive of numpy arrays (.npz) and not a checkpoint: write one with "
            "pickle.dump(dict(numpy.load(path)), file)."
        )
    if "data.pkl" not in names:
        raise InputError(
            f"{path} is a zip archive and not one of torch.save (its first file is {names[:1]}): "
            "unpack it, or give the checkpoint itself."
        )


def _damaged(path):
    return f"{path} is damaged: write it or copy it again, or use another checkpoint."


def _truncated(path):
    return (
        f"{path} is truncated: copy it again, or use another checkpoint (to resume from "
        "another one, put its name into the file last_checkpoint beside it)."
    )


def _read_safetensors(path):
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"{path} is damaged or truncated ({one_line(error)}): copy it again."
        ) from error


class _ArrayUnpickler(pickle.Unpickler):
    """Reads containers and numpy arrays, and runs nothing else."""

    def find_class(self, module, name):
        if (module, name) not in _HARMLESS:
            raise pickle.UnpicklingError(f"it holds {module}.{name}")
        if (module, name) == ("numpy", "dtype"):
            return _plain_dtype
        return super().find_class(module, name)


def _read_pickle(path):
    try:
        with open(path, "rb") as file:
            # Files of Python 2, like Detectron1's, have their strings in latin1.
            return _ArrayUnpickler(file, encoding="latin1").load()
    except MemoryError:
        raise
    except Exception as error:  # pickle reports bytes it cannot read with nearly every type
        raise InputError(
            f"{path} is not a checkpoint ({one_line(error)}): a file of torch.save, .safetensors "
            "or a pickled dict of numpy arrays was expected; copy it again, or save a model's "
            "state_dict with torch.save."
        ) from error
