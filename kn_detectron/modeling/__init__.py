"""Backbones and heads for detectron2."""

from .chain import ChainConfig, ChainConv2d
from .features import Feature, Features
from .fpn import (
    KNFPN,
    build_kn_network_fpn_backbone,
    build_kn_resnet_fpn_backbone,
    build_kn_retinanet_resnet_fpn_backbone,
)
from .heads import KNFastRCNNConvFCHead, KNMaskRCNNConvUpsampleHead
from .network import KNNetwork, PlainNetwork, build_kn_network_backbone
from .poolers import BeliefPooler
from .resnet import (
    KNBasicBlock,
    KNBasicStem,
    KNBottleneckBlock,
    KNResNet,
    build_kn_resnet_backbone,
)
from .retinanet import KNRetinaNet, KNRetinaNetHead
from .roi_heads import KNCascadeROIHeads, KNRes5ROIHeads, KNStandardROIHeads

__all__ = [
    "BeliefPooler",
    "ChainConfig",
    "ChainConv2d",
    "Feature",
    "Features",
    "KNBasicBlock",
    "KNBasicStem",
    "KNBottleneckBlock",
    "KNCascadeROIHeads",
    "KNFPN",
    "KNFastRCNNConvFCHead",
    "KNMaskRCNNConvUpsampleHead",
    "KNNetwork",
    "KNRes5ROIHeads",
    "KNResNet",
    "KNRetinaNet",
    "KNRetinaNetHead",
    "KNStandardROIHeads",
    "PlainNetwork",
    "build_kn_network_backbone",
    "build_kn_network_fpn_backbone",
    "build_kn_resnet_backbone",
    "build_kn_resnet_fpn_backbone",
    "build_kn_retinanet_resnet_fpn_backbone",
]
