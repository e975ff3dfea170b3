import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kn_detectron import InputError
from kn_detectron.layers import (
    ClosedFormTransition,
    MonteCarloTransition,
    convert_kalman_norm,
    kalman_layers,
    set_gain_scale,
)
from kn_detectron.networks import NETWORKS, CifarResNet, build_network

from ..layers.convert.networks import images, relative_error, trained


def millions(network):
    return round(sum(p.numel() for p in network.parameters()) / 1e6, 2)


def test_parameters_of_inception_v2_are_those_of_table_2():
    network = build_network("inception_v2", 1000)
    assert millions(network) == 11.29
    assert millions(convert_kalman_norm(network, variant="paper")) == 11.30


@pytest.mark.parametrize("n, layers", [(5, 32), (18, 110)])
@pytest.mark.parametrize("suffix", ["", "_preactivation"])
def test_depth_of_the_cifar_resnets(n, layers, suffix):
    network = build_network(f"cifar_resnet{layers}{suffix}", 10)
    weights = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(weights) == layers == 6 * n + 2
    # He et al. give 0.46M and 1.7M.
    assert millions(network) == {32: 0.46, 110: 1.73}[layers]


@torch.no_grad()
@pytest.mark.parametrize("preactivation", [False, True])
def test_shortcuts_of_the_cifar_resnets(preactivation):
    """With residual branches of 0 they are what is left: every second pixel or the average of four,
    and zeros on both sides of the channels."""
    network = CifarResNet(2, 10, preactivation).eval()
    for block in network.blocks:
        last = block.conv2 if preactivation else block.bn2
        nn.init.zeros_(last.weight)
    x = images(2)
    y = F.relu(network.bn1(network.conv1(x)))
    for zeros in (8, 16):
        y = F.avg_pool2d(y, 2) if preactivation else y[:, :, ::2, ::2]
        side = torch.zeros_like(y[:, :1]).expand(-1, zeros, -1, -1)
        y = torch.cat([side, y, side], 1)
    y = F.relu(network.bn_last(y)) if preactivation else y
    torch.testing.assert_close(network(x), network.fc(y.mean((2, 3))))


def test_pooling_and_sizes_of_inception_v2():
    """As in the figure of its paper: the modules average, but the last one and the reductions."""
    network = build_network("inception_v2", 10)
    kinds = [
        (type(m).__name__[:3], m.stride)
        for m in network.modules()
        if isinstance(m, (nn.MaxPool2d, nn.AvgPool2d))
    ]
    average, maximum, halved = ("Avg", 1), ("Max", 1), ("Max", 2)
    stages = [halved, halved], [average] * 2 + [halved], [average] * 4 + [halved]
    assert kinds == [*itertools.chain(*stages), average, maximum]
    x, shapes = images(1, 224), []
    for stage in (network.stem, network.inception3, network.inception4, network.inception5):
        x = stage(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(192, 28, 28), (576, 14, 14), (1056, 7, 7), (1024, 7, 7)]


def test_the_small_inception_has_the_widths_of_the_paper():
    network = build_network("small_inception", 10)
    x, shapes = images(2), []
    for module in network.features:
        x = module(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(32, 16, 16), (256, 16, 16), (480, 16, 16), (512, 16, 16)]


SMALL = [name for name in NETWORKS if "110" not in name]


@pytest.mark.parametrize("name", SMALL)
def test_at_gain_0_they_are_the_frozen_networks(name, caplog):
    original = trained(build_network(name, 10)).double()  # deep networks amplify rounding
    x = images().double()
    with torch.no_grad():
        want = original.eval()(x)
        network = convert_kalman_norm(original)
        assert not caplog.records
        set_gain_scale(network, 0.0)
        assert relative_error(network.train()(x), want) < 1e-4


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("transition", [ClosedFormTransition(), MonteCarloTransition()])
def test_the_paper_variant_trains(name, transition):
    """With the released constants: gain 0.1 that is not learned, no R, sampled priors."""
    network = convert_kalman_norm(
        build_network(name, 10),
        variant="paper",
        learn_gain=False,
        process_model=False,
        transition=transition,
    )
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(kalman_layers(network)) == len(norms) - 1
    y = network.train()(images())
    assert y.shape == (2, 10)
    y.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("name", ["resnet18", "googlenet", "timm/tf_efficientnet_lite0"])
def test_networks_of_libraries(name):
    assert build_network(name, 7).train()(images(2, 64)).shape == (2, 7)


@pytest.mark.parametrize(
    "name, why",
    [
        ("resnet17", "There is no network 'resnet17': give one of cifar_resnet14, .*timm/<name>"),
        ("timm/resnet17", "timm has no network 'resnet17': .*such as "),
        ("maskrcnn_resnet50_fpn", "There is no network"),
    ],
)
def test_unknown_names_are_a_sentence(name, why):
    with pytest.raises(InputError, match=why):
        build_network(name, 10)
