"""Networks of timm, as those of torchvision."""

import pytest
import timm

from kn_detectron.checkpoint import fold_network
from kn_detectron.layers import convert_kalman_norm

from .networks import images, relative_error, trained
from .test_networks import check

NETWORKS = {
    "tf_efficientnet_lite0": 49,  # padding of TensorFlow, norms with activation
    "resnet50": 53,
    "mobilenetv2_050": 52,
    "efficientnet_b0": 49,  # squeeze and excitation
    "repvgg_a0": 61,  # norms behind a sum
    "resnetv2_50": 49,  # norms in front of convolutions
}


@pytest.mark.parametrize("name", NETWORKS)
def test_at_gain_0_it_is_the_frozen_network(name, caplog):
    check(lambda: timm.create_model(name), NETWORKS[name], 32, caplog)


def test_folding_gives_its_norms_with_activation_back():
    original = trained(timm.create_model("tf_efficientnet_lite0"))
    state = original.state_dict()
    classes = [type(module) for module in original.modules()]
    network = convert_kalman_norm(original)
    folded = fold_network(network)
    assert [type(module) for module in folded.modules()] == classes
    assert list(folded.state_dict()) == list(state)
    assert relative_error(folded(images()), network.eval()(images())) < 1e-5
