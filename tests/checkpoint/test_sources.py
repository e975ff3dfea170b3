"""Weights of every source are recognised by their names, and become detectron2's."""

import argparse
import dataclasses
import pickle
import re

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from kn_detectron import InputError
from kn_detectron.checkpoint import Conventions, KNCheckpointer, read_weights

from ..models import build_backbone, build_rcnn, randomize, rcnn_cfg, resnet_cfg
from . import formats
from .networks import trained_batch_norm

RGB = Conventions("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375), False)
BGR = Conventions("BGR", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0), True)
UNKNOWN = Conventions()


@pytest.fixture(scope="module")
def trained():
    """The state of a trained Mask R-CNN C4 with BatchNorm."""
    return trained_batch_norm().state_dict()


@pytest.fixture
def resnet(trained):
    return formats.bare(trained)


def _same(weights, wanted):
    for name, tensor in wanted.items():
        if "num_batches" not in name:
            assert torch.equal(weights.state[name], tensor), name


# Names.


BATCH_NORM = {
    "MSRA": ("R-50.pkl", formats.msra, BGR),
    "Caffe2 without wrapper": ("R-50.pkl", formats.caffe2, BGR),
    "torchvision": ("resnet50.pth", formats.torchvision, RGB),
    "torchvision's training": (
        "checkpoint.pth",
        lambda s: {"model": formats.torchvision(s), "epoch": 9, "args": argparse.Namespace(lr=0.1)},
        RGB,
    ),
    "DistributedDataParallel": (
        "model.pth",
        lambda s: {"state_dict": {f"module.{n}": t for n, t in formats.torchvision(s).items()}},
        RGB,
    ),
    "timm": ("model.safetensors", formats.torchvision, RGB),
    "timm's training": (
        "last.pth.tar",
        lambda s: {
            "state_dict": formats.torchvision(s),
            "state_dict_ema": {n: t * 0 for n, t in formats.torchvision(s).items()},
            "args": argparse.Namespace(model="resnet50"),
            "arch": "resnet50",
        },
        RGB,
    ),
    "detectron2's torchvision": (
        "r50.pkl",
        lambda s: formats.model_zoo(s, "torchvision", matching_heuristics=True),
        RGB,
    ),
    "detectron2's MSRA, renamed": ("r50.pkl", lambda s: formats.model_zoo(s, "MSRA"), BGR),
    "somebody's": ("r50.pth", lambda s: {"model": s}, UNKNOWN),
    "our own": (
        "backbone.pth",
        lambda s: {"model": {**s, "linear.weight": torch.ones(2)}, "kn_detectron": BGR.to_dict()},
        BGR,
    ),
}


@pytest.mark.parametrize("kind", BATCH_NORM)
def test_a_bare_resnet_reaches_backbone_and_res5(tmp_path, trained, resnet, kind):
    name, content, conventions = BATCH_NORM[kind]
    path = formats.write(tmp_path, content(resnet), name)
    weights = read_weights(path)
    _same(weights, resnet)
    assert weights.conventions == conventions
    assert weights.matching_heuristics
    model = build_rcnn(rcnn_cfg("KN"))
    KNCheckpointer(model).load(path, [])
    state = model.state_dict()
    loaded = [n for n in trained if formats.bare([n] and {n: 0}) and "num_batches" not in n]
    assert len(loaded) == 53 * 5
    for name in loaded:
        assert torch.equal(state[name], trained[name]), name


@pytest.mark.parametrize("fpn", [False, True])
@pytest.mark.parametrize("norm", ["BN", "SyncBN", "FrozenBN"])
@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_a_detector_of_detectron2_keeps_its_names(tmp_path, norm, fpn, suffix):
    options, kn = {}, {}
    if fpn:
        options = dict(
            MODEL__RESNETS__OUT_FEATURES=["res2", "res3", "res4", "res5"],
            MODEL__RPN__IN_FEATURES=["p2", "p3", "p4", "p5", "p6"],
            MODEL__ROI_HEADS__IN_FEATURES=["p2", "p3", "p4", "p5"],
            MODEL__FPN__IN_FEATURES=["res2", "res3", "res4", "res5"],
            MODEL__FPN__OUT_CHANNELS=8,
            MODEL__ANCHOR_GENERATOR__SIZES=[[8], [16], [32], [64], [128]],
            MODEL__ROI_HEADS__NAME="StandardROIHeads",
            MODEL__ROI_BOX_HEAD__NAME="FastRCNNConvFCHead",
            MODEL__ROI_BOX_HEAD__NUM_FC=1,
            MODEL__ROI_BOX_HEAD__FC_DIM=16,
            MODEL__ROI_MASK_HEAD__NUM_CONV=1,
        )
        kn = dict(MODEL__BACKBONE__NAME="build_kn_resnet_fpn_backbone")
        options["MODEL__BACKBONE__NAME"] = "build_resnet_fpn_backbone"
    source = randomize(build_rcnn(rcnn_cfg(norm, **options))).state_dict()
    # Versions of detectron2 before 2021 have these too.
    source["pixel_mean"] = torch.tensor([103.53, 116.28, 123.675]).view(3, 1, 1)
    source["pixel_std"] = torch.ones(3, 1, 1)
    source["proposal_generator.anchor_generator.cell_anchors.0"] = torch.ones(3, 4)
    content = {"model": source, "iteration": 9} if suffix == ".pth" else formats.model_zoo(source)
    path = formats.write(tmp_path, content, f"model_final{suffix}")
    weights = read_weights(path)
    assert not weights.matching_heuristics and weights.rest.get("iteration", 9) == 9
    assert weights.conventions == dataclasses.replace(BGR, pixel_format=None, stride_in_1x1=None)
    _same(weights, source)
    model = build_rcnn(rcnn_cfg("KN", **{**options, **kn}), seed=1)
    KNCheckpointer(model).load(path, [])
    state = model.state_dict()
    for name, tensor in source.items():
        if "num_batches" not in name and "cell_anchors" not in name and name in state:
            assert torch.equal(state[name], tensor), name
    for name in ("proposal_generator.rpn_head.conv.weight", "roi_heads.mask_head.deconv.bias"):
        assert torch.equal(state[name], source[name])


def test_a_detector_of_detectron1(tmp_path, resnet):
    arrays = formats.detectron1(resnet)["blobs"]
    arrays.update(conv_rpn_w=np.ones((2, 2, 3, 3), "f"), bbox_pred_w=np.ones((12, 4), "f"))
    path = formats.write(tmp_path, {"blobs": arrays, "cfg": "a: 1"}, "model_final.pkl")
    weights = read_weights(path)
    _same(weights, formats.without_statistics(resnet))
    assert weights.state["proposal_generator.rpn_head.conv.weight"].shape == (2, 2, 3, 3)
    assert weights.state["bbox_pred.weight"].shape == (8, 4)  # without the background's
    assert not any("momentum" in name for name in weights.state)


# The state under another key, or its names behind those of wrappers: the same as the plain file.
WRAPPED = {
    "torch's tutorial": (lambda s: {"model_state_dict": s, "epoch": 3}, ""),
    "a key of its own": (lambda s: {"net": s, "epoch": 3}, "its weights under net"),
    "averages alone": (lambda s: {"model_ema": s, "epoch": 3}, "its weights under model_ema"),
    "numpy's numbers": (
        lambda s: {"model": s, "best": np.float64(0.7), "steps": np.int64(9), "on": np.bool_(True)},
        "",
    ),
    "numbers beside tensors": (
        lambda s: {**s, "epoch": 3, "best": np.float32(0.7)},
        "no tensors beside its weights: epoch, best",
    ),
    "compiled, then DistributedDataParallel": (
        lambda s: {"model": _prefixed(s, "module._orig_mod.")},
        "wrapped model: _orig_mod, module left out",
    ),
    "DistributedDataParallel, then compiled": (
        lambda s: {"model": _prefixed(s, "_orig_mod.module.")},
        "wrapped model: _orig_mod, module left out",
    ),
    "twice": (lambda s: _prefixed(s, "module.module."), "wrapped model: module left out"),
    "compiled, checkpointed and sharded parts": (
        lambda s: {
            re.sub(r"^(\w+)\.(\w+)\.", r"\1._orig_mod.\2._checkpoint_wrapped_module.", n): t
            for n, t in _prefixed(s, "_fsdp_wrapped_module.").items()
        },
        "wrapped model: _checkpoint_wrapped_module, _fsdp_wrapped_module, _orig_mod left out",
    ),
    "one foreign prefix": (
        lambda s: {"state_dict": _prefixed(s, "detector.net.")},
        "has detector.net. in front of all names",
    ),
}


def _prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize("names", ["detectron2", "torchvision"])
@pytest.mark.parametrize("kind", WRAPPED)
def test_wrapped_weights_are_the_plain_ones(tmp_path, resnet, caplog, kind, names):
    wrap, line = WRAPPED[kind]
    state = formats.torchvision(resnet) if names == "torchvision" else resnet
    path = formats.write(tmp_path, wrap(state))
    with caplog.at_level("INFO", "kn_detectron"):
        weights = read_weights(path)
    plain = read_weights(formats.write(tmp_path, state, "plain.pth"))
    assert set(weights.state) == set(plain.state)
    _same(weights, plain.state)
    assert weights.conventions == plain.conventions
    assert line in caplog.text


def test_wrapped_detectors_load_strictly(tmp_path, trained):
    # By torch's own wrappers, whose names are theirs to choose.
    for wrap in (
        torch.optim.swa_utils.AveragedModel,
        lambda m: nn.DataParallel(torch.compile(m)),
        lambda m: torch.compile(nn.DataParallel(m)),
    ):
        source = build_rcnn(rcnn_cfg("BN"))
        source.load_state_dict(trained)
        path = formats.write(tmp_path, {"model_state_dict": wrap(source).state_dict()})
        model = build_rcnn(rcnn_cfg("BN"), seed=1)
        KNCheckpointer(model).load(path, [], strict=True)
        for name, tensor in trained.items():
            assert torch.equal(model.state_dict()[name], tensor), name


def test_two_networks_are_not_made_one(tmp_path, resnet):
    state = {**resnet, **_prefixed({n: t * 0 for n, t in resnet.items()}, "module.")}
    weights = read_weights(formats.write(tmp_path, state))
    _same(weights, state)


def test_averages_are_left_and_said_so(tmp_path, resnet, caplog):
    name, content, _ = BATCH_NORM["timm's training"]
    with caplog.at_level("INFO", "kn_detectron"):
        read_weights(formats.write(tmp_path, content(resnet), name))
    assert "the weights state_dict_ema beside state_dict: they are not used" in caplog.text


# Conventions that the kind of network decides.


def _conventions(tmp_path, content, name="r.pkl"):
    return read_weights(formats.write(tmp_path, content, name)).conventions


def test_conventions_of_caffe2(tmp_path, resnet):
    # All of Detectron1's have PIXEL_STD 1; GroupNorm's and ResNeXt's have their stride in the 3x3.
    in_3x3 = dataclasses.replace(BGR, stride_in_1x1=False)
    assert _conventions(tmp_path, formats.detectron1(resnet)) == BGR
    assert _conventions(tmp_path, formats.group_norm(resnet)) == in_3x3
    resnext = {n: t[:, ::2] if "conv2.weight" in n else t for n, t in resnet.items()}
    assert _conventions(tmp_path, formats.caffe2(resnext)) == in_3x3
    # detectron2's X-101-32x8d.pkl: see its configs.
    want = dataclasses.replace(in_3x3, pixel_std=(57.375, 57.12, 58.395))
    assert _conventions(tmp_path, formats.msra(resnext)) == want


def test_basic_blocks_have_no_stride_convention(tmp_path):
    net = {n: t for n, t in torchvision.models.resnet18(num_classes=2).state_dict().items()}
    want = dataclasses.replace(RGB, stride_in_1x1=None)
    assert _conventions(tmp_path, net, "resnet18.pth") == want
    renamed = read_weights(str(tmp_path / "resnet18.pth")).state
    assert _conventions(tmp_path, formats.model_zoo(renamed, "torchvision")) == want


def test_the_classifier_that_detectron2s_script_puts_into_the_stem(tmp_path, resnet):
    """tools/convert-torchvision-to-d2.py renames all that is in no stage."""
    state = {**resnet, "stem.fc.weight": torch.rand(10, 4), "stem.fc.bias": torch.rand(10)}
    path = formats.write(tmp_path, formats.model_zoo(state, "torchvision"), "r50.pkl")
    found = read_weights(path).state
    assert set(found) - set(resnet) == {"linear.weight", "linear.bias"}
    assert torch.equal(found["linear.weight"], state["stem.fc.weight"])


def test_an_entry_of_ours_that_is_not(tmp_path, resnet):
    path = formats.write(tmp_path, {"model": resnet, "kn_detectron": {"pixel_mean": "gray"}})
    with pytest.raises(InputError, match="pixel_mean is a str"):
        read_weights(path)


# torchvision itself: independent of our mapping of names.


ARCHITECTURES = {
    "resnet18": dict(DEPTH=18, RES2_OUT_CHANNELS=64),
    "resnet34": dict(DEPTH=34, RES2_OUT_CHANNELS=64),
    "resnet50": dict(DEPTH=50),
    "resnet101": dict(DEPTH=101),
    "resnet152": dict(DEPTH=152),
    "resnext50_32x4d": dict(DEPTH=50, NUM_GROUPS=32, WIDTH_PER_GROUP=4),
    "resnext101_32x8d": dict(DEPTH=101, NUM_GROUPS=32, WIDTH_PER_GROUP=8),
    "wide_resnet50_2": dict(DEPTH=50, WIDTH_PER_GROUP=128),
}


def _full_size_cfg(norm, name):
    cfg = resnet_cfg(norm)
    cfg.MODEL.RESNETS.merge_from_other_cfg(type(cfg)(ARCHITECTURES[name]))
    defaults = dict(STEM_OUT_CHANNELS=64, RES2_OUT_CHANNELS=256, WIDTH_PER_GROUP=64)
    for key, value in {**defaults, **ARCHITECTURES[name]}.items():
        cfg.MODEL.RESNETS[key] = value
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res5"]
    return cfg


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_resnet_of_torchvision_has_its_place(tmp_path, name):
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name, num_classes=10).state_dict()
        ours = build_backbone(_full_size_cfg("BN", name)).state_dict()
    # Views of one number, so that the file is small.
    small = {n: torch.zeros((), dtype=t.dtype).expand(t.shape) for n, t in theirs.items()}
    found = read_weights(formats.write(tmp_path, small)).state
    shapes = {n: tuple(t.shape) for n, t in found.items() if not n.startswith("linear.")}
    assert shapes == {n: tuple(t.shape) for n, t in ours.items()}


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_features_are_torchvisions_own(tmp_path, name):
    torch.manual_seed(0)
    theirs = randomize(torchvision.models.get_model(name, num_classes=10))
    with torch.no_grad():
        for _ in range(4):
            theirs.train()(torch.randn(8, 3, 64, 64))
        path = formats.write(tmp_path, theirs.state_dict())
        ours = build_backbone(_full_size_cfg("KN", name))
        KNCheckpointer(ours).load(path, [])
        x = torch.randn(2, 3, 64, 96)
        theirs.eval()
        stem = nn.Sequential(theirs.conv1, theirs.bn1, theirs.relu, theirs.maxpool)
        res3 = theirs.layer2(theirs.layer1(stem(x)))
        res5 = theirs.layer4(theirs.layer3(res3))
        got = ours.eval()(x)
    assert (got["res3"] - res3).abs().max() <= 1e-5 * res3.abs().max()
    assert (got["res5"] - res5).abs().max() <= 1e-5 * res5.abs().max()


# What is refused.


def _refused(path, *patterns):
    with pytest.raises(InputError) as error:
        read_weights(str(path))
    message = str(error.value)
    assert str(path) in message and "\n" not in message
    for pattern in patterns:
        assert pattern in message, message


@pytest.mark.parametrize(
    "extra",
    ["layer1.0.se.fc1.weight", "conv1.0.weight", "layer1.0.downsample.2.weight", "head.fc.weight"],
)
def test_a_network_that_detectron2_does_not_have(tmp_path, resnet, extra):
    state = {**formats.torchvision(resnet), extra: torch.ones(4)}
    _refused(formats.write(tmp_path, state, "m.safetensors"), extra, "plain ResNet")


def test_the_file_is_read_once(tmp_path, resnet, monkeypatch):
    # What is used is what was checked, whatever becomes of the file in between.
    path = tmp_path / "m.pkl"
    path.write_bytes(pickle.dumps(formats.msra(resnet)))
    loads = []
    monkeypatch.setattr(pickle, "load", lambda *args, **kwargs: loads.append(args))
    KNCheckpointer(build_backbone(resnet_cfg("BN", MODEL__RESNETS__OUT_FEATURES=["res5"]))).load(
        str(path), []
    )
    assert not loads


@pytest.mark.parametrize("kind", ["torchvision", "MSRA", "our own"])
def test_negative_variances_and_nan(tmp_path, resnet, kind):
    name, content, _ = BATCH_NORM[kind]
    resnet = dict(resnet)
    for tensor, value, patterns in (
        (
            "res3.1.conv2.norm.running_var",
            -1e-3,
            ["negative variances in 1 tensors, the first res"],
        ),
        ("res2.0.conv1.weight", float("nan"), ["not finite in 1 of"]),
        ("res2.0.conv1.weight", float("inf"), ["not finite in 1 of"]),
    ):
        broken = {**resnet, tensor: resnet[tensor].clone()}
        broken[tensor].view(-1)[3] = value
        _refused(formats.write(tmp_path, content(broken), name), *patterns)


@pytest.mark.parametrize(
    "content",
    [
        {"model": {"stem.conv1.weight": torch.ones(2).to_sparse()}},
        {"model": {"stem.conv1.weight": torch.ones(2, dtype=torch.complex64)}},
        {"model": {3: torch.ones(2)}},
        {"model": {}},
        {"model": 3},
    ],
)
def test_what_is_no_network(tmp_path, content):
    _refused(formats.write(tmp_path, content), "not a checkpoint of a model")
