"""A small network that does what many do, with statistics."""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import FrozenBatchNorm2d


class Block(nn.Module):
    """A residual block with two branches that are concatenated."""

    def __init__(self, channels, norm):
        super().__init__()
        half = channels // 2
        self.conv1, self.bn1 = nn.Conv2d(channels, half, 3, padding=1, bias=False), norm(half)
        self.conv2, self.bn2 = nn.Conv2d(channels, half, 1, bias=False), norm(half)
        self.conv3, self.bn3 = nn.Conv2d(channels, channels, 1, groups=2), norm(channels)

    def forward(self, x):
        y = torch.cat([F.relu(self.bn1(self.conv1(x))), F.silu(self.bn2(self.conv2(x)))], 1)
        y = self.bn3(self.conv3(y))
        y += x
        return F.relu6(y, inplace=True)


class Branchy(nn.Module):
    """Stem, block, and a last convolution; 32 pixels and more."""

    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.note = "kept"
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, bias=False), norm(8), nn.ReLU(inplace=True), nn.MaxPool2d(2)
        )
        self.block = Block(8, norm)
        self.last = nn.Sequential(nn.Conv2d(8, 4, 3), norm(4), nn.ReLU())

    def forward(self, x):
        return self.last(self.block(self.stem(x)))


def images(n=2, size=32, seed=0):
    """Smooth images, of mean 0 and deviation 1 on average."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, 3, size // 4, size // 4, generator=g)
    fine = torch.randn(n, 3, size, size, generator=g)
    return F.interpolate(coarse, size=(size, size), mode="bilinear") + 0.3 * fine


def trained(network, size=32, batches=2, n=8):
    """The network with the statistics of some batches, and scales and shifts as after training."""
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = None  # the average
            norm.weight.mul_(torch.rand_like(norm.weight) + 0.5)
            norm.bias.add_(0.2 * torch.randn_like(norm.bias))
        network.train()
        for seed in range(batches):
            network(images(n, size, seed=100 + seed))
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    return network


def frozen_statistics(network, name):
    """The network with one BatchNorm frozen."""
    norm = network.get_submodule(name)
    frozen = FrozenBatchNorm2d(norm.num_features, norm.eps)
    frozen.load_state_dict(norm.state_dict())
    network.set_submodule(name, frozen)
    return network


def relative_error(got, want):
    return ((got - want).abs().max() / want.abs().max()).item()
