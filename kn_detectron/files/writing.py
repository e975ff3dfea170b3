"""Writing files that are never half there."""

import contextlib
import errno
import glob
import os
import uuid

from ..errors import InputError, one_line

__all__ = [
    "atomic_write",
    "explained_full_disk",
    "explained_write_errors",
    "is_full_disk",
    "remove_partial_files",
]

_PARTIAL = ".partial"

# Some systems do not sync folders, and a folder that may be written to need not be readable.
_FOLDER_NOT_SYNCED = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM)

# No room, no quota, no larger files, and a disk that became read-only after a fault.
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextlib.contextmanager
def atomic_write(path):
    """Opens a binary file that gets its name only when it is complete and on the disk.

    If the process ends earlier, the file that had the name until then is still there.

    Args:
        path (str): local file to write or to replace.
    """
    # A name of its own, since another machine may write the same file.
    partial = f"{path}.{uuid.uuid4().hex[:8]}{_PARTIAL}"
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
    try:
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:  # the file is there
        if error.errno not in _FOLDER_NOT_SYNCED:
            raise


def remove_partial_files(folder):
    """Removes what killed writes of checkpoints left behind in a folder."""
    for pattern in ("*.pth", "last_checkpoint"):
        for path in glob.glob(os.path.join(glob.escape(folder), f"{pattern}.*{_PARTIAL}")):
            os.unlink(path)


@contextlib.contextmanager
def explained_write_errors(path, advice):
    """Context that explains in one sentence why a file cannot be written.

    Args:
        path (str): of the file, to be named.
        advice (str): what to do; it ends the sentence.

    Raises:
        InputError: the folder cannot be written to, or the disk is full.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch, which cannot finish its archive, hides the file's error behind its own.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        reason = cause.strerror or one_line(cause)  # Pillow's have no strerror
        raise InputError(f"{path} cannot be written ({reason}): {advice}") from error


def is_full_disk(error):
    """Whether an exception is that of a disk that takes no more."""
    return isinstance(error, OSError) and error.errno in _FULL_DISK


@contextlib.contextmanager
def explained_full_disk(folder):
    """Context that explains a full disk in one sentence, whoever writes to it.

    Args:
        folder (str): where the writing goes, to be named.

    Raises:
        InputError: the disk takes no more. Other errors are not touched.
    """
    try:
        yield
    except OSError as error:
        if not is_full_disk(error):
            raise
        raise InputError(
            f"{folder} cannot be written to ({error.strerror}): make room, then run the same "
            "command with --resume to go on from the last checkpoint."
        ) from error
