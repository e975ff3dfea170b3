import pytest
import torch
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

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


def test_a_norm_with_two_parents_comes_back():
    norm = nn.BatchNorm2d(2)
    network = nn.Sequential(nn.Sequential(norm), nn.Sequential(norm))
    network[1].training = False
    with in_mode(network, False):
        pass
    assert norm.training and not network[1].training


class OnlyInTraining(nn.Module):
    def forward(self, x):
        return x + 1 if self.training else x


@pytest.mark.parametrize("of_extractor", [True, False])
@pytest.mark.parametrize("of_network", [True, False])
def test_what_train_does_beside_the_flag_comes_back_too(of_extractor, of_network):
    # torchvision's extractor has a graph for each mode, and train() changes it.
    extractor = create_feature_extractor(
        OnlyInTraining(),
        train_return_nodes={"add": "y"},
        eval_return_nodes={"x": "y"},
        suppress_diff_warning=True,
    )
    network = nn.Sequential(extractor).train(of_network)
    extractor.train(of_extractor)
    for training in (True, False):
        with in_mode(network, training):
            assert network(torch.zeros(1))["y"] == training
        assert (network.training, extractor.training) == (of_network, of_extractor)
        assert network(torch.zeros(1))["y"] == of_extractor
