"""Writing generated datasets once, and never leaving them half written."""

import contextlib
import json
import shutil
from pathlib import Path

from iopath.common.file_io import file_lock
from portalocker import AlreadyLocked, LockException

from ..errors import InputError, one_line
from ..files import explained_write_errors

__all__ = ["write_once"]

_MARKER = "shapes.json"
_ADVICE = "give another folder, or set DETECTRON2_DATASETS to one that can be written to."


def write_once(root, identity, write, accepts_any=False):
    """Writes a generated dataset to a folder, unless it is there already.

    The dataset appears under its name only when it is complete. Processes that ask for the same
    folder at the same time wait for the one that writes it.

    Args:
        root (str or Path): folder of the dataset: new, empty, or with this dataset in it.
        identity (dict): plain values that the dataset depends on. Its "kind" is the same for all
            datasets that can stand in for each other. The identity is kept in the folder.
        write (callable): called with a new folder to write to.
        accepts_any (bool): whether a dataset of the same kind with other parameters will do.

    Raises:
        InputError: `root` holds something else, or a dataset with another identity; or it cannot be
            written.
    """
    root = Path(root).expanduser().absolute()
    if _is_there(root, identity, accepts_any):
        return
    with explained_write_errors(root, _ADVICE), _locked(root):
        # Another process may have written it while this one waited for the lock.
        if _is_there(root, identity, accepts_any):
            return
        partial = root.with_name(root.name + ".partial")
        if partial.exists():  # left by a killed run; nobody else writes it while we hold the lock
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        write(partial)
        (partial / _MARKER).write_text(json.dumps(identity, indent=1) + "\n")
        if root.exists():
            root.rmdir()  # empty, or `_is_there` had refused
        partial.rename(root)


@contextlib.contextmanager
def _locked(root):
    lock = file_lock(str(root))
    try:
        lock.acquire()
    except AlreadyLocked:  # there are locks, and another process has had this one for an hour
        raise
    except LockException as error:
        raise InputError(
            f"{root} is on a file system without locks ({one_line(error)}): set DETECTRON2_DATASETS to "
            "a folder on a local disk."
        ) from error
    with lock:
        yield


def _is_there(root, identity, accepts_any):
    """Tells whether `root` holds the dataset; InputError if it holds something else."""
    # Before the identity is looked for: another process may rename the dataset to `root` meanwhile.
    taken = _is_taken(root)
    found = _identity_in(root)
    if found is not None:
        same_kind = found.get("kind") == identity["kind"]
        if found == identity or (accepts_any and same_kind):
            return True
        raise InputError(
            f"{root} holds a shapes dataset with other parameters "
            f"({_differences(found, identity)}): remove that folder or choose another one."
        )
    if taken:
        raise InputError(
            f"{root} exists and is not a shapes dataset: expected a new or an empty folder, so "
            "remove it or choose another one."
        )
    return False


def _is_taken(root):
    try:
        return any(root.iterdir())
    except FileNotFoundError:
        return False
    except NotADirectoryError:  # it is a file, or would be below one
        return root.exists()


def _identity_in(root):
    """The identity that is kept in a folder, or None if none can be read."""
    try:
        found = json.loads((root / _MARKER).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):  # of JSON and of the encoding
        return None
    return found if isinstance(found, dict) else None


def _differences(found, wanted):
    return ", ".join(
        f"{key} {found.get(key)}, not {value}"
        for key, value in wanted.items()
        if found.get(key) != value
    )
