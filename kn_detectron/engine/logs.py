"""Logs that cannot be written."""

import contextlib
import logging
import sys

from ..files import is_full_disk

__all__ = ["full_disk_told_once"]


@contextlib.contextmanager
def full_disk_told_once():
    """Context in which one line tells that the disk of a log is full.

    Without it, logging prints a traceback for each line that it cannot write.
    """
    former, told = logging.Handler.handleError, set()

    def handle_error(handler, record):
        error = sys.exc_info()[1]
        if not is_full_disk(error):
            former(handler, record)
            return
        name = getattr(getattr(handler, "stream", None), "name", "")
        if name not in told:
            told.add(name)
            with contextlib.suppress(OSError):  # of stderr, which may be on the same disk
                print(f"The log {name} cannot be written ({error.strerror}).", file=sys.stderr)

    logging.Handler.handleError = handle_error
    try:
        yield
    finally:
        logging.Handler.handleError = former
