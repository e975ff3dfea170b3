"""Backbones and heads for detectron2."""

from .chain import ChainConfig, ChainConv2d, Feature, Features
from .resnet import (
    KNBasicBlock,
    KNBasicStem,
    KNBottleneckBlock,
    KNResNet,
    build_kn_resnet_backbone,
    build_kn_resnet_fpn_backbone,
)
from .roi_heads import KNRes5ROIHeads

__all__ = [
    "ChainConfig",
    "ChainConv2d",
    "Feature",
    "Features",
    "KNBasicBlock",
    "KNBasicStem",
    "KNBottleneckBlock",
    "KNRes5ROIHeads",
    "KNResNet",
    "build_kn_resnet_backbone",
    "build_kn_resnet_fpn_backbone",
]
