"""A folded model is detectron2's own, and detects what the Kalman model does."""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import detectron2
import detectron2.layers
import pytest
import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import FrozenBatchNorm2d

import kn_detectron
from kn_detectron import InputError, KalmanNorm2d
from kn_detectron.checkpoint import (
    Conventions,
    KNCheckpointer,
    fold,
    fold_into,
    fold_weights,
    read_weights,
)
from kn_detectron.checkpoint.folding import _carry_eps, stock_config
from kn_detectron.layers import GroupKalmanNorm2d

from ..models import build_rcnn, fpn_rcnn_cfg, images, randomize, rcnn_cfg, retinanet_cfg
from .deployed import assert_same_detections, c4_cfg, detect, fpn_cfg, pictures, trained

CONFIGS = {
    "c4": lambda: c4_cfg(MODEL__BACKBONE__FREEZE_AT=2),
    "c4_paper": lambda: c4_cfg(MODEL__KN__VARIANT="paper", MODEL__RESNETS__STRIDE_IN_1X1=False),
    "fpn": fpn_cfg,
}

# What detectron2 alone makes of the files. Old versions of it need a repair before they can be
# imported, which is loaded from its file as any user could have it; newer ones are left alone.
_STOCK = """
import importlib, logging, sys, types
import torch

package, pictures, results, *configs = sys.argv[1:]
sys.modules["kn_detectron"] = None  # cannot be imported
sys.modules["alone"] = types.ModuleType("alone")
sys.modules["alone"].__path__ = [package]
importlib.import_module("alone.compat").prepare_detectron2()

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model

complaints = []
listener = logging.Handler(logging.WARNING)
listener.emit = lambda record: complaints.append(record.getMessage())
logging.getLogger().addHandler(listener)

def detect(config):
    cfg = get_cfg()
    cfg.merge_from_file(config)
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).eval()
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    loaded = set(torch.load(cfg.MODEL.WEIGHTS)["model"])
    complaints.extend(loaded ^ set(model.state_dict()))
    with torch.no_grad():
        found = model.inference(torch.load(pictures), do_postprocess=False)
    return [{k: getattr(v, "tensor", v) for k, v in f.get_fields().items()} for f in found]

found = {config: detect(config) for config in configs}
files = [getattr(module, "__file__", None) or "" for module in list(sys.modules.values())]
ours = [file for file in files if file.startswith(package)]
torch.save({"found": found, "complaints": complaints, "ours": ours}, results)
"""


@pytest.fixture(scope="module")
def models():
    """By name, the config and the trained model."""
    configs = {name: build() for name, build in CONFIGS.items()}
    return {name: (cfg, trained(cfg)) for name, cfg in configs.items()}


@pytest.fixture(scope="module")
def checkpoint(models, tmp_path_factory):
    """The checkpoint of the C4 model."""
    folder = tmp_path_factory.mktemp("checkpoint")
    KNCheckpointer(models["c4"][1], str(folder)).save("model", iteration=1)
    return str(folder / "model.pth")


@pytest.fixture(scope="module")
def stock(models, tmp_path_factory):
    """What detectron2 alone gives for the folded files, and where the files are, by name."""
    folder = tmp_path_factory.mktemp("folded")
    files = {}
    for name, (cfg, model) in models.items():
        KNCheckpointer(model, str(folder)).save(name)
        cfg = cfg.clone()
        cfg.MODEL.WEIGHTS = str(folder / f"{name}.pth")
        files[name] = fold_weights(cfg, str(folder / "out" / name))
    torch.save([{"image": picture["image"]} for picture in pictures()], folder / "pictures.pth")
    configs = [config for _, config in files.values()]
    package = str(Path(kn_detectron.__file__).parent)
    arguments = [package, str(folder / "pictures.pth"), str(folder / "results.pth"), *configs]
    result = subprocess.run(
        [sys.executable, "-c", _STOCK, *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(detectron2.__file__).parents[1])},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return torch.load(folder / "results.pth"), files


@pytest.mark.parametrize("name", CONFIGS)
def test_detectron2_alone_detects_the_same(name, models, stock):
    results, files = stock
    _, config = files[name]
    assert_same_detections(detect(models[name][1], pictures()), results["found"][config])


def test_detectron2_alone_has_nothing_to_complain_of(stock):
    results, _ = stock
    assert results["complaints"] == []
    assert {Path(file).name for file in results["ours"]} <= {"compat.py", "errors.py"}


@pytest.mark.parametrize("name", CONFIGS)
def test_files_have_nothing_of_this_package(name, stock):
    weights, config = stock[1][name]
    with open(config) as file:
        content = yaml.safe_load(file)
    assert content["MODEL"].pop("WEIGHTS") == weights and os.path.isabs(weights)
    assert not re.search("kn|kalman", yaml.safe_dump(content), re.IGNORECASE)
    assert content["MODEL"]["ROI_HEADS"]["NUM_CLASSES"] == 5 and "DEVICE" not in content["MODEL"]
    for tensor in torch.load(weights)["model"]:
        assert not re.search("gain|offset|log_var|noise|num_batches", tensor)


def test_weights_say_what_images_they_are_for(models, stock):
    for name, (weights, _) in stock[1].items():
        assert read_weights(weights).conventions == Conventions.of_config(models[name][0])


def test_config_has_the_stock_names(models):
    c4, fpn = (stock_config(models[name][0]).MODEL for name in ("c4", "fpn"))
    assert (c4.BACKBONE.NAME, c4.ROI_HEADS.NAME) == ("build_resnet_backbone", "Res5ROIHeads")
    assert c4.BACKBONE.FREEZE_AT == 2 and c4.DEVICE == "cpu" and "KN" not in c4
    assert fpn.BACKBONE.NAME == "build_resnet_fpn_backbone"
    assert fpn.ROI_HEADS.NAME == "StandardROIHeads"
    assert fpn.ROI_BOX_HEAD.NAME == "FastRCNNConvFCHead"
    assert fpn.ROI_MASK_HEAD.NAME == "MaskRCNNConvUpsampleHead"
    for node in (fpn.RESNETS, fpn.FPN, fpn.ROI_BOX_HEAD, fpn.ROI_MASK_HEAD):
        assert node.NORM == "FrozenBN"
    cascade = stock_config(fpn_cfg(MODEL__ROI_HEADS__NAME="KNCascadeROIHeads")).MODEL
    assert cascade.ROI_HEADS.NAME == "CascadeROIHeads"


def test_other_norms_stay_and_group_norm_without_priors_is_detectron2s():
    norms = dict(MODEL__FPN__NORM="GKN", MODEL__ROI_BOX_HEAD__NORM="BN")
    stock = stock_config(fpn_cfg(MODEL__ROI_MASK_HEAD__NORM="GN32", **norms)).MODEL
    assert (stock.FPN.NORM, stock.ROI_BOX_HEAD.NORM) == ("GN", "BN")
    assert stock.ROI_MASK_HEAD.NORM == "GN"


def test_keys_of_other_projects_stay(models, checkpoint, tmp_path):
    """As those of PointRend, without which its heads cannot be built."""
    cfg = models["c4"][0].clone()
    cfg.DATASETS.CLASS_NAMES = ["circle"]
    cfg.MODEL.WEIGHTS = checkpoint
    cfg.MODEL.POINT_HEAD = CfgNode({"NORM": "KN", "POINTS": 3})
    cfg.MODEL.DEVICE = "cuda"  # the folding is done on the CPU
    cfg.freeze()
    before = cfg.dump()
    _, config = fold_weights(cfg, str(tmp_path / "folded"))
    assert cfg.is_frozen() and cfg.dump() == before
    stock = get_cfg()
    stock.MODEL.POINT_HEAD = CfgNode({"NORM": "", "POINTS": 0})
    stock.merge_from_file(config)
    assert stock.MODEL.POINT_HEAD == {"NORM": "FrozenBN", "POINTS": 3}
    assert stock.DATASETS == {**get_cfg().DATASETS, "TEST": stock.DATASETS.TEST}


def test_fold_leaves_the_model_as_it_is(models):
    cfg, model = models["c4"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _, folded = fold(cfg, model)
    assert not folded.training
    name = "roi_heads.res5.0.conv1.norm.running_var"
    assert torch.equal(folded.state_dict()[name], before[name])
    with torch.no_grad():
        for tensor in folded.state_dict().values():
            tensor.zero_()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("name", CONFIGS)
def test_folded_model_is_frozen_in_training(name, models):
    cfg, model = models[name]
    _, folded = fold(cfg, model)
    norms = [
        n for n, m in model.named_modules() if isinstance(m, (KalmanNorm2d, FrozenBatchNorm2d))
    ]
    assert norms == [n for n, m in folded.named_modules() if isinstance(m, FrozenBatchNorm2d)]
    before = {name: value.clone() for name, value in folded.state_dict().items()}
    with torch.no_grad():
        expected = model.backbone(images())
    found = folded.train().backbone(images())
    for level, feature in expected.items():
        assert found[level].requires_grad
        # Relative to the largest: with gradients FrozenBatchNorm2d rounds otherwise.
        scale = feature.abs().max()
        torch.testing.assert_close(found[level] / scale, feature / scale, rtol=0, atol=1e-5)
    for name, value in folded.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("name", ["c4", "fpn"])
def test_another_eps_is_carried(name, models):
    cfg, model = models[name]
    model = copy.deepcopy(model)
    for i, norm in enumerate(m for m in model.modules() if hasattr(m, "eps")):
        norm.eps = (1e-3, 1e-6)[i % 2]
    with torch.no_grad():
        expected = model.backbone(images())
        differing = models[name][1].backbone(images())
        found = fold(cfg, model)[1].backbone(images())
    for level, feature in expected.items():
        scale = feature.abs().max()
        torch.testing.assert_close(found[level] / scale, feature / scale, rtol=0, atol=1e-5)
        assert (differing[level] - feature).abs().max() > 1e-3 * scale
    detected = detect(fold(cfg, model)[1], pictures())
    # An eps in the scale rounds differently, and boxes are exponentials of what differs.
    assert_same_detections(detect(model, pictures()), detected, tolerance=1e-3)


def test_another_eps_of_a_norm_that_shares_its_scale():
    """As the norms of RetinaNet's levels do: the difference goes into the variance."""
    norm = torch.nn.Sequential(KalmanNorm2d(3, eps=1e-3, affine=False)).eval()
    norm[0].running_var.copy_(torch.tensor([1e-4, 0.01, 1.0]))
    stock = torch.nn.Sequential(torch.nn.BatchNorm2d(3, affine=False)).eval()
    state = norm.state_dict()
    _carry_eps(norm, stock, state)
    stock.load_state_dict({name: state[name] for name in stock.state_dict()})
    x = images(2, 8)
    torch.testing.assert_close(stock(x), norm(x))


def test_a_head_of_its_own_chain_is_group_norm():
    """GKN without a prior, as a mask head of detectron2's has it under the norm "GKN"."""
    norm = randomize(torch.nn.Sequential(GroupKalmanNorm2d(2, 4, gain=None)))
    folded = fold_into(norm, torch.nn.Sequential(torch.nn.GroupNorm(2, 4)))
    x = images(2, 8)[:, [0, 1, 2, 0]]
    torch.testing.assert_close(folded(x), norm.eval()(x))
    with pytest.raises(InputError, match="^0 takes its statistics from the images at hand"):
        fold_into(torch.nn.Sequential(GroupKalmanNorm2d(2, 4)), folded)


# RetinaNet, whose towers have statistics for each level, as detectron2 has them from 0.6 on.

PER_LEVEL = hasattr(detectron2.layers, "CycleBatchNormList")


@pytest.mark.skipif(not PER_LEVEL, reason="this detectron2 has no BatchNorm per level")
@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_towers_become_batch_norm_per_level(eps):
    cfg = retinanet_cfg("KN")
    model = trained(cfg)
    for layer in model.modules():
        if isinstance(layer, KalmanNorm2d):
            layer.eps = eps
    stock, folded = fold(cfg, model)
    assert stock.MODEL.META_ARCHITECTURE == type(folded).__name__ == "RetinaNet"
    assert (stock.MODEL.RETINANET.NORM, stock.MODEL.FPN.NORM) == ("BN", "FrozenBN")
    assert not any(isinstance(layer, KalmanNorm2d) for layer in folded.modules())
    with torch.no_grad():
        expected, found = (
            one.head([one.backbone(images())[name] for name in ("p3", "p4", "p5", "p6", "p7")])
            for one in (model, folded)
        )
    for one, other in zip(sum(found, []), sum(expected, []), strict=True):
        scale = other.abs().max()
        torch.testing.assert_close(one / scale, other / scale, rtol=0, atol=1e-4)


def test_towers_where_detectron2_has_no_batch_norm_per_level(monkeypatch):
    monkeypatch.delattr(detectron2.layers, "CycleBatchNormList", raising=False)
    with pytest.raises(InputError, match='MODEL.RETINANET.NORM is "KN", .* 0.6 or newer'):
        stock_config(retinanet_cfg("KN"))
    assert stock_config(retinanet_cfg("KN", MODEL__RETINANET__NORM="")).MODEL.RETINANET.NORM == ""


# Refusing what cannot be folded.


@pytest.mark.parametrize(
    "build, patterns",
    [
        (lambda: rcnn_cfg("GKN"), ('MODEL.RESNETS.NORM is "GKN"', "from each image")),
        (
            lambda: c4_cfg(MODEL__KN__EVAL_STATISTICS="batch"),
            ('EVAL_STATISTICS is "batch"', "add MODEL.KN.EVAL_STATISTICS moving"),
        ),
        (lambda: fpn_rcnn_cfg("GKN"), ('MODEL.RESNETS.NORM is "GKN"', "from each image")),
        (lambda: fpn_cfg(MODEL__FPN__NORM="GN8"), ('MODEL.FPN.NORM is "GN8"',)),
        (lambda: c4_cfg(MODEL__KN__GAIN=2), ("MODEL.KN.GAIN is 2",)),
        (lambda: stock_config(c4_cfg()), ("has no MODEL.KN", "runs without this package already")),
    ],
)
def test_configs_that_cannot_be_folded(build, patterns, tmp_path):
    cfg = build()
    with pytest.raises(InputError) as error:
        fold_weights(cfg, str(tmp_path / "folded"))
    for pattern in patterns:
        assert pattern in str(error.value) and "\n" not in str(error.value)
    assert os.listdir(tmp_path) == []


def test_model_of_option_b_is_folded_when_asked_for_moving_averages(models):
    cfg, model = models["c4"]
    cfg = cfg.clone()
    cfg.MODEL.KN.EVAL_STATISTICS = "batch"
    with pytest.raises(InputError, match="EVAL_STATISTICS"):
        fold(cfg, model)
    cfg.MODEL.KN.EVAL_STATISTICS = "moving"
    _, folded = fold(cfg, model)
    assert_same_detections(detect(model, pictures()), detect(folded, pictures()))


def test_layer_without_running_statistics(models):
    cfg, model = models["c4_paper"]
    norm = model.backbone.res3[0].conv2.norm
    norm.track_running_stats = False
    with pytest.raises(InputError, match=r"^backbone.res3.0.conv2.norm has no running statistics"):
        fold(cfg, model)
    norm.track_running_stats = True


def test_group_norm_with_another_eps():
    cfg = fpn_cfg(MODEL__FPN__NORM="GN", MODEL__FPN__OUT_CHANNELS=32)
    model = build_rcnn(cfg).eval()
    model.backbone.fpn_lateral2.norm.eps = 1e-3
    with pytest.raises(InputError, match="^backbone.fpn_lateral2.norm has eps 0.001, .* 1e-05"):
        fold(cfg, model)


def test_model_of_another_config(models):
    cfg = c4_cfg(MODEL__ROI_HEADS__NUM_CLASSES=7)
    with pytest.raises(
        InputError, match="not one of the config .*box_predictor.* of another|shape"
    ):
        fold(cfg, models["c4"][1])


def _weights(kind, checkpoint, folder):
    path = folder / "bad.pth"
    if kind == "truncated":
        path.write_bytes(Path(checkpoint).read_bytes()[:5000])
    elif kind == "BatchNorm":
        state = torch.load(checkpoint)["model"]
        kept = {name: v for name, v in state.items() if not re.search("gain|offset|log_var", name)}
        torch.save({"model": kept}, path)
    elif kind == "none":
        return ""
    return str(path)


@pytest.mark.parametrize(
    "kind, pattern",
    [
        ("truncated", "is truncated"),
        ("BatchNorm", "not a checkpoint of this model .* missing"),
        ("missing", "does not exist"),
        ("none", "no weights to fold: set MODEL.WEIGHTS"),
    ],
)
def test_checkpoints_that_do_not_fit(kind, pattern, models, checkpoint, tmp_path):
    cfg = models["c4"][0].clone()
    cfg.MODEL.WEIGHTS = _weights(kind, checkpoint, tmp_path)
    (tmp_path / "out.pth").write_text("of before")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(InputError, match=pattern):
        fold_weights(cfg, str(tmp_path / "out"))
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "out.pth").read_text() == "of before"


@pytest.mark.parametrize("suffix", ["", ".pth", ".yaml"])
def test_output_does_not_replace_its_source(suffix, models, checkpoint, tmp_path):
    cfg = models["c4"][0].clone()
    folder, name = os.path.split(checkpoint)
    (tmp_path / "linked").symlink_to(folder)
    linked = str(tmp_path / "linked" / name)
    size = os.path.getsize(checkpoint)
    for source, output in ((checkpoint, linked), (linked, checkpoint)):
        cfg.MODEL.WEIGHTS = source
        with pytest.raises(InputError, match="MODEL.WEIGHTS itself"):
            fold_weights(cfg, output.replace(".pth", suffix))
    assert os.path.getsize(checkpoint) == size


def test_output_that_cannot_be_written(models, checkpoint, tmp_path):
    cfg = models["c4"][0].clone()
    cfg.MODEL.WEIGHTS = checkpoint
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file/out cannot be written .*another folder"):
        fold_weights(cfg, str(tmp_path / "file" / "out"))
    (tmp_path / "out.pth").mkdir()  # in the way of the weights, without which the config is no use
    with pytest.raises(InputError, match="out cannot be written"):
        fold_weights(cfg, str(tmp_path / "out"))
    assert sorted(os.listdir(tmp_path)) == ["file", "out.pth"]
    assert list((tmp_path / "out.pth").iterdir()) == []
