"""Settings for all tests."""

import os

import pytest
import torch

# Tiny models gain nothing from a second thread, and lose a lot where the cores are shared. Here and
# in the processes that tests start; who wants more, sets the variable.
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
