"""Small real models and inputs for the tests, through detectron2's configs."""

from pathlib import Path

import detectron2
import numpy as np
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from detectron2.structures import Boxes, Instances, PolygonMasks

import kn_detectron


def detectron2_configs():
    """The folder of detectron2's own configs."""
    package = Path(detectron2.__file__).parent
    configs = package / "model_zoo" / "configs"
    return configs if configs.is_dir() else package.parent / "configs"  # of a clone, not installed


def resnet_cfg(norm="KN", **overrides):
    """A config of a slim ResNet-50 without frozen stages; ``A__B=v`` overrides A.B."""
    cfg = get_cfg()
    kn_detectron.add_kn_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.NORM = norm
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 8
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 16
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 4
    cfg.MODEL.KN.NUM_GROUPS = 4
    if norm in ("KN", "GKN"):
        cfg.MODEL.BACKBONE.NAME = "build_kn_resnet_backbone"
        cfg.MODEL.ROI_HEADS.NAME = "KNRes5ROIHeads"
    else:
        cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
        cfg.MODEL.ROI_HEADS.NAME = "Res5ROIHeads"
    for key, value in overrides.items():
        *nodes, leaf = key.split("__")
        node = cfg
        for name in nodes:
            node = node[name]
        assert leaf in node, key
        node[leaf] = value
    return cfg


def rcnn_cfg(norm="KN", **overrides):
    """:func:`resnet_cfg` for Mask R-CNN C4 with few proposals and regions."""
    few = dict(
        MODEL__MASK_ON=True,
        MODEL__ROI_HEADS__NUM_CLASSES=5,
        MODEL__ROI_HEADS__BATCH_SIZE_PER_IMAGE=8,
        MODEL__RPN__BATCH_SIZE_PER_IMAGE=16,
        MODEL__RPN__PRE_NMS_TOPK_TRAIN=50,
        MODEL__RPN__POST_NMS_TOPK_TRAIN=20,
        MODEL__RPN__PRE_NMS_TOPK_TEST=50,
        MODEL__RPN__POST_NMS_TOPK_TEST=10,
        MODEL__ROI_MASK_HEAD__CONV_DIM=16,
        MODEL__ANCHOR_GENERATOR__SIZES=[[16, 32, 64]],
    )
    return resnet_cfg(norm, **{**few, **overrides})


def fpn_rcnn_cfg(norm="KN", **overrides):
    """:func:`rcnn_cfg` for Mask R-CNN R18-FPN, with the norm in the backbone, the FPN and both heads."""
    stages, levels = ["res2", "res3", "res4", "res5"], ["p2", "p3", "p4", "p5"]
    prefix = "KN" if norm in ("KN", "GKN") else ""
    backbone = "build_kn_resnet_fpn_backbone" if prefix else "build_resnet_fpn_backbone"
    fpn = dict(
        MODEL__BACKBONE__NAME=backbone,
        MODEL__RESNETS__DEPTH=18,
        MODEL__RESNETS__RES2_OUT_CHANNELS=64,
        MODEL__RESNETS__OUT_FEATURES=stages,
        MODEL__FPN__IN_FEATURES=stages,
        MODEL__FPN__OUT_CHANNELS=16,
        MODEL__FPN__NORM=norm,
        MODEL__ANCHOR_GENERATOR__SIZES=[[16], [24], [32], [48], [64]],
        MODEL__RPN__IN_FEATURES=[*levels, "p6"],
        MODEL__ROI_HEADS__NAME=prefix + "StandardROIHeads",
        MODEL__ROI_HEADS__IN_FEATURES=levels,
        MODEL__ROI_BOX_HEAD__NAME=prefix + "FastRCNNConvFCHead",
        MODEL__ROI_BOX_HEAD__POOLER_RESOLUTION=7,
        MODEL__ROI_BOX_HEAD__NORM=norm,
        MODEL__ROI_BOX_HEAD__NUM_CONV=2,
        MODEL__ROI_BOX_HEAD__CONV_DIM=16,
        MODEL__ROI_BOX_HEAD__NUM_FC=1,
        MODEL__ROI_BOX_HEAD__FC_DIM=32,
        MODEL__ROI_MASK_HEAD__NAME=prefix + "MaskRCNNConvUpsampleHead",
        MODEL__ROI_MASK_HEAD__NORM=norm,
        MODEL__ROI_MASK_HEAD__NUM_CONV=2,
    )
    return rcnn_cfg(norm, **{**fpn, **overrides})


def retinanet_cfg(norm="KN", **overrides):
    """A config of RetinaNet R18-FPN, with the norm in the backbone, the FPN and the towers."""
    stages = ["res3", "res4", "res5"]
    with_beliefs = norm in ("KN", "GKN")
    backbone = f"build_{'kn_' if with_beliefs else ''}retinanet_resnet_fpn_backbone"
    retinanet = dict(
        MODEL__META_ARCHITECTURE="KNRetinaNet" if with_beliefs else "RetinaNet",
        MODEL__BACKBONE__NAME=backbone,
        MODEL__RESNETS__OUT_FEATURES=stages,
        MODEL__FPN__IN_FEATURES=stages,
        MODEL__RETINANET__NORM=norm,
        MODEL__RETINANET__NUM_CLASSES=5,
        MODEL__RETINANET__NUM_CONVS=2,
        MODEL__RETINANET__SCORE_THRESH_TEST=0.0,
        MODEL__RETINANET__TOPK_CANDIDATES_TEST=50,
    )
    return fpn_rcnn_cfg(norm, **{**retinanet, **overrides})


def build_backbone(cfg, seed=0):
    torch.manual_seed(seed)
    return BACKBONE_REGISTRY.get(cfg.MODEL.BACKBONE.NAME)(cfg, ShapeSpec(channels=3))


def build_rcnn(cfg, seed=0):
    torch.manual_seed(seed)
    return build_model(cfg)


def randomize(module, seed=0):
    """Parameters and statistics as after some training, so that no term hides behind 0 or 1."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.dim() <= 1:
                p.add_(torch.randn(p.shape, generator=g) * 0.1)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(torch.randn(buffer.shape, generator=g) * 0.1)
            elif name.endswith("running_var"):
                buffer.mul_(torch.rand(buffer.shape, generator=g) + 0.5)
    return module


def images(n=2, size=64, seed=0):
    """Normalised images as a backbone gets them, shape (n, 3, size, size)."""
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 50


def rcnn_inputs(n=2, size=96, objects=1, seed=0):
    """Inputs of a detectron2 R-CNN in training: ``objects`` rectangles on each of n images."""
    inputs = []
    for i in range(n):
        g = torch.Generator().manual_seed(seed + i)
        instances = Instances((size, size))
        corner = torch.rand(objects, 2, generator=g) * size * 0.4
        boxes = torch.cat([corner, corner + size * 0.4], dim=1)
        instances.gt_boxes = Boxes(boxes)
        instances.gt_classes = torch.arange(objects) % 5
        instances.gt_masks = PolygonMasks(
            [[np.array([x0, y0, x1, y0, x1, y1, x0, y1])] for x0, y0, x1, y1 in boxes.tolist()]
        )
        image = (torch.rand(3, size, size, generator=g) * 255).to(torch.uint8)
        inputs.append(dict(image=image, instances=instances, height=size, width=size))
    return inputs
