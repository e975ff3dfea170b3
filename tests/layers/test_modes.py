import pytest
from torch import nn

from kn_detectron.layers.modes import in_mode


@pytest.mark.parametrize("training", [True, False])
def test_every_module_gets_the_mode_and_comes_back(training):
    network = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2))
    network[0].eval()
    with pytest.raises(KeyError):
        with in_mode(network, training):
            assert {module.training for module in network.modules()} == {training}
            raise KeyError
    assert [module.training for module in network.modules()] == [True, False, True]
