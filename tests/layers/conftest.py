"""What the tests of the layers share."""

import pytest
import torch


@pytest.fixture
def x():
    return torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(1)) * 2 + 0.7
