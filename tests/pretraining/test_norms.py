"""Batch Renormalization and weight normalization."""

import math

import pytest
import torch
from detectron2.layers import Conv2d
from torch import nn

from kn_detectron.networks import CifarResNet
from kn_detectron.pretraining.norms import BatchRenorm2d, apply_weight_norm, replace_batch_norms

from ..models import build_backbone, images, resnet_cfg


def _trained(norm, done=0):
    """A norm after ``done`` steps, with statistics and parameters that are not 0 and 1."""
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.2, 3.0)
        norm.weight.normal_(1.0, 0.3)
        norm.bias.normal_()
        norm.num_batches_tracked.fill_(done)
    return norm.double()


def _plain(norm, x, r_max, d_max):
    """Equations of the paper, micro-batch by micro-batch."""
    outputs = []
    column = lambda v: v[:, None, None]  # noqa: E731
    for part in x.split(norm.norm_batch_size or len(x)):
        mean = part.mean((0, 2, 3))
        std = (part.var((0, 2, 3), unbiased=False) + norm.eps).sqrt()
        moving = (norm.running_var + norm.eps).sqrt()
        r = (std / moving).clamp(1 / r_max, r_max).detach()
        d = ((mean - norm.running_mean) / moving).clamp(-d_max, d_max).detach()
        y = (part - column(mean)) / column(std) * column(r) + column(d)
        outputs.append(y * column(norm.weight) + column(norm.bias))
    return torch.cat(outputs)


@pytest.mark.parametrize("norm_batch_size", [None, 2, 1])
@pytest.mark.parametrize(
    "done, r_max, d_max",
    [(0, 1, 0), (5, 1, 0), (15, 1 + 2 / 3.5, 2.5), (25, 15 / 7, 5), (90, 3, 5)],
)
def test_batch_renorm(norm_batch_size, done, r_max, d_max):
    norm = _trained(BatchRenorm2d(3, steps=100, norm_batch_size=norm_batch_size), done)
    x = (2 * torch.randn(6, 3, 4, 5).double() + 1).requires_grad_()
    leaves = (x, norm.weight, norm.bias)
    expected = _plain(norm, x, r_max, d_max)
    weights = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), leaves)
    y = norm(x)
    # The limits are float32.
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    for got, wanted in zip(torch.autograd.grad((y * weights).sum(), leaves), expected_gradients):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


def test_batch_renorm_within_its_limits_is_the_moving_normalization():
    norm = _trained(BatchRenorm2d(3, steps=10), done=10)
    with torch.no_grad():
        norm.running_mean.fill_(0.3)
        norm.running_var.fill_(1.4)
    x = torch.randn(4, 3, 6, 6).double()
    norm.eval()
    moving = norm(x)
    torch.testing.assert_close(norm.train()(x), moving)


@pytest.mark.parametrize("norm_batch_size", [None, 2])
def test_moving_statistics_are_batch_norms_averaged_over_groups(norm_batch_size):
    norm = _trained(BatchRenorm2d(3, steps=10, norm_batch_size=norm_batch_size))
    x = torch.randn(4, 3, 6, 6).double()
    parts = []
    for part in x.split(norm_batch_size or 4):
        reference = nn.BatchNorm2d(3).double()
        reference.load_state_dict(norm.state_dict())
        reference(part)
        parts.append(reference.state_dict())
    norm(x)
    for name in ("running_mean", "running_var"):
        mean = torch.stack([part[name] for part in parts]).mean(0)
        torch.testing.assert_close(getattr(norm, name), mean)
    assert norm.num_batches_tracked == 1


def test_batch_renorm_without_moving_statistics_is_batch_norm():
    norm = _trained(BatchRenorm2d(3, steps=10), done=10)
    reference = nn.BatchNorm2d(3).double()
    reference.load_state_dict(norm.state_dict())
    before = norm.running_mean.clone()
    norm.track_running_stats = False
    x = torch.randn(4, 3, 6, 6).double()
    torch.testing.assert_close(norm(x), reference(x))
    assert torch.equal(norm.running_mean, before) and norm.num_batches_tracked == 10


def test_replacing_reaches_every_batch_norm_and_nothing_else():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(4), nn.GroupNorm(1, 4)))
    replace_batch_norms(model, lambda norm: BatchRenorm2d(norm.num_features, steps=1))
    assert [type(m).__name__ for m in model.modules() if not list(m.children())] == [
        "BatchRenorm2d",
        "BatchRenorm2d",
        "GroupNorm",
    ]
    assert (model[0].num_features, model[1][0].num_features) == (3, 4)


def test_replacing_keeps_scale_and_shift_where_there_are_any():
    plain, scaled = nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3)
    nn.init.zeros_(scaled.weight)
    nn.init.ones_(scaled.bias)
    model = nn.Sequential(plain, scaled)
    replace_batch_norms(model, lambda norm: BatchRenorm2d(norm.num_features, steps=1))
    assert model[0].weight.tolist() == [1, 1, 1] and model[0].bias.tolist() == [0, 0, 0]
    assert model[1].weight.tolist() == [0, 0, 0] and model[1].bias.tolist() == [1, 1, 1]


def _without_norms(depth=50):
    wide = dict(MODEL__RESNETS__RES2_OUT_CHANNELS=64) if depth < 50 else {}
    cfg = resnet_cfg("BN", MODEL__RESNETS__NORM="", MODEL__RESNETS__DEPTH=depth, **wide)
    cfg.MODEL.RESNETS.OUT_FEATURES = ["stem", "res2", "res3", "res4", "res5"]
    backbone = build_backbone(cfg)
    apply_weight_norm(backbone)
    return backbone


@pytest.mark.parametrize("depth, branches", [(18, 8), (50, 16)])
def test_weight_norm_is_in_every_convolution(depth, branches):
    backbone = _without_norms(depth)
    convs = {n: m for n, m in backbone.named_modules() if isinstance(m, Conv2d)}
    norms = {}
    for name, conv in convs.items():
        assert conv.bias.shape == (conv.out_channels,) and conv.bias.requires_grad
        length = conv.weight.flatten(1).norm(dim=1)
        torch.testing.assert_close(length, length[:1].expand_as(length))
        norms[name] = length[0].item()
    assert norms.pop("stem.conv1") == pytest.approx(1)
    last = "conv2" if depth < 50 else "conv3"
    ends = [norms.pop(name) for name in list(norms) if name.endswith(last)]
    assert ends == pytest.approx([math.sqrt(2 / branches)] * branches)
    assert list(norms.values()) == pytest.approx([math.sqrt(2)] * len(norms))


@pytest.mark.parametrize("preactivation", [False, True])
def test_weight_norm_takes_the_place_of_the_batch_norms_of_a_cifar_resnet(preactivation):
    network = CifarResNet(5, preactivation=preactivation)
    apply_weight_norm(network)
    assert not [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    length = lambda conv: conv.weight.flatten(1).norm(dim=1).mean().item()  # noqa: E731
    assert length(network.conv1) == pytest.approx(1)
    for block in network.blocks:
        assert length(block.conv1) == pytest.approx(math.sqrt(2))
        assert length(block.conv2) == pytest.approx(math.sqrt(2 / 15))
    features = network.blocks(network.conv1(torch.randn(4, 3, 32, 32)))
    # Over 15 blocks a plain initialisation would be off by some powers of ten.
    assert 0.2 < features.square().mean().sqrt() < 5


def test_weight_norm_keeps_the_scale_of_features():
    features = _without_norms()(images() / 50)
    for name in ("res2", "res3", "res4", "res5"):
        # Over 16 blocks a plain initialisation would be off by some powers of ten.
        assert 0.2 < features[name].square().mean().sqrt() < 5, name


def test_weight_norm_learns_direction_and_length_apart():
    conv = _without_norms().res3[0].conv2
    before = conv.weight.detach().clone()
    with torch.no_grad():
        conv.parametrizations.weight.original1 *= 7
        torch.testing.assert_close(conv.weight, before)
        conv.parametrizations.weight.original0 *= 2
        torch.testing.assert_close(conv.weight, 2 * before)
