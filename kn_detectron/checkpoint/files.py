"""Files that are whole or not there, and reading those that others wrote without trusting them."""

import contextlib
import glob
import os
import pickle
import zipfile

import torch

from ..errors import InputError

__all__ = ["atomic_write", "check_pickle", "read_torch_file", "remove_partial_files"]

_PARTIAL = ".partial"

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


@contextlib.contextmanager
def atomic_write(path):
    """Opens a binary file that gets its name only when it is complete and on the disk.

    Whatever ends the process before that, the file that had the name until then is still there.

    Args:
        path (str): local file to write or to replace.
    """
    partial = path + _PARTIAL
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_partial_files(folder):
    """Removes what killed writes of checkpoints left behind in a folder."""
    for pattern in ("*.pth", "last_checkpoint"):
        for path in glob.glob(os.path.join(glob.escape(folder), pattern + _PARTIAL)):
            os.unlink(path)


def read_torch_file(path):
    """Reads a file of `torch.save` that holds nothing but tensors and plain containers.

    Args:
        path (str): local file.

    Returns:
        dict

    Raises:
        InputError: the file is damaged, something else, or would run code.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch reports bytes it cannot read with nearly every type
        raise InputError(_unreadable(path, error)) from error
    if not isinstance(content, dict):
        raise InputError(
            f"{path} is not a checkpoint: it holds a {type(content).__name__} where a dict of "
            "tensors was expected; give the file that a training run wrote."
        )
    return content


def _unreadable(path, error):
    if zipfile.is_zipfile(path):
        if isinstance(error, pickle.UnpicklingError):
            return (
                f"{path} holds more than tensors and plain containers, which could run code when "
                "read: load it where you trust it and save only its state_dict with torch.save."
            )
        return f"{path} is damaged: write it or copy it again, or use another checkpoint."
    with open(path, "rb") as file:
        start = file.read(4)
    # The directory of a zip archive is at its end, so a truncated one has only the beginning.
    if start in (b"", b"PK\x03\x04"):
        return (
            f"{path} is truncated: copy it again, or use another checkpoint (to resume from "
            "another one, put its name into the file last_checkpoint beside it)."
        )
    return (
        f"{path} is not a checkpoint: a file written by torch.save was expected; "
        "give the file that a training run wrote."
    )


class _ArrayUnpickler(pickle.Unpickler):
    """Reads containers and numpy arrays, and runs nothing else."""

    def find_class(self, module, name):
        if (module, name) not in _HARMLESS:
            raise pickle.UnpicklingError(f"it holds {module}.{name}")
        return super().find_class(module, name)


def check_pickle(path):
    """Reads a pickle and drops it, to know that detectron2 may.

    Args:
        path (str): local file.

    Raises:
        InputError: it does not hold a dict, or something other than numpy arrays and containers.
    """
    try:
        with open(path, "rb") as file:
            content = _ArrayUnpickler(file, encoding="latin1").load()
    except Exception as error:  # pickle reports bytes it cannot read with nearly every type
        raise InputError(
            f"{path} is not a checkpoint ({error}): a pickled dict of numpy arrays was expected; "
            "copy it again, or save tensors with torch.save as .pth."
        ) from error
    if not isinstance(content, dict):
        raise InputError(
            f"{path} is not a checkpoint: it holds a {type(content).__name__} where a dict of "
            "numpy arrays was expected; give a file of detectron2's model zoo or a .pth."
        )
