"""Trained Kalman models for the tests of folding and export."""

import torch
from detectron2.utils.events import EventStorage

from ..models import build_rcnn, randomize, rcnn_cfg, rcnn_inputs

# Without a threshold a model that has learned next to nothing detects something too.
_ANYTHING = dict(MODEL__ROI_HEADS__SCORE_THRESH_TEST=0.0, MODEL__RPN__POST_NMS_TOPK_TEST=20)


def c4_cfg(**overrides):
    """Mask R-CNN C4, as :func:`~tests.models.rcnn_cfg`."""
    return rcnn_cfg("KN", **{**_ANYTHING, **overrides})


def fpn_cfg(**overrides):
    """Mask R-CNN R18-FPN, with KN in the backbone, the FPN and both heads."""
    stages, levels = ["res2", "res3", "res4", "res5"], ["p2", "p3", "p4", "p5"]
    fpn = dict(
        MODEL__BACKBONE__NAME="build_kn_resnet_fpn_backbone",
        MODEL__RESNETS__DEPTH=18,
        MODEL__RESNETS__RES2_OUT_CHANNELS=64,
        MODEL__RESNETS__OUT_FEATURES=stages,
        MODEL__FPN__IN_FEATURES=stages,
        MODEL__FPN__OUT_CHANNELS=16,
        MODEL__FPN__NORM="KN",
        MODEL__ANCHOR_GENERATOR__SIZES=[[16], [24], [32], [48], [64]],
        MODEL__RPN__IN_FEATURES=[*levels, "p6"],
        MODEL__ROI_HEADS__NAME="StandardROIHeads",
        MODEL__ROI_HEADS__IN_FEATURES=levels,
        MODEL__ROI_BOX_HEAD__NAME="FastRCNNConvFCHead",
        MODEL__ROI_BOX_HEAD__POOLER_RESOLUTION=7,
        MODEL__ROI_BOX_HEAD__NORM="KN",
        MODEL__ROI_BOX_HEAD__NUM_CONV=1,
        MODEL__ROI_BOX_HEAD__CONV_DIM=16,
        MODEL__ROI_BOX_HEAD__NUM_FC=1,
        MODEL__ROI_BOX_HEAD__FC_DIM=32,
        MODEL__ROI_MASK_HEAD__NORM="KN",
        MODEL__ROI_MASK_HEAD__NUM_CONV=2,
    )
    return rcnn_cfg("KN", **{**_ANYTHING, **fpn, **overrides})


def trained(cfg, steps=2):
    """A model after a few steps, in evaluation mode: no parameter and no statistic is at 0 or 1."""
    model = randomize(build_rcnn(cfg))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    with EventStorage():
        for step in range(steps):
            loss = sum(model(rcnn_inputs(seed=step)).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def pictures():
    """Images that were not trained on, of two sizes, as a detector gets them."""
    return rcnn_inputs(n=1, size=96, seed=10) + rcnn_inputs(n=2, size=120, seed=11)


def detect(model, inputs):
    """Per image boxes, scores, classes and mask probabilities, by the names of detectron2."""
    with torch.no_grad():
        results = model.inference(inputs, do_postprocess=False)
    return [
        {name: getattr(field, "tensor", field) for name, field in result.get_fields().items()}
        for result in results
    ]


def assert_same_detections(ours, theirs, tolerance=1e-5):
    """The same, and not nothing."""
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs):
        assert set(one) == {"pred_boxes", "scores", "pred_classes", "pred_masks"} == set(other)
        assert len(one["scores"]) > 0
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=tolerance, atol=tolerance)
