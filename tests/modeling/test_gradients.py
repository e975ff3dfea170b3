"""The gradients of whole chains are those of the functions that they compute.

That every parameter gets a gradient does not show that it gets all of it: the part through the
priors goes another way than that through the features.
"""

from types import SimpleNamespace

import pytest
import torch

from kn_detectron.layers import set_gain_scale
from kn_detectron.modeling.features import feature_of

from ..gradients import slopes
from ..models import (
    build_backbone,
    build_rcnn,
    fpn_rcnn_cfg,
    images,
    randomize,
    rcnn_cfg,
    rcnn_inputs,
    resnet_cfg,
    retinanet_cfg,
)
from .test_heads import CASCADE, boxes_of
from .test_retinanet import tower_inputs

NORMS = pytest.mark.parametrize("norm", ["KN", "GKN"])


def number(values):
    """One smooth number from features, in which no norm's output cancels."""
    total = 0.0
    for value in values:
        generator = torch.Generator().manual_seed(1)
        weight = torch.randn(value.shape[1:], generator=generator, dtype=value.dtype)
        total = total + (value.sigmoid() * weight).sum() / value.numel() ** 0.5
    return total


def assert_gradients_are_right(module, run):
    by_autograd, by_difference = slopes(module, run)
    assert abs(by_difference) > 1e-2
    assert by_autograd == pytest.approx(by_difference, rel=3e-3)


def doubled(model):
    return randomize(model).double()


@NORMS
@pytest.mark.parametrize("variant", ["network", "paper"])
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_resnet(norm, variant, scale):
    cfg = resnet_cfg(
        norm,
        MODEL__KN__GAIN=0.3,
        MODEL__KN__VARIANT=variant,
        MODEL__KN__PREDICTION="closed_form",
        MODEL__RESNETS__OUT_FEATURES=["res2", "res3"],
    )
    backbone = doubled(build_backbone(cfg))
    set_gain_scale(backbone, scale)
    x = images(2, 32).double()
    assert_gradients_are_right(backbone, lambda: number(backbone(x).values()))


@NORMS
def test_fpn(norm):
    backbone = doubled(build_backbone(fpn_rcnn_cfg(norm, MODEL__KN__GAIN=0.05)))
    x = images(2, 64).double()
    assert_gradients_are_right(backbone, lambda: number(backbone(x).values()))


@NORMS
def test_res5_of_regions(norm):
    model = doubled(build_rcnn(rcnn_cfg(norm, MODEL__KN__GAIN=0.05)))
    heads, x = model.roi_heads, images(2, 96).double()
    boxes = [inp["instances"].gt_boxes for inp in rcnn_inputs(objects=2)]
    # Where the chain goes over from the backbone to the head.
    both = torch.nn.ModuleList([model.backbone.res4[-1].conv3.norm, heads.res5[0]])

    def run():
        features = model.backbone(x)
        return number([heads._shared_roi_transform([feature_of(features, "res4")], boxes)])

    assert_gradients_are_right(both, run)


@NORMS
def test_box_and_mask_head(norm):
    model = doubled(build_rcnn(fpn_rcnn_cfg(norm, MODEL__KN__GAIN=0.05)))
    heads, x = model.roi_heads, images(2, 96).double()
    both = torch.nn.ModuleList([model.backbone, heads.box_head, heads.mask_head.mask_fcn2])

    def run():
        features = model.backbone(x)
        levels = [features[name] for name in heads.box_in_features]
        boxes = heads.box_head(heads.box_pooler(levels, boxes_of([[30.0, 60.0], [90.0]])))
        masks = heads.mask_head.layers(heads.mask_pooler(levels, boxes_of([[80.0], [40.0]])))
        return number([boxes, masks])

    assert_gradients_are_right(both, run)


@NORMS
def test_towers_of_retinanet(norm):
    model = doubled(build_rcnn(retinanet_cfg(norm, MODEL__KN__GAIN=0.05)))
    x = images(2, 64).double()
    both = torch.nn.ModuleList([model.backbone, model.head])

    def run():
        logits, deltas = model.head(tower_inputs(model, x))
        return number([*logits, *deltas])

    assert_gradients_are_right(both, run)


def test_a_stage_of_the_cascade_gives_the_features_a_share_of_its_gradient():
    """The beliefs too: they are one function of the weights below."""
    model = doubled(build_rcnn(fpn_rcnn_cfg("KN", **CASCADE)))
    heads, boxes = model.roi_heads, boxes_of([[30.0, 60.0], [90.0]])
    parts = {"below": model.backbone, "head": heads.box_head[1]}
    parameters = {f"{k}.{n}": p for k, m in parts.items() for n, p in m.named_parameters()}

    def gradients(stage):
        features = model.backbone(images(2, 96).double())
        levels = [features[name] for name in heads.box_in_features]
        return torch.autograd.grad(number(stage(levels)), parameters.values(), allow_unused=True)

    def shared(levels):
        return heads._run_stage(levels, proposals, 1)

    def whole(levels):
        return heads.box_predictor[1](heads.box_head[1](heads.box_pooler(levels, boxes)))

    proposals = [SimpleNamespace(proposal_boxes=b) for b in boxes]
    pairs = zip(parameters, gradients(shared), gradients(whole), strict=True)
    for name, got, want in pairs:
        share = 1 / 3 if name.startswith("below") else 1
        if want is not None:
            torch.testing.assert_close(got, share * want, msg=name, rtol=1e-6, atol=1e-9)
