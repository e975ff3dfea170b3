"""A log on a full disk: one line, and no traceback."""

import contextlib
import logging
from pathlib import Path

import pytest

from kn_detectron.engine.logs import full_disk_told_once

FULL = Path("/dev/full")  # each write to it finds the disk full


@pytest.fixture
def full():
    stream = open(FULL, "w")
    yield stream
    with contextlib.suppress(OSError):  # of what it could not write
        stream.close()


def _logger(stream=None):
    logger = logging.Logger("log of a test")
    logger.addHandler(logging.StreamHandler(stream))
    return logger


@pytest.mark.skipif(not FULL.exists(), reason="only Linux has such a file")
def test_it_is_told_once(full, capsys):
    logger = _logger(full)
    with full_disk_told_once():
        for step in range(3):
            logger.warning("step %d", step)
    told = "The log /dev/full cannot be written (No space left on device).\n"
    assert capsys.readouterr().err == told
    logger.warning("outside")
    assert "Traceback" in capsys.readouterr().err


def test_other_errors_are_logged_as_ever(capsys):
    logger = _logger()
    with full_disk_told_once():
        logger.warning("two %d %d", 1)
    assert "not enough arguments" in capsys.readouterr().err
