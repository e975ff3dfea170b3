"""The folder that a run writes to: it has to be writable, and no other run may use it."""

import os
import tempfile

from ..checkpoint import KNCheckpointer
from ..errors import InputError

__all__ = ["folder_of_run", "make_output_dir", "make_writable"]

# Of the folders that this process has claimed: their descriptors hold the locks until it ends.
_claimed = {}


def _leave_claims_to_parent():
    # A lock holds until all copies of its descriptor are closed, and workers of a loader, which are
    # forked, outlive a run that was killed.
    while _claimed:
        os.close(_claimed.popitem()[1])


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_claims_to_parent)


def folder_of_run(config_file):
    """The folder of a config.yaml with checkpoints beside it, or None for any other config."""
    folder, name = os.path.split(config_file)
    folder = folder or "."
    is_run = name == "config.yaml" and KNCheckpointer(None, folder).has_checkpoint()
    return folder if is_run else None


def make_writable(folder, name):
    """Creates a folder and tries to write there.

    Args:
        folder (str or Path): may be there already.
        name (str): what the user calls it, such as OUTPUT_DIR.

    Raises:
        InputError: it cannot be created or written to.
    """
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{name} {folder} cannot be created ({error.strerror}): give a folder that can be "
            "written to."
        ) from error
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"some bytes")
    except OSError as error:
        raise InputError(
            f"{name} {folder} cannot be written to ({error.strerror}): give a folder that can, "
            "on a disk with room."
        ) from error


def make_output_dir(cfg, args):
    """Creates OUTPUT_DIR, tries to write there, and keeps it from other runs.

    Two runs in one folder would replace each other's checkpoints and mix their logs. The lock is on
    the folder itself, and ends with this process, however the process ends.

    Args:
        cfg (CfgNode): detectron2's config.
        args (argparse.Namespace): of :func:`~.command_line.argument_parser`. The machines of one
            run may share the folder: the first one claims it.

    Raises:
        InputError: it cannot be created or written to, or another run has it.
    """
    folder = cfg.OUTPUT_DIR
    if "?" in folder:
        raise InputError(
            f"OUTPUT_DIR {folder} has a question mark, behind which detectron2 reads no further when "
            "it loads a checkpoint: give another folder."
        )
    make_writable(folder, "OUTPUT_DIR")
    if args.machine_rank == 0 and os.name == "posix":  # elsewhere a folder cannot be opened
        _claim(folder)


def _claim(folder):
    import fcntl

    path = os.path.realpath(folder)
    if path in _claimed:
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise InputError(
            f"OUTPUT_DIR {folder} is in use by another run: wait for its end, or give another "
            "OUTPUT_DIR."
        ) from error
    except OSError:
        pass  # some network file systems have no locks for folders
    _claimed[path] = descriptor
