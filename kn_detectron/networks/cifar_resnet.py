"""The ResNets for CIFAR, of 6n + 2 layers."""

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CifarResNet"]


def _conv(c_in: int, c_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)


def _with_zeros(x: Tensor, channels: int) -> Tensor:
    """x with more channels, half of them in front. They are 0: a shortcut without parameters."""
    return F.pad(x, (0, 0, 0, 0, channels // 2, channels - channels // 2)) if channels else x


class _Block(nn.Module):
    """Two convolutions with BatchNorm, and the ReLU behind the sum (He et al., CVPR 2016)."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.stride, self.new_channels = stride, c_out - c_in
        self.conv1, self.bn1 = _conv(c_in, c_out, stride), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = _conv(c_out, c_out), nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return F.relu(self.bn2(self.conv2(y)) + _with_zeros(shortcut, self.new_channels))


class _PreActivationBlock(nn.Module):
    """The same with norm and ReLU in front of the convolutions (He et al., ECCV 2016)."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.stride, self.new_channels = stride, c_out - c_in
        self.bn1, self.conv1 = nn.BatchNorm2d(c_in), _conv(c_in, c_out, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(c_out), _conv(c_out, c_out)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.bn1(x)))
        shortcut = F.avg_pool2d(x, self.stride)
        return self.conv2(F.relu(self.bn2(y))) + _with_zeros(shortcut, self.new_channels)


class CifarResNet(nn.Module):
    """Three stages of n blocks with 16, 32 and 64 channels, for images of 32 pixels.

    Shortcuts have no parameters. A shortcut that halves the size takes every second pixel. With
    ``preactivation`` it averages four pixels, as in the code released with the paper.

    Args:
        n: blocks per stage: 5 for ResNet-32, 18 for ResNet-110.
        num_classes: number of outputs of the linear layer.
        preactivation: whether norm and ReLU stand in front of the convolutions.
    """

    def __init__(self, n: int, num_classes: int = 10, preactivation: bool = False):
        super().__init__()
        self.conv1, self.bn1 = _conv(3, 16), nn.BatchNorm2d(16)
        block = _PreActivationBlock if preactivation else _Block
        stages, c_in = [], 16
        for c_out in (16, 32, 64):
            for i in range(n):
                stages.append(block(c_in, c_out, stride=2 if i == 0 and c_out > 16 else 1))
                c_in = c_out
        self.blocks = nn.Sequential(*stages)
        self.bn_last = nn.BatchNorm2d(64) if preactivation else None
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes, shape (N, num_classes), of normalised images (N, 3, H, W)."""
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        if self.bn_last is not None:
            x = F.relu(self.bn_last(x))
        return self.fc(x.mean((2, 3)))
