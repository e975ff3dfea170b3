"""What detectron2 calls its own version of the backbones, heads and models of this package."""

STOCK_NAMES = {
    "build_kn_resnet_backbone": "build_resnet_backbone",
    "build_kn_resnet_fpn_backbone": "build_resnet_fpn_backbone",
    "build_kn_retinanet_resnet_fpn_backbone": "build_retinanet_resnet_fpn_backbone",
    "KNCascadeROIHeads": "CascadeROIHeads",
    "KNFastRCNNConvFCHead": "FastRCNNConvFCHead",
    "KNMaskRCNNConvUpsampleHead": "MaskRCNNConvUpsampleHead",
    "KNRes5ROIHeads": "Res5ROIHeads",
    "KNRetinaNet": "RetinaNet",
    "KNStandardROIHeads": "StandardROIHeads",
}
