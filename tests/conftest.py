"""Settings for all tests."""

import pytest
import torch

from kn_detectron.compat import NOTICES


def pytest_configure(config):
    """Filters what the commands filter too; pyproject.toml has the rest."""
    for message, module in NOTICES:
        config.addinivalue_line("filterwarnings", f"ignore:{message}::{module}")


@pytest.fixture(autouse=True)
def _seeded():
    # Not torch.manual_seed, which prints its stack for a GPU that may come: 1 ms in every test.
    torch.default_generator.manual_seed(0)
