"""Inception-v2 (BN-Inception), and the small Inception of the paper's ablations."""

from typing import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation as _Conv

__all__ = ["InceptionV2", "SmallInception"]


class _Branches(nn.ModuleList):
    """Concatenates the outputs of several branches, which take the same feature."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self], dim=1)


def _module(c_in: int, one: int, three: Sequence[int], double: Sequence[int], pool) -> _Branches:
    """An Inception module: 1x1; 1x1, 3x3; 1x1, 3x3, 3x3; and a pool with 1x1."""
    kind, c_pool = pool
    pooling = nn.MaxPool2d(3, 1, 1) if kind == "max" else nn.AvgPool2d(3, 1, 1)
    return _Branches(
        [
            _Conv(c_in, one, 1),
            nn.Sequential(_Conv(c_in, three[0], 1), _Conv(three[0], three[1], 3)),
            nn.Sequential(
                _Conv(c_in, double[0], 1),
                _Conv(double[0], double[1], 3),
                _Conv(double[1], double[1], 3),
            ),
            nn.Sequential(pooling, _Conv(c_in, c_pool, 1)),
        ]
    )


def _reduction(c_in: int, three: Sequence[int], double: Sequence[int]) -> _Branches:
    """An Inception module that halves height and width; its pool keeps the channels."""
    return _Branches(
        [
            nn.Sequential(_Conv(c_in, three[0], 1), _Conv(three[0], three[1], 3, 2)),
            nn.Sequential(
                _Conv(c_in, double[0], 1),
                _Conv(double[0], double[1], 3),
                _Conv(double[1], double[1], 3, 2),
            ),
            nn.MaxPool2d(3, 2, ceil_mode=True),
        ]
    )


class InceptionV2(nn.Module):
    """Inception-v2, which is BN-Inception (Ioffe & Szegedy, ICML 2015, Fig. 5), for 224 pixels.

    With 1000 classes it has 11.29M parameters, as in Table 2 of the paper. The first convolution is
    a full one. The widths of 4c to 4e are those of the released Caffe model. With the widths of the
    figure it would have 11.19M parameters.

    Args:
        num_classes: number of outputs of the linear layer.
    """

    def __init__(self, num_classes: int = 1000):
        super().__init__()
        self.stem = nn.Sequential(
            _Conv(3, 64, 7, 2),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            _Conv(64, 64, 1),
            _Conv(64, 192, 3),
            nn.MaxPool2d(3, 2, ceil_mode=True),
        )
        self.inception3 = nn.Sequential(
            _module(192, 64, (64, 64), (64, 96), ("avg", 32)),
            _module(256, 64, (64, 96), (64, 96), ("avg", 64)),
            _reduction(320, (128, 160), (64, 96)),
        )
        self.inception4 = nn.Sequential(
            _module(576, 224, (64, 96), (96, 128), ("avg", 128)),
            _module(576, 192, (96, 128), (96, 128), ("avg", 128)),
            _module(576, 160, (128, 160), (128, 160), ("avg", 128)),
            _module(608, 96, (128, 192), (160, 192), ("avg", 128)),
            _reduction(608, (128, 192), (192, 256)),
        )
        self.inception5 = nn.Sequential(
            _module(1056, 352, (192, 320), (160, 224), ("avg", 128)),
            _module(1024, 352, (192, 320), (192, 224), ("max", 128)),
        )
        self.fc = nn.Linear(1024, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes, shape (N, num_classes), of normalised images (N, 3, H, W)."""
        x = self.inception5(self.inception4(self.inception3(self.stem(x))))
        return self.fc(x.mean((2, 3)))


def _small_module(c_in: int, one: int, three: Sequence[int], five: Sequence[int], c_pool: int):
    return _Branches(
        [
            _Conv(c_in, one, 1),
            nn.Sequential(_Conv(c_in, three[0], 1), _Conv(three[0], three[1], 3)),
            nn.Sequential(_Conv(c_in, five[0], 1), _Conv(five[0], five[1], 5)),
            nn.Sequential(nn.MaxPool2d(3, 1, 1), _Conv(c_in, c_pool, 1)),
        ]
    )


class SmallInception(nn.Module):
    """The Inception of the paper's ablations on CIFAR and SVHN (Sec. 4.3.2), for 32 pixels.

    It has a convolution to 16 x 16 pixels, and three modules of GoogLeNet with 256, 480 and 512
    channels. The paper leaves open the size of the first filters (3 x 3 here) and the pooling in
    the modules (max-pooling here, as in GoogLeNet).

    Args:
        num_classes: number of outputs of the linear layer.
    """

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.features = nn.Sequential(
            _Conv(3, 32, 3, 2),
            _small_module(32, 64, (96, 128), (16, 32), 32),
            _small_module(256, 128, (128, 192), (32, 96), 64),
            _small_module(480, 192, (96, 208), (16, 48), 64),
        )
        self.fc = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes, shape (N, num_classes), of normalised images (N, 3, H, W)."""
        return self.fc(self.features(x).mean((2, 3)))
