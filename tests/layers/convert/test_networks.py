"""Networks of torchvision: at gain 0 each is its frozen self, after calibration."""

import copy

import pytest
import torch
from torch import nn
from torchvision import models
from torchvision.ops import StochasticDepth

from kn_detectron.checkpoint import calibrate
from kn_detectron.layers import (
    KN_STATE,
    KalmanNorm2d,
    convert_kalman_norm,
    kalman_layers,
    set_gain_scale,
)

from .networks import images, relative_error, trained

# How it is made, how many norms it has, and the side of the images.
NETWORKS = {
    "resnet18": (models.resnet18, 20, 32),
    "resnet50": (models.resnet50, 53, 32),
    "resnext50": (models.resnext50_32x4d, 53, 32),
    "googlenet": (lambda: models.googlenet(init_weights=False), 59, 64),
    "googlenet of other pixels": (
        lambda: models.googlenet(init_weights=False, aux_logits=False, transform_input=True),
        57,
        64,
    ),
    "inception_v3": (lambda: models.inception_v3(init_weights=False, aux_logits=False), 94, 75),
    "densenet121": (models.densenet121, 121, 32),
    "mobilenet_v2": (models.mobilenet_v2, 52, 32),
    "mobilenet_v3_small": (models.mobilenet_v3_small, 34, 32),
    "shufflenet_v2": (models.shufflenet_v2_x0_5, 56, 32),
    "mnasnet": (models.mnasnet0_5, 52, 32),
    "regnet_x": (models.regnet_x_400mf, 71, 32),
    "regnet_y": (models.regnet_y_400mf, 53, 32),
    "efficientnet_b0": (models.efficientnet_b0, 49, 32),
    "vgg16_bn": (lambda: models.vgg.make_layers(models.vgg.cfgs["D"], batch_norm=True), 13, 32),
}


def main_output(y):
    return y[0] if isinstance(y, tuple) else y


def without_noise(network):
    """Has everything in evaluation that draws random numbers."""
    for module in network.modules():
        if isinstance(module, (nn.Dropout, StochasticDepth)):
            module.eval()


def check(build, norms, size, caplog):
    """What holds for every network."""
    # In double precision, because a deep network amplifies rounding, some a thousand times.
    original = trained(build(), size).double()
    network = convert_kalman_norm(copy.deepcopy(original))
    own = {key for key in network.state_dict() if key.rpartition(".")[2] in KN_STATE}
    assert set(network.state_dict()) - own == set(original.state_dict())
    assert len(kalman_layers(network)) == norms and not caplog.records  # all have a prior
    calibrate(network.double())  # the priors too
    x = images(2, size).double()
    with torch.no_grad():
        want = original.eval()(x)
        assert torch.equal(network.eval()(x), want)
        set_gain_scale(network, 0.0)
        without_noise(network.train())
        assert relative_error(main_output(network(x)), want) < 1e-8

    set_gain_scale(network, 1.0)
    outputs = network.train()(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum(y.square().mean() for y in outputs if y is not None).backward()
    for key, p in network.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), key


@pytest.mark.parametrize("name", NETWORKS)
def test_at_gain_0_it_is_the_frozen_network(name, caplog):
    check(*NETWORKS[name], caplog)
