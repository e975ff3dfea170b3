import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling.roi_heads import Res5ROIHeads, build_roi_heads
from detectron2.utils.events import EventStorage

from kn_detectron import InputError
from kn_detectron.layers import KN_STATE, kalman_layers
from kn_detectron.layers import belief as B
from kn_detectron.modeling.features import feature_of

from ..models import build_rcnn, images, randomize, rcnn_cfg, rcnn_inputs

NORM_AND_VARIANT = pytest.mark.parametrize(
    "norm, variant", [("KN", "network"), ("KN", "paper"), ("GKN", "network"), ("GKN", "paper")]
)


def train_step(model, inputs):
    with EventStorage():
        losses = model.train()(inputs)
    sum(losses.values()).backward()
    return {k: v.item() for k, v in losses.items()}


def detections(model, inputs):
    with torch.no_grad():
        return [out["instances"] for out in model.eval()(inputs)]


def test_same_model_and_keys_as_detectron2():
    theirs = randomize(build_rcnn(rcnn_cfg("BN")))
    ours = build_rcnn(rcnn_cfg("KN"))
    own = {k for k in ours.state_dict() if k.rsplit(".", 1)[-1] in KN_STATE}
    assert {k: v.shape for k, v in ours.state_dict().items() if k not in own} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    assert sum("roi_heads.res5" in k for k in own) == 10 * 4
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for got, want in zip(detections(ours, rcnn_inputs()), detections(theirs, rcnn_inputs())):
        assert len(want) > 0 and torch.equal(got.pred_boxes.tensor, want.pred_boxes.tensor)
        assert torch.equal(got.scores, want.scores)
        assert torch.equal(got.pred_masks, want.pred_masks)


@NORM_AND_VARIANT
def test_training_step_and_inference(norm, variant):
    anything = dict(MODEL__ROI_HEADS__SCORE_THRESH_TEST=0.0)
    model = build_rcnn(rcnn_cfg(norm, MODEL__KN__VARIANT=variant, **anything))
    losses = train_step(model, rcnn_inputs())
    assert all(0 <= v < 20 for v in losses.values()) and "loss_mask" in losses
    for name, p in model.named_parameters():
        assert p.grad is not None, name
    for out in detections(model, rcnn_inputs()):
        assert len(out) > 0 and out.pred_masks.shape == (len(out), 96, 96)


@NORM_AND_VARIANT
def test_images_without_ground_truth(norm, variant):
    model = build_rcnn(rcnn_cfg(norm, MODEL__KN__VARIANT=variant))
    losses = train_step(model, rcnn_inputs(objects=0))
    assert all(torch.tensor(v).isfinite() for v in losses.values())
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name


@NORM_AND_VARIANT
def test_res5_of_no_regions(norm, variant):
    model = build_rcnn(rcnn_cfg(norm, MODEL__KN__VARIANT=variant))
    heads = model.roi_heads
    features = model.backbone(images(2, 96))
    boxes = [inp["instances"].gt_boxes[:0] for inp in rcnn_inputs()]
    out = heads._shared_roi_transform([feature_of(features, "res4")], boxes)
    assert out.shape == (0, 128, 7, 7)
    out.sum().backward()
    for name, p in heads.res5.named_parameters():
        assert p.grad is not None and not p.grad.any(), name


def test_res5_starts_from_the_belief_about_res4():
    model = randomize(build_rcnn(rcnn_cfg("KN")))
    heads, given = model.roi_heads, []
    heads.res5[0].conv1.norm.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["prior"]), with_kwargs=True
    )
    train_step(model, rcnn_inputs())
    # network variant: whatever the images, so that the backbone can be run once more
    out = model.backbone(images())
    res4 = out.beliefs["res4"]
    want = B.conv2d(res4, heads.res5[0].conv1.weight)
    torch.testing.assert_close(given[0], want)


def test_group_beliefs_follow_their_image():
    # In the paper variant GKN's belief differs between images; each region gets its image's.
    model = randomize(build_rcnn(rcnn_cfg("GKN", MODEL__KN__VARIANT="paper")))
    heads, given = model.roi_heads, []
    heads.res5[0].conv1.norm.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["prior"].mean), with_kwargs=True
    )
    features = model.backbone(images(2, 96))
    boxes = [inp["instances"].gt_boxes for inp in rcnn_inputs(objects=3)]
    heads._shared_roi_transform([feature_of(features, "res4")], [boxes[0][:1], boxes[1]])
    rows = given[0]
    assert rows.shape[0] == 4
    assert not torch.equal(rows[0], rows[1])
    assert torch.equal(rows[1], rows[2]) and torch.equal(rows[1], rows[3])


@pytest.mark.parametrize("norm, statistics", [("KN", "batch"), ("GKN", "moving")])
def test_given_boxes_with_and_without_beliefs(norm, statistics):
    # Test-time augmentation calls this with the backbone's features.
    model = build_rcnn(rcnn_cfg(norm, MODEL__KN__EVAL_STATISTICS=statistics)).eval()
    inputs = rcnn_inputs()
    with torch.no_grad():
        batch = model.preprocess_image(inputs)
        features = model.backbone(batch.tensor)
        found = model.inference(inputs, do_postprocess=False)
        masks = [out.pred_masks.clone() for out in found]
        for out in found:
            out.remove("pred_masks")
        again = model.inference(inputs, found, do_postprocess=False)
    assert "res4" in features.beliefs
    for out, want in zip(again, masks):
        assert len(want) > 0
        torch.testing.assert_close(out.pred_masks, want)


@pytest.mark.parametrize("freeze_at", [2, 5])
def test_frozen_backbone_with_live_head(freeze_at):
    model = build_rcnn(rcnn_cfg("KN", MODEL__BACKBONE__FREEZE_AT=freeze_at))
    train_step(model, rcnn_inputs())
    frozen = [m for m in model.backbone.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert len(frozen) == {2: 11, 5: 43}[freeze_at]
    assert len(kalman_layers(model.roi_heads)) == 10
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name


def test_what_it_refuses():
    cfg = rcnn_cfg(
        "KN",
        MODEL__RESNETS__DEPTH=18,
        MODEL__RESNETS__RES2_OUT_CHANNELS=64,
        MODEL__RESNETS__STEM_OUT_CHANNELS=64,
    )
    with pytest.raises(InputError, match="DEPTH is 18, but KNRes5ROIHeads"):
        build_rcnn(cfg)
    cfg = rcnn_cfg("KN", MODEL__RESNETS__DEFORM_ON_PER_STAGE=[False, False, False, True])
    with pytest.raises(InputError, match="DEFORM_ON_PER_STAGE asks .* KNRes5ROIHeads does not"):
        build_roi_heads(cfg, {"res4": ShapeSpec(channels=64, stride=16)})
    cfg = rcnn_cfg("BN", MODEL__ROI_HEADS__NAME="KNRes5ROIHeads")
    with pytest.raises(InputError, match="NORM is 'BN'"):
        build_rcnn(cfg)


def test_a_backbone_without_beliefs_is_named():
    model = build_rcnn(rcnn_cfg("KN", MODEL__BACKBONE__NAME="build_resnet_backbone"))
    with pytest.raises(InputError, match='set MODEL.BACKBONE.NAME "build_kn_resnet_backbone"'):
        train_step(model, rcnn_inputs())
    model = build_rcnn(rcnn_cfg("KN"))  # a part that keeps its statistics is no mistake
    model.train()
    for norm in kalman_layers(model).values():
        norm.eval()
    with EventStorage():
        sum(model(rcnn_inputs()).values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_it_is_a_detectron2_head():
    assert isinstance(build_rcnn(rcnn_cfg("KN")).roi_heads, Res5ROIHeads)
