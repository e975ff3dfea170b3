import math
import pickle

import pytest
import torch
import torchvision
from detectron2.layers import ShapeSpec

from kn_detectron import InputError, KalmanNorm2d
from kn_detectron.checkpoint import KNCheckpointer, calibrate
from kn_detectron.checkpoint.folding import stock_config
from kn_detectron.layers import kalman_layers, set_gain_scale
from kn_detectron.modeling import KNFPN, KNNetwork, PlainNetwork
from kn_detectron.modeling.network import _features
from kn_detectron.model_zoo import get_config

from ..models import (
    build_backbone,
    build_rcnn,
    fpn_rcnn_cfg,
    images,
    randomize,
    rcnn_inputs,
    resnet_cfg,
)
from .test_roi_heads import detections, train_step

STAGES = ["res2", "res3", "res4", "res5"]
MOBILENET = {"res2": 24, "res3": 32, "res4": 96, "res5": 1280}


def network_cfg(name="mobilenet_v2", **overrides):
    options = dict(
        MODEL__BACKBONE__NAME="build_kn_network_backbone",
        MODEL__KN__NETWORK=name,
        MODEL__RESNETS__OUT_FEATURES=STAGES,
    )
    return resnet_cfg("KN", **{**options, **overrides})


def trained_mobilenet(folder):
    """torchvision's network with statistics like those of training, and the file with its weights."""
    network = torchvision.models.mobilenet_v2(weights=None).train()
    with torch.no_grad():
        network(images(4, 96))
    path = folder / "mobilenet_v2.pth"
    torch.save(randomize(network).state_dict(), path)
    return network.eval(), str(path)


@pytest.mark.parametrize(
    "name, channels",
    [
        ("mobilenet_v2", MOBILENET),
        ("resnet18", {"res2": 64, "res3": 128, "res4": 256, "res5": 512}),
        ("googlenet", {"res2": 192, "res3": 480, "res4": 832, "res5": 1024}),
        ("densenet121", {"res2": 256, "res3": 512, "res4": 1024, "res5": 1024}),
        ("timm/tf_efficientnet_lite0", {"res2": 24, "res3": 40, "res4": 112, "res5": 1280}),
    ],
)
def test_features_are_what_the_last_block_of_their_stride_puts_out(name, channels):
    backbone = build_backbone(network_cfg(name))
    assert isinstance(backbone, KNNetwork)
    shapes = backbone.output_shape()
    assert [shapes[f].stride for f in STAGES] == [4, 8, 16, 32]
    assert {f: shapes[f].channels for f in STAGES} == channels
    out = backbone(images(2, 64))
    assert set(out) == set(out.beliefs) == set(STAGES)
    for feature, shape in shapes.items():
        assert out[feature].shape == (2, shape.channels, 64 // shape.stride, 64 // shape.stride)
        assert out.beliefs[feature].mean.shape == (1, shape.channels)
    sum(v.square().mean() for v in out.values()).backward()
    for name, p in backbone.named_parameters():
        assert p.grad is not None, name
    assert not backbone.eval()(images(2, 64)).beliefs


def test_a_feature_that_its_stride_does_not_divide_is_none():
    """As Inception's, without padding: 31 pixels of 128 cannot be pooled as those of stride 4."""
    for kernel, padding, found in ((8, 2, True), (7, 0, False)):
        network = torch.nn.Sequential(torch.nn.Conv2d(3, 5, kernel, 4, padding))
        if found:
            assert _features(network, "own", ["res2"])[1]["res2"] == ShapeSpec(channels=5, stride=4)
        else:
            with pytest.raises(InputError, match="'res2', which own does not have: give another"):
                _features(network, "own", ["res2"])


def test_an_empty_container_does_not_hide_what_others_hold():
    conv = torch.nn.Conv2d
    stages = torch.nn.Sequential(conv(3, 5, 4, 4), conv(5, 6, 2, 2))
    network = torch.nn.Sequential(stages, torch.nn.Sequential())
    assert set(_features(network, "own", ["res2", "res3"])[1]) == {"res2", "res3"}


@pytest.mark.parametrize("kind", ["wrapped", "arrays"])
def test_its_weights_may_be_of_a_wrapped_network_or_arrays(tmp_path, kind):
    network, path = trained_mobilenet(tmp_path)
    state, other = network.state_dict(), tmp_path / "other.pth"
    if kind == "wrapped":
        torch.save({"model": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, other)
    else:
        with open(other, "wb") as file:
            pickle.dump({k: v.numpy() for k, v in state.items()}, file)
    got, want = (
        build_backbone(network_cfg(MODEL__KN__NETWORK_WEIGHTS=str(p))).state_dict()
        for p in (other, path)
    )
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_weights_without_counters_of_batches_are_whole(tmp_path):
    """As files of other projects are, which leave out what no layer computes with."""
    network, path = trained_mobilenet(tmp_path)
    torch.save({k: v for k, v in network.state_dict().items() if "num_batches" not in k}, path)
    state = build_backbone(network_cfg(MODEL__KN__NETWORK_WEIGHTS=path)).state_dict()
    name = "features.1.conv.0.1.running_var"
    assert any(
        k.endswith(name) and torch.equal(v, network.state_dict()[name]) for k, v in state.items()
    )


def test_weights_of_the_network_are_not_read_where_those_of_the_model_will_be():
    build_backbone(network_cfg(MODEL__KN__NETWORK_WEIGHTS="/gone.pth", MODEL__WEIGHTS="model.pth"))


@pytest.mark.trains
def test_at_gain_0_it_computes_what_the_frozen_network_does(tmp_path):
    network, path = trained_mobilenet(tmp_path)
    backbone = build_backbone(network_cfg(MODEL__KN__NETWORK_WEIGHTS=path))
    set_gain_scale(backbone, 0.0)
    x = images(1, 96, seed=3)
    with torch.no_grad():
        got, want = backbone.train()(x)["res5"], network.features(x)
    assert (got - want).abs().max() < 1e-4 * want.abs().max()


def lite0_backbone(norm):
    cfg = get_config(f"photos/mask_rcnn_lite0_FPN_{norm}.yaml")
    cfg.MODEL.BACKBONE.NAME = "build_kn_network_backbone"
    return build_backbone(cfg).train()


@pytest.mark.trains
def test_calibrated_to_real_imagenet_weights_it_computes_what_frozen_batch_norm_does():
    """EfficientNet-Lite0: depthwise convolutions, ReLU6, 49 norms, at gain 0 in training."""
    kn, frozen = lite0_backbone("KN"), lite0_backbone("BN")
    set_gain_scale(kn, 0.0)
    x = images(1, 96, seed=3)
    with torch.no_grad():
        got, want = kn(x), frozen(x)
    for name in STAGES:
        assert (got[name] - want[name]).abs().max() < 1e-4 * want[name].abs().max(), name


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_the_networks_own_batch_norm_to_compare_with(tmp_path, norm):
    network, path = trained_mobilenet(tmp_path)
    options = dict(MODEL__RESNETS__NORM=norm, MODEL__KN__NETWORK_WEIGHTS=path)
    backbone = build_backbone(network_cfg(**options))
    assert isinstance(backbone, PlainNetwork)
    x = images(2, 96, seed=3)
    before = {k: v.clone() for k, v in backbone.state_dict().items() if "running" in k}
    backbone.train()(x)["res5"].square().mean().backward()
    with torch.no_grad():
        want = network.train(norm == "BN").features(x)
        network.load_state_dict(torch.load(path))  # undo the tracking
        assert torch.allclose(backbone.train()(x)["res5"], want, atol=1e-5)
    norms = [m for m in backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for module in norms:
        assert module.training == (norm == "BN")
        assert (module.weight.grad is not None) == (norm == "BN")
    moved = [not torch.equal(backbone.state_dict()[k], v) for k, v in before.items()]
    assert all(moved) if norm == "BN" else not any(moved)


def test_frozen_batch_norm_stays_frozen_when_others_replace_it(tmp_path):
    _, path = trained_mobilenet(tmp_path)
    options = dict(MODEL__RESNETS__NORM="FrozenBN", MODEL__KN__NETWORK_WEIGHTS=path)
    backbone = build_backbone(network_cfg(**options))
    backbone = torch.nn.SyncBatchNorm.convert_sync_batchnorm(backbone).train()
    norms = [m for m in backbone.modules() if isinstance(m, torch.nn.SyncBatchNorm)]
    assert norms and not any(norm.training for norm in norms)


FPN = dict(
    MODEL__BACKBONE__NAME="build_kn_network_fpn_backbone",
    MODEL__KN__NETWORK="mobilenet_v2",
    MODEL__ROI_HEADS__SCORE_THRESH_TEST=0.0,
)


def test_mask_rcnn_with_fpn_and_heads():
    model = build_rcnn(fpn_rcnn_cfg("KN", **FPN))
    assert isinstance(model.backbone, KNFPN)
    losses = train_step(model, rcnn_inputs())
    assert "loss_mask" in losses
    for name, p in model.named_parameters():
        assert p.grad is not None, name
    assert all(len(found) > 0 for found in detections(model, rcnn_inputs()))
    assert set(calibrate(model)) == set(kalman_layers(model))
    norms = [m for m in model.modules() if isinstance(m, KalmanNorm2d)]
    assert len(norms) == len(kalman_layers(model))  # none is the head of a chain


def test_calibration_runs_no_images():
    """The channel attention of ECA networks cannot be computed for a batch of no images."""
    backbone = randomize(build_backbone(network_cfg("timm/ecaresnet26t")))
    with pytest.raises(RuntimeError):
        backbone(images(2, 64)[:0])
    assert set(calibrate(backbone)) == set(kalman_layers(backbone))


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18"])
def test_a_checkpoint_loads_whole(tmp_path, name):
    cfg = fpn_rcnn_cfg("KN", **{**FPN, "MODEL__KN__NETWORK": name})
    model, other = randomize(build_rcnn(cfg)), build_rcnn(cfg, seed=5)
    KNCheckpointer(model, str(tmp_path)).save("model_final")
    KNCheckpointer(other).load_for_evaluation(str(tmp_path / "model_final.pth"))
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


def test_weights_of_another_backbone_are_refused(tmp_path):
    def model(name):
        return build_rcnn(fpn_rcnn_cfg("KN", **{**FPN, "MODEL__KN__NETWORK": name}))

    def load(state):
        torch.save({"model": state}, tmp_path / "weights.pth")
        KNCheckpointer(model("resnet18"), str(tmp_path)).resume_or_load(
            str(tmp_path / "weights.pth"), resume=False
        )

    shallow, deep = model("resnet18").state_dict(), model("resnet34").state_dict()
    load(shallow)
    bare = {k: v for k, v in shallow.items() if not k.startswith("backbone.bottom_up.")}
    with pytest.raises(InputError, match=r"of another architecture .* missing"):
        load(bare)
    with pytest.raises(InputError, match="filters that the model lacks"):
        load(deep)


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_mask_rcnn_on_a_network_with_batch_norm(norm):
    options = {**FPN, "MODEL__RESNETS__NORM": norm, "MODEL__FPN__NORM": ""}
    options.update(MODEL__ROI_BOX_HEAD__NORM="", MODEL__ROI_MASK_HEAD__NORM="")
    options.update(
        MODEL__ROI_HEADS__NAME="StandardROIHeads",
        MODEL__ROI_BOX_HEAD__NAME="FastRCNNConvFCHead",
        MODEL__ROI_MASK_HEAD__NAME="MaskRCNNConvUpsampleHead",
    )
    model = build_rcnn(fpn_rcnn_cfg("KN", **options))
    assert "loss_mask" in train_step(model, rcnn_inputs())
    assert all(len(found) > 0 for found in detections(model, rcnn_inputs()))


def test_it_is_not_folded():
    with pytest.raises(InputError, match="build_kn_network_fpn_backbone, .* detectron2 has no"):
        stock_config(fpn_rcnn_cfg("KN", **FPN))


@pytest.mark.parametrize(
    "state, sentence",
    [
        ({"features.0.0.weight": torch.full((32, 3, 3, 3), math.nan)}, "not finite in 1 of 1 ten"),
        ({"features.0.0.weight": "text"}, "its entry 'features.0.0.weight' is of type str"),
        ({"features.0.1.running_var": -torch.ones(32)}, "negative variances in 1 tensors"),
        ({"classifier.1.bias": torch.ones(1000)}, "has no features.0.0.weight, which mobilenet_v2"),
        (
            {"features.0.1.gain_logit": torch.zeros(())},
            "has features.0.1.gain_logit, of Kalman Norm",
        ),
    ],
)
def test_weights_that_cannot_be_those_of_the_network(tmp_path, state, sentence):
    path = tmp_path / "broken.pth"
    torch.save({"model": state}, path)
    with pytest.raises(InputError, match=f"NETWORK_WEIGHTS .*broken.pth .*{sentence}"):
        build_backbone(network_cfg(MODEL__KN__NETWORK_WEIGHTS=str(path)))


def test_what_it_refuses(tmp_path):
    other = tmp_path / "other.pth"
    torch.save({"features.0.0.weight": torch.ones(1)}, other)
    for options, sentence in (
        (dict(MODEL__KN__NETWORK="nothing"), "no network 'nothing'"),
        (dict(MODEL__KN__NETWORK="vgg11"), "neither BatchNorm2d nor GroupNorm"),
        (dict(MODEL__KN__NETWORK="vit_b_16"), "NETWORK is 'vit_b_16', which torch.fx cannot trace"),
        (dict(MODEL__RESNETS__OUT_FEATURES=["res6"]), "has 'res6', .* give some of res2, res3"),
        (dict(MODEL__BACKBONE__FREEZE_AT=2), "FREEZE_AT is 2, but"),
        (dict(MODEL__RESNETS__NORM="GKN"), "NORM is 'GKN', but"),
        (dict(MODEL__KN__NETWORK_WEIGHTS="/no/such.pth"), "NETWORK_WEIGHTS /no/such.pth does not"),
        (dict(MODEL__KN__NETWORK_WEIGHTS=str(tmp_path)), "NETWORK_WEIGHTS .* is a folder"),
        (dict(MODEL__KN__NETWORK_WEIGHTS=str(other)), "features.0.0.weight of shape .1,., but"),
    ):
        with pytest.raises(InputError, match=sentence):
            build_backbone(network_cfg(**options))
