"""detectron2's other kinds of models, from its own configs, with KN in their backbone."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.structures import Keypoints

import kn_detectron
from kn_detectron.checkpoint import KNCheckpointer
from kn_detectron.layers import kalman_layers

from ..models import build_rcnn, detectron2_configs, randomize, rcnn_inputs
from .test_roi_heads import train_step

_NAMES = {
    "build_resnet_backbone": "build_kn_resnet_backbone",
    "build_resnet_fpn_backbone": "build_kn_resnet_fpn_backbone",
}

_SLIM = dict(
    MODEL__DEVICE="cpu",
    MODEL__WEIGHTS="",
    MODEL__PIXEL_STD=[57.375, 57.12, 58.395],
    MODEL__RESNETS__STEM_OUT_CHANNELS=8,
    MODEL__RESNETS__RES2_OUT_CHANNELS=16,
    MODEL__RESNETS__WIDTH_PER_GROUP=4,
    MODEL__FPN__OUT_CHANNELS=16,
    MODEL__ROI_HEADS__BATCH_SIZE_PER_IMAGE=8,
    MODEL__ROI_HEADS__SCORE_THRESH_TEST=0.0,
    MODEL__ROI_BOX_HEAD__FC_DIM=16,
    MODEL__ROI_MASK_HEAD__CONV_DIM=16,
    MODEL__ROI_KEYPOINT_HEAD__CONV_DIMS=[16],
    MODEL__SEM_SEG_HEAD__CONVS_DIM=32,
    MODEL__RPN__PRE_NMS_TOPK_TEST=50,
    MODEL__RPN__POST_NMS_TOPK_TEST=10,
    MODEL__RPN__POST_NMS_TOPK_TRAIN=20,
)


def config(name, kalman):
    cfg = get_cfg()
    kn_detectron.add_kn_config(cfg)
    cfg.merge_from_file(str(detectron2_configs() / name))
    cfg.merge_from_list([x for key, v in _SLIM.items() for x in (key.replace("__", "."), v)])
    if kalman:
        cfg.MODEL.BACKBONE.NAME = _NAMES[cfg.MODEL.BACKBONE.NAME]
        cfg.MODEL.RESNETS.NORM = "KN"
        cfg.MODEL.KN.GAIN, cfg.MODEL.KN.LEARN_GAIN = 0.0, False
    return cfg


def inputs():
    found = rcnn_inputs(objects=2)
    for item in found:
        instances, (height, width) = item["instances"], item["instances"].image_size
        centers = instances.gt_boxes.get_centers()[:, None].expand(-1, 17, -1)
        instances.gt_keypoints = Keypoints(torch.cat([centers, torch.full((2, 17, 1), 2.0)], 2))
        item["sem_seg"] = torch.arange(height * width).view(height, width) % 4
    return found


def outputs(model, given):
    """All tensors that a model finds, in order."""
    with torch.no_grad():
        found = [sorted(item.items()) for item in model.eval()(given)]

    def tensors(value):
        if isinstance(value, torch.Tensor):
            yield value.float()
        elif hasattr(value, "get_fields"):
            for part in value.get_fields().values():
                yield from tensors(part)
        elif hasattr(value, "tensor"):
            yield value.tensor
        elif isinstance(value, (list, tuple)):
            for part in value:
                yield from tensors(part)

    return list(tensors(found))


@pytest.mark.parametrize(
    "name, norms",
    [
        ("COCO-Detection/faster_rcnn_R_50_DC5_1x.yaml", 42),
        ("COCO-Detection/rpn_R_50_C4_1x.yaml", 32),
        ("COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml", 42),
        ("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml", 42),
        ("Misc/semantic_R_50_FPN_1x.yaml", 42),
    ],
)
def test_it_computes_what_frozen_batch_norm_does(name, norms, tmp_path):
    """At gain 0, calibrated, in training and in evaluation."""
    theirs, ours = (build_rcnn(config(name, kalman)) for kalman in (False, True))
    randomize(theirs.backbone)
    torch.save({"model": theirs.state_dict()}, tmp_path / "frozen.pth")
    KNCheckpointer(ours).load(str(tmp_path / "frozen.pth"))
    assert len(kalman_layers(ours)) == norms
    given = inputs()
    wanted = outputs(theirs, given)
    assert any(len(want) for want in wanted)
    for got, want in zip(outputs(ours, given), wanted):
        assert torch.equal(got, want)
    torch.manual_seed(0)
    wanted = train_step(theirs, given)
    torch.manual_seed(0)
    assert wanted and train_step(ours, given) == pytest.approx(wanted, rel=1e-3)
