"""Settings for all tests."""

import logging

import pytest
import torch

from detectron2.utils.logger import setup_logger

from kn_detectron.compat import NOTICES


def pytest_configure(config):
    """Filters what the commands filter too; pyproject.toml has the rest."""
    for message, module in NOTICES:
        config.addinivalue_line("filterwarnings", f"ignore:{message}::{module}")


@pytest.fixture(autouse=True)
def _seeded():
    # Not torch.manual_seed, which prints its stack for a GPU that may come: 1 ms in every test.
    torch.default_generator.manual_seed(0)


@pytest.fixture(autouse=True)
def _fresh_logs():
    """Takes back the logging that a test set up, since its standard output is gone after it."""
    yield
    for name in ("detectron2", "fvcore", "kn_detectron"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.setLevel(logging.NOTSET)
        logger.propagate = True
    setup_logger.cache_clear()
