import copy
import functools

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import backbone as theirs
from detectron2.modeling import roi_heads
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from detectron2.modeling.backbone.resnet import DeformBottleneckBlock
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch import GeneralizedRCNN, RetinaNet
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
from omegaconf import OmegaConf
from torch import nn

from kn_detectron import InputError
from kn_detectron.checkpoint import KNCheckpointer, fold_into
from kn_detectron.layers import KN_STATE, build_transition, kalman_layers
from kn_detectron.modeling import (
    KNFPN,
    KNCascadeROIHeads,
    KNRes5ROIHeads,
    KNResNet,
    KNRetinaNet,
    KNStandardROIHeads,
)
from kn_detectron.modeling.lazy import with_kalman_norm
from kn_detectron.modeling.retinanet import LevelNorms

from ..models import build_rcnn, randomize, rcnn_cfg, rcnn_inputs
from .test_roi_heads import detections, train_step

PIXELS = dict(pixel_mean=[103.53, 116.28, 123.675], pixel_std=[1.0, 1.0, 1.0], input_format="BGR")
STAGES, LEVELS = ["res2", "res3", "res4", "res5"], ["p2", "p3", "p4", "p5"]


def resnet(norm, depth, out_features):
    """detectron2's ResNets are not slim, so these are shallow, or only the first stages are used."""
    return L(theirs.ResNet)(
        stem=L(theirs.BasicStem)(in_channels=3, out_channels=64, norm=norm),
        stages=L(theirs.ResNet.make_default_stages)(depth=depth, norm=norm),
        out_features=out_features,
    )


def anchors(strides):
    return L(DefaultAnchorGenerator)(
        sizes=[[8 * s] for s in strides], aspect_ratios=[1.0], strides=strides, offset=0.0
    )


def rpn(in_features, channels, strides):
    return L(RPN)(
        in_features=in_features,
        head=L(StandardRPNHead)(in_channels=channels, num_anchors=1),
        anchor_generator=anchors(strides),
        anchor_matcher=L(Matcher)(
            thresholds=[0.3, 0.7], labels=[0, -1, 1], allow_low_quality_matches=True
        ),
        box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
        batch_size_per_image=16,
        positive_fraction=0.5,
        pre_nms_topk=(50, 50),
        post_nms_topk=(20, 10),
        nms_thresh=0.7,
    )


def matcher(threshold=0.5):
    return L(Matcher)(thresholds=[threshold], labels=[0, 1], allow_low_quality_matches=False)


def pooler(size, scales):
    return L(ROIPooler)(output_size=size, scales=scales, sampling_ratio=2, pooler_type="ROIAlignV2")


def box_predictor(channels, **options):
    return L(roi_heads.FastRCNNOutputLayers)(
        input_shape=L(ShapeSpec)(channels=channels, height=1, width=1),
        test_score_thresh=0.0,
        box2box_transform=L(Box2BoxTransform)(weights=(10, 10, 5, 5)),
        num_classes=5,
        **options,
    )


def c4(norm="FrozenBN"):
    return L(GeneralizedRCNN)(
        backbone=resnet(norm, 50, ["res2"]),
        proposal_generator=rpn(["res2"], 256, [4]),
        roi_heads=L(roi_heads.Res5ROIHeads)(
            num_classes=5,
            batch_size_per_image=8,
            positive_fraction=0.25,
            proposal_matcher=matcher(),
            in_features="${..backbone.out_features}",
            pooler=pooler(7, (1 / 4,)),
            res5=L(theirs.ResNet.make_stage)(
                block_class=theirs.BottleneckBlock,
                num_blocks=2,
                stride_per_block=[2, 1],
                in_channels=256,
                bottleneck_channels=8,
                out_channels=32,
                norm=norm,
            ),
            box_predictor=box_predictor("${...res5.out_channels}"),
            mask_head=L(roi_heads.MaskRCNNConvUpsampleHead)(
                input_shape=L(ShapeSpec)(channels=32, width=4, height=4),
                num_classes=5,
                conv_dims=[16],
            ),
        ),
        **PIXELS,
    )


def pyramid(norm, stages, top_block, fpn_norm):
    return L(theirs.FPN)(
        bottom_up=resnet(norm, 18, stages),
        in_features="${.bottom_up.out_features}",
        out_channels=16,
        norm=fpn_norm,
        top_block=top_block,
    )


def fpn(norm="FrozenBN", fpn_norm="", head_norm="", cascade=False):
    scales = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
    box_head = L(roi_heads.FastRCNNConvFCHead)(
        input_shape=ShapeSpec(channels=16, height=7, width=7),
        conv_dims=[16],
        fc_dims=[32],
        conv_norm=head_norm,
    )
    if cascade:
        boxes = dict(
            _target_=roi_heads.CascadeROIHeads,
            box_heads=[copy.deepcopy(box_head) for _ in range(2)],
            box_predictors=[box_predictor(32, cls_agnostic_bbox_reg=True) for _ in range(2)],
            proposal_matchers=[matcher(0.5), matcher(0.6)],
        )
    else:
        boxes = dict(box_head=box_head, box_predictor=box_predictor(32), proposal_matcher=matcher())
    heads = L(roi_heads.StandardROIHeads)(
        num_classes=5,
        batch_size_per_image=8,
        positive_fraction=0.25,
        box_in_features=LEVELS,
        box_pooler=pooler(7, scales),
        mask_in_features=LEVELS,
        mask_pooler=pooler(14, scales),
        mask_head=L(roi_heads.MaskRCNNConvUpsampleHead)(
            input_shape=ShapeSpec(channels=16, width=14, height=14),
            num_classes=5,
            conv_dims=[16, 16],
            conv_norm=head_norm,
        ),
    )
    heads.update(boxes)
    return L(GeneralizedRCNN)(
        backbone=pyramid(norm, STAGES, L(LastLevelMaxPool)(), fpn_norm),
        proposal_generator=rpn([*LEVELS, "p6"], 16, [4, 8, 16, 32, 64]),
        roi_heads=heads,
        **PIXELS,
    )


def retinanet(norm="BN"):
    top_block = L(LastLevelP6P7)(in_channels=512, out_channels=16)
    return L(RetinaNet)(
        backbone=pyramid(norm, STAGES[1:], top_block, norm),
        head=L(RetinaNetHead)(
            input_shape=[ShapeSpec(channels=16)] * 5,
            num_classes=5,
            conv_dims=[16],
            num_anchors=1,
            norm=norm,
        ),
        anchor_generator=anchors([8, 16, 32, 64, 128]),
        box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
        anchor_matcher=L(Matcher)(
            thresholds=[0.4, 0.5], labels=[0, -1, 1], allow_low_quality_matches=True
        ),
        num_classes=5,
        head_in_features=["p3", "p4", "p5", "p6", "p7"],
        test_score_thresh=0.0,
        **PIXELS,
    )


def built(config, seed=0):
    torch.manual_seed(seed)
    return instantiate(config)


def assert_same_detections(got, wanted):
    for a, b in zip(got, wanted):
        assert len(b) > 0 and torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
        assert torch.equal(a.scores, b.scores)


@pytest.mark.parametrize("config", [c4, fpn], ids=["c4", "fpn"])
def test_same_model_and_keys_as_without_it(config):
    before, ours = randomize(built(config())), built(with_kalman_norm(config(), gain=0.1))
    state = ours.state_dict()
    own = {k for k in state if k.rsplit(".", 1)[-1] in (*KN_STATE, "num_batches_tracked")}
    assert {k: v.shape for k, v in state.items() if k not in own} == {
        k: v.shape for k, v in before.state_dict().items()
    }
    found = ours.load_state_dict(before.state_dict(), strict=False)
    assert set(found.missing_keys) <= own and not found.unexpected_keys
    inputs = rcnn_inputs()
    assert_same_detections(detections(ours, inputs), detections(before, inputs))


def test_the_settings_are_those_of_a_yaml_config():
    lazy = built(with_kalman_norm(c4(), gain=0.3, variant="paper", num_groups=4))
    cfg = rcnn_cfg("KN", MODEL__KN__GAIN=0.3, MODEL__KN__VARIANT="paper")
    yaml = build_rcnn(cfg)
    assert torch.equal(lazy.backbone.image.belief().var, yaml.backbone.image.belief().var)
    assert repr(lazy.backbone.chain) == repr(yaml.backbone.chain)
    assert lazy.backbone.stem.conv1.norm.is_head  # as the paper's variant has it


def test_weights_of_batch_norm_are_calibrated(tmp_path):
    before = randomize(built(c4()))
    torch.save({"model": before.state_dict(), "matching_heuristics": True}, tmp_path / "bn.pth")
    ours = built(with_kalman_norm(c4(), gain=0.0, learn_gain=False), seed=1)
    KNCheckpointer(ours).load(str(tmp_path / "bn.pth"))
    # So that in training it computes what the model with frozen BatchNorm does.
    inputs = rcnn_inputs()
    torch.manual_seed(0)
    wanted = train_step(before, inputs)
    torch.manual_seed(0)
    assert train_step(ours, inputs) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("cascade", [False, True])
@pytest.mark.parametrize("norm, group", [("BN", "KN"), ("GN8", "GKN")])
def test_pyramid_and_heads_with_the_norm_join_the_chain(norm, group, cascade):
    config = with_kalman_norm(
        fpn(norm, fpn_norm=norm, head_norm=norm, cascade=cascade), norm=group, num_groups=8
    )
    model = built(config)
    kind = KNCascadeROIHeads if cascade else KNStandardROIHeads
    assert type(model.backbone) is KNFPN and type(model.roi_heads) is kind
    layers = kalman_layers(model)
    assert sum("bottom_up" in name for name in layers) == 20
    assert sum("backbone.fpn" in name for name in layers) == 8
    assert sum("box_head" in name for name in layers) == (2 if cascade else 1)
    assert sum("mask_head" in name for name in layers) == 1
    train_step(model, rcnn_inputs())
    for name, p in model.named_parameters():
        assert p.grad is not None, name
    assert all(len(found) for found in detections(model, rcnn_inputs()))


def test_other_norms_of_pyramid_and_heads_stay():
    model = built(
        with_kalman_norm(fpn("BN", fpn_norm="GN8", head_norm="GN8"), gain=0.0, learn_gain=False)
    )
    assert all("bottom_up" in name for name in kalman_layers(model))
    assert isinstance(model.backbone.fpn_lateral2.norm, nn.GroupNorm)
    assert type(model.roi_heads.box_head) is roi_heads.FastRCNNConvFCHead
    losses = train_step(model, rcnn_inputs())
    assert all(0 <= loss < 20 for loss in losses.values())


def test_a_function_that_builds_batch_norm_is_replaced():
    config = fpn(head_norm=lambda channels: nn.BatchNorm2d(channels, momentum=0.01))
    names = kalman_layers(built(with_kalman_norm(config)))
    assert any("box_head" in name for name in names)


def batch_norm(channels, momentum):
    return nn.BatchNorm2d(channels, momentum=momentum)


def batch_norm_of(momentum):
    return functools.partial(nn.BatchNorm2d, momentum=momentum)


def test_a_call_that_makes_such_a_function_is_replaced():
    names = kalman_layers(built(with_kalman_norm(fpn(head_norm=L(batch_norm_of)(momentum=0.01)))))
    assert any("box_head" in name for name in names)


class OwnHeads(roi_heads.StandardROIHeads):
    pass


def _c4_with_a_norm_in_the_mask_head():
    config = c4()
    config.roi_heads.mask_head.update(conv_dims=[16, 16], conv_norm="BN")
    return config


def _fpn_with_heads_of_ones_own():
    config = fpn(head_norm="BN")
    config.roi_heads["_target_"] = OwnHeads
    return config


@pytest.mark.parametrize(
    "config",
    [
        _c4_with_a_norm_in_the_mask_head,
        _fpn_with_heads_of_ones_own,
        lambda: fpn(fpn_norm="GN8", head_norm="BN"),
    ],
    ids=["c4", "own heads", "other pyramid"],
)
def test_heads_that_would_get_no_prior_keep_their_norm(config, caplog):
    model = built(with_kalman_norm(config(), gain=0.0, learn_gain=False))
    assert "roi_heads.mask_head keeps its norm" in caplog.text
    norms = [m for m in model.roi_heads.mask_head.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and not kalman_layers(model.roi_heads.mask_head)
    losses = train_step(model, rcnn_inputs())
    assert all(torch.tensor(loss).isfinite() for loss in losses.values())


def test_groups_that_fit_the_head_only_stay():
    config = fpn(head_norm=lambda channels: nn.GroupNorm(16, channels))  # 16 of 16 channels
    assert all("head" not in name for name in kalman_layers(built(with_kalman_norm(config))))


def test_parts_that_name_the_norm_get_it():
    """By itself a "GKN" has 32 groups, which do not divide the 16 channels here."""
    config = fpn("GN8", fpn_norm="GKN", head_norm="GKN")
    names = kalman_layers(built(with_kalman_norm(config, norm="GKN", num_groups=8)))
    for part in ("fpn_output2", "box_head", "mask_head"):
        assert any(part in name for name in names), part


def test_a_box_head_without_convolutions_has_no_norm_to_replace():
    config = fpn("BN", fpn_norm="BN", head_norm="BN")
    config.roi_heads.box_head.conv_dims = []
    model = built(with_kalman_norm(config))
    assert type(model.roi_heads.box_head) is roi_heads.FastRCNNConvFCHead
    assert kalman_layers(model.roi_heads.mask_head)


def test_values_that_are_set_later():
    config = c4()
    config.roi_heads.num_classes = "???"
    changed = with_kalman_norm(config)
    changed.roi_heads.num_classes = 5
    assert kalman_layers(built(changed))


def test_stages_of_another_network_keep_their_norm():
    """Nothing would give them a prior."""
    config, other = c4("BN"), resnet("BN", 18, ["res2"])
    other["_target_"] = nn.Module
    config.second = other
    before = copy.deepcopy(config.second)
    assert with_kalman_norm(config).second == before


def test_norms_that_refer_to_each_other():
    config = fpn("BN", fpn_norm="BN", head_norm="BN")
    config.backbone.bottom_up.stages.norm = "${..stem.norm}"
    config.backbone.norm = "${.bottom_up.stages.norm}"
    config.roi_heads.box_head.conv_norm = "${...backbone.norm}"
    config.roi_heads.mask_head.conv_norm = "${..box_head.conv_norm}"
    names = list(kalman_layers(built(with_kalman_norm(config))))
    for part in ("stem", "res5", "fpn_output2", "box_head", "mask_head"):
        assert any(part in name for name in names), part


def test_a_config_that_must_not_be_changed_is_copied():
    config = c4()
    OmegaConf.set_struct(config, True)
    OmegaConf.set_readonly(config, True)
    assert len(kalman_layers(built(with_kalman_norm(config)))) > 0


def test_the_deviation_is_in_the_order_of_the_channels():
    config = c4()
    config.pixel_std = [2.0, 1.0, 1.0]
    bgr, rgb = with_kalman_norm(config), copy.deepcopy(config)
    rgb.input_format = "RGB"
    rgb = with_kalman_norm(rgb)
    assert list(bgr.backbone.image_std) == [57.375 / 2, 57.12, 58.395]
    assert list(rgb.backbone.image_std) == [58.395 / 2, 57.12, 57.375]


def test_towers_of_retinanet():
    model = built(with_kalman_norm(retinanet()))
    assert type(model) is KNRetinaNet
    assert any(isinstance(module, LevelNorms) for module in model.head.modules())
    train_step(model, rcnn_inputs())
    for name, p in model.named_parameters():
        assert p.grad is not None, name


@pytest.mark.parametrize("config", [c4, fpn], ids=["c4", "fpn"])
def test_one_node_has_the_settings_wherever_the_model_is(config):
    whole = OmegaConf.create({"nested": {}}, flags={"allow_objects": True})
    whole.nested.model = with_kalman_norm(config("BN"), gain=0.1)
    backbone = whole.nested.model.backbone
    (backbone.bottom_up if "bottom_up" in backbone else backbone).chain.gain = 0.25
    for name, layer in kalman_layers(instantiate(whole.nested.model)).items():
        assert layer.gain.item() == pytest.approx(0.25), name


def test_the_config_stays_as_it_was():
    config = fpn("BN", fpn_norm="BN", head_norm="BN")
    before = copy.deepcopy(config)
    with_kalman_norm(config)
    assert config == before and not kalman_layers(built(config))


def test_a_saved_config_builds_the_same_model(tmp_path):
    config = OmegaConf.create(
        {"model": with_kalman_norm(c4(), gain=0.3)}, flags={"allow_objects": True}
    )
    path = str(tmp_path / "config.yaml")
    LazyConfig.save(config, path)
    again = built(LazyConfig.load(path).model)
    assert type(again.backbone) is KNResNet and type(again.roi_heads) is KNRes5ROIHeads
    # The weights are drawn in another order, since the file is sorted.
    again.load_state_dict(built(config.model).state_dict(), strict=True)
    assert repr(again.backbone.chain) == repr(built(config.model).backbone.chain)


def test_a_transition_of_ones_own():
    transition = L(build_transition)(prediction="monte_carlo", size=8)
    model = built(with_kalman_norm(c4(), transition=transition))
    assert repr(model.backbone.chain.transition) == "MonteCarloTransition(size=8)"
    assert repr(model.roi_heads.res5[0].chain.transition) == "MonteCarloTransition(size=8)"


def test_frozen_stages():
    config = c4()
    config.backbone.freeze_at = 1
    model = built(with_kalman_norm(config, gain=0.0, learn_gain=False))
    assert isinstance(model.backbone.stem.conv1.norm, FrozenBatchNorm2d)
    train_step(model, rcnn_inputs())


@pytest.mark.parametrize("config", [c4, fpn], ids=["c4", "fpn"])
def test_folding_into_the_model_without_it(config):
    model = randomize(built(with_kalman_norm(config(), gain=0.1)))
    folded = fold_into(model, built(config(), seed=1))
    assert not kalman_layers(folded) and not folded.training
    inputs = rcnn_inputs()
    assert_same_detections(detections(folded, inputs), detections(model, inputs))


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(norm="GKN", num_groups=8), "images at hand"),
        (dict(eval_statistics="batch"), "images at hand"),
    ],
)
def test_what_cannot_be_folded(settings, said):
    with pytest.raises(InputError, match=said):
        fold_into(built(with_kalman_norm(c4(), **settings)), built(c4()))


def test_folding_into_another_model():
    with pytest.raises(InputError, match="not one of the config"):
        fold_into(built(with_kalman_norm(c4())), built(fpn()))


def _with_deformable_blocks():
    config = c4()
    config.backbone.stages.update(block_class=DeformBottleneckBlock, deform_num_groups=1)
    return config


class OwnStem(theirs.BasicStem):
    pass


def _with_a_stem_of_ones_own():
    config = c4()
    config.backbone.stem["_target_"] = OwnStem
    return config


def _with_two_resnets():
    config = c4()
    config.second = resnet("BN", 18, ["res2"])
    return config


@pytest.mark.parametrize(
    "config, settings, error, said",
    [
        (lambda: c4().backbone, {}, InputError, "give the node `model`"),
        (lambda: dict(c4()), {}, InputError, "give the node `model`"),
        (
            lambda: L(nn.Module)(pixel_std=[1.0] * 3),
            {},
            InputError,
            "has no ResNet of detectron2's, .*: convert another backbone",
        ),
        (_with_two_resnets, {}, InputError, "has 2 of detectron2's ResNets"),
        (_with_deformable_blocks, {}, InputError, "backbone.stages.block_class is Deform"),
        (_with_a_stem_of_ones_own, {}, InputError, "backbone.stem is .*OwnStem"),
        (lambda: with_kalman_norm(c4()), {}, InputError, "has Kalman Normalization already"),
        (c4, dict(image_std=[57.0]), InputError, "image_std is .57.0., .* as pixel_std has: 3"),
        (c4, dict(image_std=[57.0, 0.0, 57.0]), InputError, "positive numbers"),
        (c4, dict(transition="monte_carlo"), ValueError, "build_transition"),
        (c4, dict(norm="GKN", num_groups=0), ValueError, "num_groups"),
        (c4, dict(norm="BN"), ValueError, "'KN' or 'GKN'"),
        (c4, dict(gain=1.5), ValueError, "gain"),
        (c4, dict(gian=0.5), TypeError, "gian"),
    ],
)
def test_what_is_refused(config, settings, error, said):
    with pytest.raises(error, match=said):
        with_kalman_norm(config(), **settings)
