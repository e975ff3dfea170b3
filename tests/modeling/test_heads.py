import pytest
import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from kn_detectron import Belief, InputError
from kn_detectron.checkpoint import calibrate
from kn_detectron.layers import KN_STATE, kalman_layers, set_gain_scale
from kn_detectron.layers import belief as B
from kn_detectron.modeling import BeliefPooler, ChainConfig, Feature

from ..models import build_rcnn, fpn_rcnn_cfg, images, randomize, rcnn_inputs
from .test_roi_heads import NORM_AND_VARIANT, detections, train_step

CASCADE = dict(
    MODEL__ROI_HEADS__NAME="KNCascadeROIHeads", MODEL__ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG=True
)
HEADS = pytest.mark.parametrize("heads", [{}, CASCADE], ids=["standard", "cascade"])

# Regions of the levels p3, p5 and p4 of the first image, and p3 and p5 of the second.
SIDES = [[40.0, 500.0, 230.0], [60.0, 450.0]]


def boxes_of(sides):
    return [Boxes(torch.tensor([[1.0, 1.0, s, s] for s in image]).view(-1, 4)) for image in sides]


def pooled(norm, boxes, beliefs_of_images):
    """Regions of maps whose values are the means of their beliefs: 10 image + level."""
    chain = ChainConfig(norm=norm, num_groups=1)
    pooler = BeliefPooler(ROIPooler(7, (1 / 8, 1 / 16, 1 / 32), 0, "ROIAlignV2"), chain)
    levels = []
    for level, side in enumerate((64, 32, 16)):
        mean = torch.tensor([[level], [10.0 + level]]).expand(2, 4)
        value = mean[:, :, None, None].expand(2, 4, side, side)
        belief = Belief(mean, mean + 1) if beliefs_of_images else Belief(mean[:1], mean[:1] + 1)
        levels.append(Feature(value, belief))
    return pooler(levels, boxes)


def test_a_region_has_the_belief_of_its_level_and_image():
    x, belief = pooled("GKN", boxes_of(SIDES), beliefs_of_images=True)
    assert x[:, 0, 3, 3].tolist() == [0, 2, 1, 10, 12]
    assert torch.equal(belief.mean, x[:, :, 3, 3])
    assert torch.equal(belief.var, x[:, :, 3, 3] + 1)


def test_a_region_has_the_belief_of_its_level_where_images_share_one():
    x, belief = pooled("GKN", boxes_of(SIDES), beliefs_of_images=False)
    assert torch.equal(belief.mean, x[:, :, 3, 3] % 10)


@pytest.mark.parametrize("sides", [SIDES, [[], [40.0]], [[], []]])
def test_regions_of_a_batch_have_the_mixture_of_the_levels(sides):
    x, belief = pooled("KN", boxes_of(sides), beliefs_of_images=False)
    assert len(x) == sum(len(image) for image in sides)
    # Means 0, 1, 2 and variances 1, 2, 3.
    torch.testing.assert_close(belief.mean, torch.full((1, 4), 1.0))
    torch.testing.assert_close(belief.var, torch.full((1, 4), 2.0 + 2.0 / 3.0))


def test_same_model_and_keys_as_detectron2():
    anything = dict(MODEL__ROI_HEADS__SCORE_THRESH_TEST=0.0)
    theirs = randomize(build_rcnn(fpn_rcnn_cfg("BN", **anything)))
    ours = build_rcnn(fpn_rcnn_cfg("KN", **anything))
    own = {k for k in ours.state_dict() if k.rsplit(".", 1)[-1] in KN_STATE}
    assert {k: v.shape for k, v in ours.state_dict().items() if k not in own} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    assert list(ours.roi_heads.box_head._modules) == list(theirs.roi_heads.box_head._modules)
    layers = kalman_layers(ours.roi_heads)
    assert set(layers) == {
        "box_head.conv1.norm",
        "box_head.conv2.norm",
        "mask_head.mask_fcn1.norm",
        "mask_head.mask_fcn2.norm",
    }
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for got, want in zip(detections(ours, rcnn_inputs()), detections(theirs, rcnn_inputs())):
        assert len(want) > 0 and torch.equal(got.pred_boxes.tensor, want.pred_boxes.tensor)
        assert torch.equal(got.scores, want.scores)
        assert torch.equal(got.pred_masks, want.pred_masks)


@HEADS
@NORM_AND_VARIANT
def test_training_step_and_inference(norm, variant, heads):
    cfg = fpn_rcnn_cfg(
        norm, MODEL__KN__VARIANT=variant, MODEL__ROI_HEADS__SCORE_THRESH_TEST=0.0, **heads
    )
    model = build_rcnn(cfg)
    losses = train_step(model, rcnn_inputs())
    assert all(0 <= v < 20 for v in losses.values()) and "loss_mask" in losses
    for name, p in model.named_parameters():
        assert p.grad is not None, name
    for out in detections(model, rcnn_inputs()):
        assert len(out) > 0 and out.pred_masks.shape == (len(out), 96, 96)


@NORM_AND_VARIANT
def test_mixed_precision_training_step(norm, variant):
    model, given = build_rcnn(fpn_rcnn_cfg(norm, MODEL__KN__VARIANT=variant)), {}
    for name, layer in kalman_layers(model).items():
        layer.register_forward_pre_hook(
            lambda m, args, kwargs, name=name: given.update({name: (args[0], kwargs.get("prior"))}),
            with_kwargs=True,
        )
    with EventStorage(), torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(rcnn_inputs())
    assert set(given) == set(kalman_layers(model))
    for name, (x, prior) in given.items():
        assert x.dtype == torch.bfloat16, name
        if kalman_layers(model)[name].needs_prior:
            assert prior.mean.dtype == prior.var.dtype == torch.float32, name
    sum(losses.values()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
    for name, layer in kalman_layers(model).items():
        assert all(b.isfinite().all() and b.dtype != torch.bfloat16 for b in layer.buffers()), name


@HEADS
@pytest.mark.parametrize("norm", ["KN", "GKN"])
def test_images_without_ground_truth(norm, heads):
    model = build_rcnn(fpn_rcnn_cfg(norm, **heads))
    losses = train_step(model, rcnn_inputs(objects=0))
    assert all(torch.tensor(v).isfinite() for v in losses.values())
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name


@pytest.mark.parametrize("norm", ["KN", "GKN"])
@pytest.mark.parametrize("regions", [0, 1])
def test_few_regions(norm, regions):
    model = build_rcnn(fpn_rcnn_cfg(norm))
    heads, features = model.roi_heads, model.backbone(images(1, 96))
    levels = [features[name] for name in heads.box_in_features]
    before = [m.clone() for n, m in heads.named_buffers() if n.endswith("running_mean")]
    boxes = boxes_of([[40.0] * regions])
    out = heads.box_head(heads.box_pooler(levels, boxes))
    masks = heads.mask_head.layers(heads.mask_pooler(levels, boxes))
    assert out.shape == (regions, 32) and masks.shape == (regions, 5, 28, 28)
    (out.sum() + masks.sum()).backward()
    for name, p in [*heads.box_head.named_parameters(), *heads.mask_head.named_parameters()]:
        assert p.grad is not None and p.grad.isfinite().all(), name
    after = [m for n, m in heads.named_buffers() if n.endswith("running_mean")]
    assert all(torch.equal(a, b) for a, b in zip(before, after)) == (regions == 0 or norm == "GKN")


@HEADS
def test_the_chain_starts_from_the_mixture_of_the_levels(heads):
    model, given = randomize(build_rcnn(fpn_rcnn_cfg("KN", **heads))), []
    heads = model.roi_heads
    box_head = heads.box_head[0] if "Cascade" in type(heads).__name__ else heads.box_head
    firsts = box_head.conv1, heads.mask_head.mask_fcn1
    for conv in firsts:
        conv.norm.register_forward_pre_hook(
            lambda module, args, kwargs: given.append(kwargs["prior"]), with_kwargs=True
        )
    train_step(model, rcnn_inputs())
    # Network variant: whatever the images, so that the backbone can be run once more.
    beliefs = model.backbone(images()).beliefs
    mixed = B.mixture([beliefs[name] for name in ("p2", "p3", "p4", "p5")])
    for conv, prior in zip(firsts, given, strict=True):
        torch.testing.assert_close(prior, B.conv2d(mixed, conv.weight))


def test_each_stage_of_a_cascade_gives_its_share_of_the_gradient():
    """A third to the features, as detectron2's, and a third to the beliefs about them."""
    heads = randomize(build_rcnn(fpn_rcnn_cfg("KN", **CASCADE))).roi_heads.train()
    proposals = Instances((96, 96))
    proposals.proposal_boxes = boxes_of([[40.0, 80.0]])[0]

    def gradients(run):
        g = torch.Generator().manual_seed(0)
        levels = [torch.randn(1, 16, side, side, generator=g) for side in (24, 12, 6, 3)]
        beliefs = [Belief(*torch.rand(2, 1, 16, generator=g)) for _ in levels]
        leaves = [leaf.requires_grad_() for leaf in (*levels, *sum(map(tuple, beliefs), ()))]
        outputs = run([Feature(*parts) for parts in zip(levels, beliefs)])
        return torch.autograd.grad(sum(out.square().sum() for out in outputs), leaves)

    def unscaled(features):
        x = heads.box_pooler(features, [proposals.proposal_boxes])
        return heads.box_predictor[1](heads.box_head[1](x))

    got = gradients(lambda features: heads._run_stage(features, [proposals], 1))
    for share, whole in zip(got, gradients(unscaled), strict=True):
        torch.testing.assert_close(3 * share, whole)
    assert all(part.any() for part in got[4:])


def test_the_second_prior_is_predicted_behind_a_relu():
    model, given = randomize(build_rcnn(fpn_rcnn_cfg("KN"))), []
    first, second = model.roi_heads.box_head.conv1, model.roi_heads.box_head.conv2
    second.norm.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["prior"]), with_kwargs=True
    )
    train_step(model, rcnn_inputs())
    behind_norm = B.normalized(first.norm.weight, first.norm.bias)
    torch.testing.assert_close(given[0], B.conv2d(B.relu(behind_norm), second.weight))


@pytest.mark.parametrize("norm, statistics", [("KN", "batch"), ("GKN", "moving")])
def test_given_boxes_with_beliefs(norm, statistics):
    # Test-time augmentation calls this with the backbone's features.
    cfg = fpn_rcnn_cfg(
        norm, MODEL__KN__EVAL_STATISTICS=statistics, MODEL__ROI_HEADS__SCORE_THRESH_TEST=0.0
    )
    model, inputs = build_rcnn(cfg).eval(), rcnn_inputs()
    with torch.no_grad():
        found = model.inference(inputs, do_postprocess=False)
        masks = [out.pred_masks.clone() for out in found]
        for out in found:
            out.remove("pred_masks")
        again = model.inference(inputs, found, do_postprocess=False)
    for out, want in zip(again, masks):
        assert len(want) > 0
        torch.testing.assert_close(out.pred_masks, want)


def test_heads_without_norms_beside_those_with():
    cfg = fpn_rcnn_cfg(
        "KN", MODEL__ROI_BOX_HEAD__NAME="FastRCNNConvFCHead", MODEL__ROI_BOX_HEAD__NORM=""
    )
    model = build_rcnn(cfg)
    train_step(model, rcnn_inputs())
    calibrate(model)
    assert all("box_head" not in name for name in kalman_layers(model))


@HEADS
def test_a_detector_of_boxes_alone(heads):
    model = build_rcnn(fpn_rcnn_cfg("KN", MODEL__MASK_ON=False, **heads))
    randomize(model)
    assert set(calibrate(model)) == set(kalman_layers(model))
    assert "loss_mask" not in train_step(model, rcnn_inputs())


def test_an_fpn_without_norms_hands_beliefs_on_too():
    model = build_rcnn(fpn_rcnn_cfg("KN", MODEL__FPN__NORM=""))
    train_step(model, rcnn_inputs())


def test_no_beliefs_is_a_sentence():
    model = build_rcnn(fpn_rcnn_cfg("KN", MODEL__FPN__NORM="GN1"))
    with pytest.raises(InputError, match="of which there are none: set .* MODEL.FPN.NORM"):
        train_step(model, rcnn_inputs())


def test_heads_that_get_no_beliefs_are_a_sentence():
    model = build_rcnn(fpn_rcnn_cfg("KN", MODEL__ROI_HEADS__NAME="StandardROIHeads"))
    with pytest.raises(InputError, match='set MODEL.ROI_HEADS.NAME "KNStandardROIHeads"'):
        train_step(model, rcnn_inputs())


@pytest.mark.parametrize("part", ["ROI_BOX_HEAD", "ROI_MASK_HEAD"])
@pytest.mark.parametrize("norm", ["", "GKN"])
def test_a_chain_of_two_norms_is_refused(part, norm):
    with pytest.raises(InputError, match=f"MODEL.{part}.NORM is '{norm}', but .*NORM 'KN'"):
        build_rcnn(fpn_rcnn_cfg("KN", **{f"MODEL__{part}__NORM": norm}))


@pytest.mark.trains
@HEADS
@pytest.mark.parametrize("batch", [1, 3])
def test_losses_at_gain_0_are_the_frozen_networks(heads, batch):
    frozen_heads = {k: v.replace("KN", "") if isinstance(v, str) else v for k, v in heads.items()}
    frozen = randomize(build_rcnn(fpn_rcnn_cfg("FrozenBN", **frozen_heads)))
    model = build_rcnn(fpn_rcnn_cfg("KN", **heads))
    model.load_state_dict(frozen.state_dict(), strict=False)
    assert set(calibrate(model)) == set(kalman_layers(model))
    set_gain_scale(model, 0.0)
    found = []
    for m in (frozen, model):
        torch.manual_seed(7)  # of the choice of proposals
        found.append(train_step(m, rcnn_inputs(batch)))
    assert found[1] == pytest.approx(found[0], rel=1e-4)
