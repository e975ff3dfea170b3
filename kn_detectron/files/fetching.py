"""Fetching files from elsewhere."""

import os

from detectron2.utils.file_io import PathManager

from ..errors import InputError, one_line

__all__ = ["fetch"]


def fetch(path):
    """Brings a file to this machine, if it is not there.

    Args:
        path (str): local file, or an address that detectron2's path manager knows.

    Returns:
        str: local file.

    Raises:
        InputError: there is no such file, it is a folder, or it cannot be downloaded.
    """
    local = path
    if "://" in path:
        try:
            local = PathManager.get_local_path(path)
        except InputError:  # of this package's handlers, which say what to do
            raise
        except Exception as error:  # each of iopath's handlers raises what its library does
            raise InputError(
                f"{path} cannot be downloaded ({one_line(error)}): give a local file instead."
            ) from error
    if os.path.isdir(local):
        raise InputError(f"{path} is a folder: give the path of a checkpoint in it.")
    if not os.path.isfile(local):
        raise InputError(f"{path} does not exist: give the path of a checkpoint.")
    return local
