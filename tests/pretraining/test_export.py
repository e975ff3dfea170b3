"""backbone.pth in detectors."""

import pytest
import torch
from detectron2.modeling import build_model

from kn_detectron import model_zoo
from kn_detectron.checkpoint import KNCheckpointer
from kn_detectron.checkpoint.conventions import CHECKPOINT_KEY, Conventions
from kn_detectron.pretraining import ImageClassifier, NetworkClassifier, export_backbone

from ..models import fpn_rcnn_cfg, randomize, rcnn_cfg
from .conftest import config

_OPTIONS = dict(MODEL__PIXEL_STD=[57.0, 58.0, 59.0], MODEL__RESNETS__STRIDE_IN_1X1=False)


def _fpn(norm):
    detection = model_zoo.get_config("shapes/mask_rcnn_slim_R50_FPN_KN.yaml")
    if norm != "KN":
        detection.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
        detection.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
        detection.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
        detection.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
        for part in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD"):
            detection.MODEL[part].NORM = norm
    return detection


def _exported(detection, path):
    cfg = config("d", norm=None, detection=detection)
    torch.manual_seed(0)
    model = randomize(ImageClassifier(cfg))
    export_backbone(model.state_dict(), str(path), Conventions.of_config(cfg))
    return model


def _assert_loaded(detector, model):
    """Stem to res5 have the values of the classifier, wherever they stand in the detector."""
    expected = {n.removeprefix("backbone."): t for n, t in model.state_dict().items()}
    expected.pop("linear.weight"), expected.pop("linear.bias")
    found = detector.state_dict()
    for name, tensor in expected.items():
        if name.endswith("num_batches_tracked"):
            continue
        (place,) = [n for n in found if n == name or n.endswith("." + name)]
        torch.testing.assert_close(found[place], tensor, msg=name)
    return expected


@pytest.mark.parametrize("variant", ["network", "paper"])
def test_kn_c4_gets_everything(tmp_path, variant, kn_log):
    detection = rcnn_cfg("KN", MODEL__KN__VARIANT=variant, **_OPTIONS)
    model = _exported(detection, tmp_path / "backbone.pth")
    detector = build_model(detection)
    KNCheckpointer(detector).load(str(tmp_path / "backbone.pth"), checkpointables=[])
    expected = _assert_loaded(detector, model)
    kind = "mean_offset" if variant == "network" else "process_noise"
    assert {"res2.0.conv1.norm.gain_logit", f"res5.2.conv3.norm.{kind}"} <= set(expected)
    assert "priors" not in kn_log.text  # as if they had to be fitted


@pytest.mark.parametrize("norm", ["KN", "GN8"])
def test_fpn_gets_everything(tmp_path, norm):
    model = _exported(_fpn(norm), tmp_path / "backbone.pth")
    detector = build_model(_fpn(norm))
    KNCheckpointer(detector).load(str(tmp_path / "backbone.pth"), checkpointables=[])
    _assert_loaded(detector, model)


@pytest.mark.parametrize("norm", ["GKN", "BN", "FrozenBN"])
def test_c4_of_other_norms(tmp_path, norm):
    detection = rcnn_cfg("GKN" if norm == "GKN" else "BN", MODEL__RESNETS__NORM=norm)
    model = _exported(detection, tmp_path / "backbone.pth")
    detector = build_model(detection)
    KNCheckpointer(detector).load(str(tmp_path / "backbone.pth"), checkpointables=[])
    _assert_loaded(detector, model)


def test_content(tmp_path):
    detection = rcnn_cfg("KN", **_OPTIONS)
    _exported(detection, tmp_path / "backbone.pth")
    content = torch.load(tmp_path / "backbone.pth", weights_only=True)
    assert content["matching_heuristics"] is True and content["__author__"] == "kn_detectron"
    assert content[CHECKPOINT_KEY] == Conventions.of_config(detection).to_dict()
    assert content[CHECKPOINT_KEY]["pixel_std"] == [57.0, 58.0, 59.0]
    assert all(tensor.is_contiguous() for tensor in content["model"].values())
    assert {name.partition(".")[0] for name in content["model"]} == {
        *("stem", "res2", "res3", "res4", "res5", "linear")
    }


def _network_classifier(name, norm="KN"):
    return randomize(NetworkClassifier(config("d", norm=norm, network=name)))


@pytest.mark.parametrize("norm", ["KN", "BN"])
def test_classifiers_with_torchvisions_names_load_their_own_checkpoints(tmp_path, norm):
    """Their tensors are called as in files of torchvision, whose names are changed otherwise."""
    model = _network_classifier("resnet18", norm)
    KNCheckpointer(model, str(tmp_path)).save("model_final")
    other = NetworkClassifier(config("d", norm=norm, network="resnet18"))
    KNCheckpointer(other).load_for_evaluation(str(tmp_path / "model_final.pth"))
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


def test_detectors_take_classifiers_with_torchvisions_names(tmp_path):
    model, path = _network_classifier("resnet18"), str(tmp_path / "backbone.pth")
    conventions = Conventions.of_config(config("d", norm="KN", network="resnet18"))
    export_backbone(model.state_dict(), path, conventions)
    detection = fpn_rcnn_cfg(
        "KN",
        MODEL__BACKBONE__NAME="build_kn_network_fpn_backbone",
        MODEL__KN__NETWORK="resnet18",
    )
    detector = build_model(detection)
    KNCheckpointer(detector).load(path, checkpointables=[])
    found = detector.backbone.bottom_up.network.state_dict()
    assert sum(name.endswith("gain_logit") for name in found) == 20
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, model.state_dict()[f"backbone.{name}"], msg=name)
