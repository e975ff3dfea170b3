"""tools/pretrain_net.py: what it takes, what it refuses, and what it prints."""

import json
import re

import pytest
import torch
import yaml

from kn_detectron.layers import KN_STATE
from kn_detectron.networks import build_network

from ..pretraining.conftest import config as classifier_config
from ..pretraining.conftest import folder, write_images  # noqa: F401

pytestmark = pytest.mark.trains

DETECTOR = {
    "VERSION": 2,
    "SEED": 3,
    "DATALOADER": {"NUM_WORKERS": 0},
    "MODEL": {
        "DEVICE": "cpu",
        "BACKBONE": {"NAME": "build_kn_resnet_backbone"},
        "RESNETS": {
            "NORM": "KN",
            "STEM_OUT_CHANNELS": 8,
            "RES2_OUT_CHANNELS": 16,
            "WIDTH_PER_GROUP": 4,
        },
        "KN": {"NUM_GROUPS": 4},
    },
}
ARGUMENTS = ("--epochs", "1", "--batch-size", "8", "--image-size", "64")


@pytest.fixture
def pretrain(tmp_path, command):
    """Runs the tool with the detector's config, and gives its status, stdout and stderr."""
    config = tmp_path / "detector.yaml"
    config.write_text(yaml.safe_dump(DETECTOR))
    return lambda *arguments: command("pretrain_net", "--config", config, *arguments)


def _assert_one_sentence(result, pattern):
    status, out, err = result
    assert status == 1
    assert "Traceback" not in out + err
    sentence = err.splitlines()[-1]  # torch has its own to say before
    assert sentence.startswith("error: ") and err.count("error: ") == 1
    assert re.search(pattern, sentence), sentence


def test_train_resume_and_evaluate(pretrain, folder, tmp_path):  # noqa: F811
    run_folder = tmp_path / "run"
    options = ("--data", folder, *ARGUMENTS, "--norm-batch-size", "2")
    # On a CPU mixed precision is switched off, as for detectors.
    status, out, err = pretrain(*options, "OUTPUT_DIR", run_folder, "SOLVER.AMP.ENABLED", "True")
    assert status == 0, err
    assert "| moving (Option A) |" in out and "KN in groups of 2 on 15 validation images" in out
    results = json.loads((run_folder / "inference" / "results.json").read_text())
    assert set(results) == {"moving", "online"} and set(results["moving"]) == {"top1", "top5"}
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    assert config["SOLVER"]["MAX_ITER"] == 3 and config["PRETRAINING"]["NUM_CLASSES"] == 3

    status, out, err = pretrain(*options, "--resume", "OUTPUT_DIR", run_folder)
    assert status == 0 and "Nothing is left to train" in out

    (run_folder / "inference" / "results.json").unlink()
    status, out, err = pretrain(*options, "--eval-only", "OUTPUT_DIR", run_folder)
    assert status == 0, err
    assert json.loads((run_folder / "inference" / "results.json").read_text()) == results


@pytest.mark.parametrize("norm", ["BN", "KN"])
def test_another_network(pretrain, folder, tmp_path, norm):  # noqa: F811
    run_folder = tmp_path / "run"
    options = ("--data", folder, "--epochs", "1", "--batch-size", "8", "--image-size", "32")
    options += ("--network", "cifar_resnet32", "--norm", norm, "--norm-batch-size", "2")
    status, out, err = pretrain(*options, "OUTPUT_DIR", run_folder)
    assert status == 0, err
    assert f"Pre-training cifar_resnet32 with {norm}" in out
    results = json.loads((run_folder / "inference" / "results.json").read_text())
    state = torch.load(run_folder / "backbone.pth")["model"]
    assert build_network("cifar_resnet32", 3).load_state_dict(
        {name: v for name, v in state.items() if name.rpartition(".")[2] not in KN_STATE}
    )
    status, out, err = pretrain(*options, "--resume", "OUTPUT_DIR", run_folder)
    assert status == 0 and "Nothing is left to train" in out
    status, out, err = pretrain(*options, "--eval-only", "OUTPUT_DIR", run_folder)
    assert status == 0, err
    assert json.loads((run_folder / "inference" / "results.json").read_text()) == results


def test_another_network_is_annealed_and_watched(pretrain, folder, tmp_path):  # noqa: F811
    options = ("--data", folder, "--epochs", "1", "--batch-size", "8", "--image-size", "32")
    options += ("--network", "cifar_resnet32", "--norm", "KN", "OUTPUT_DIR", tmp_path)
    status, out, err = pretrain(*options, "MODEL.KN.GAIN_ANNEAL", "[0.3, 0.6]")
    assert status == 0, err
    assert "calibrated the priors of 31 layers" in out
    last = {}
    for line in (tmp_path / "metrics.json").read_text().splitlines():
        last.update(json.loads(line))
    assert last["kn/gain"] == 0.0 and last["kn/innovation_logvar"] > 0
    assert "kn/innovation_mean/backbone.blocks.3.bn1" in last


def test_key_value_pairs_win(pretrain, folder, tmp_path):  # noqa: F811
    options = ("MODEL.KN.GAIN", "0.3", "SOLVER.MAX_ITER", "1", "OUTPUT_DIR", tmp_path / "run")
    status, out, err = pretrain("--data", folder, *ARGUMENTS, "--lr", "0.2", *options)
    assert status == 0, err
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["MODEL"]["KN"]["GAIN"] == 0.3
    assert config["SOLVER"]["MAX_ITER"] == 1 and config["SOLVER"]["BASE_LR"] == 0.2


def test_output_is_a_folder_inside_the_detectors(
    pretrain, folder, tmp_path, monkeypatch
):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    status, out, err = pretrain("--data", folder, *ARGUMENTS, "--norm", "GN4")
    assert status == 0, err
    assert (tmp_path / "output" / "pretraining_GN4" / "backbone.pth").exists()


def test_the_config_of_a_pre_training_is_refused(pretrain, folder, tmp_path):  # noqa: F811
    config = tmp_path / "config.yaml"
    config.write_text(classifier_config(folder).dump())
    result = pretrain("--config", config, "--data", folder, *ARGUMENTS)
    _assert_one_sentence(
        result, "config.yaml is that of a pre-training: give the config of the det"
    )


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--norm", "XN"], "--norm is 'XN'"),
        (["--network", "resnet17"], "There is no network 'resnet17'"),
        (["--batch-size", "99"], "fewer than a batch"),
        (["--norm-batch-size", "3"], "multiple of 3"),
        (["--data", "/nowhere"], "--data /nowhere is not a folder"),
        (["MODEL.KN.GIAN", "0.1"], "MODEL.KN.GIAN"),
        (["INPUT.FORMAT", "L"], "INPUT.FORMAT is 'L'"),
        (["OUTPUT_DIR", "/dev/null/run"], "OUTPUT_DIR /dev/null/run"),
        (["PRETRAINING.NORM", "GN"], "PRETRAINING.NORM follows from the options"),
        (["--eval-only"], "There are no weights to evaluate"),
    ],
)
def test_bad_options(pretrain, folder, tmp_path, arguments, sentence):  # noqa: F811
    if "OUTPUT_DIR" not in arguments:
        arguments = [*arguments, "OUTPUT_DIR", tmp_path / "run"]
    _assert_one_sentence(pretrain("--data", folder, *ARGUMENTS, *arguments), sentence)


def test_broken_image(pretrain, tmp_path):
    data = write_images(tmp_path / "images")
    for path in (data / "train" / "green").iterdir():
        path.write_bytes(b"no image")
    result = pretrain("--data", data, *ARGUMENTS, "OUTPUT_DIR", tmp_path / "run")
    _assert_one_sentence(result, r"train/green/\d.png cannot be read")


def test_what_a_classifier_is_cannot_be_undone_by_pairs(pretrain, folder, tmp_path):  # noqa: F811
    """Pairs that choose a detector's norm and backbone are read as a config file with them is."""
    run_folder = tmp_path / "run"
    pairs = ("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.BACKBONE.FREEZE_AT", "2")
    pairs += ("MODEL.RESNETS.OUT_FEATURES", "['res4']", "OUTPUT_DIR", run_folder)
    status, _, err = pretrain("--data", folder, *ARGUMENTS, *pairs, "MODEL.KN.GAIN", "0.3")
    assert status == 0, err
    cfg = yaml.safe_load((run_folder / "config.yaml").read_text())
    assert cfg["PRETRAINING"]["NORM"] == cfg["MODEL"]["RESNETS"]["NORM"] == "BN"
    assert cfg["MODEL"]["BACKBONE"]["FREEZE_AT"] == 0
    assert cfg["MODEL"]["RESNETS"]["OUT_FEATURES"] == ["res5"]
    assert cfg["MODEL"]["KN"]["GAIN"] == 0.3
