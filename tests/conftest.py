"""Settings for all tests."""

import pytest
import torch

# Tiny models gain nothing from a second thread, and lose a lot where the cores are shared.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
