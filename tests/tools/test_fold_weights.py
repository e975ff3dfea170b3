import os
import shlex
import textwrap

import numpy as np
import pytest
import torch
import yaml

from kn_detectron.checkpoint import KNCheckpointer

from ..checkpoint.deployed import c4_cfg
from ..models import build_rcnn, randomize


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with a checkpoint and its config."""
    cfg = c4_cfg(DATASETS__CLASS_NAMES=["dog", "horse"], DATASETS__TEST=("animals_val",))
    KNCheckpointer(randomize(build_rcnn(cfg)), str(tmp_path)).save("trained")
    (tmp_path / "trained.yaml").write_text(cfg.dump())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_writes_both_files_and_says_how_to_use_them(folder, command):
    arguments = [
        "--config",
        "trained.yaml",
        "MODEL.WEIGHTS",
        "trained.pth",
        "--output",
        "a new/it's",
    ]
    status, out, err = command("fold_weights", *arguments)
    assert status == 0, err
    weights, config = folder / "a new" / "it's.pth", folder / "a new" / "it's.yaml"
    assert sorted((folder / "a new").iterdir()) == [weights, config]
    source, folded = (torch.load(path)["model"] for path in (folder / "trained.pth", weights))
    name = "roi_heads.res5.2.conv3.norm.running_var"
    assert torch.equal(folded[name], source[name])
    assert yaml.safe_load(config.read_text())["MODEL"]["WEIGHTS"] == str(weights)
    (line,) = [line for line in out.splitlines() if "tools/train_net.py" in line]
    assert shlex.split(line)[:4] == [
        "tools/train_net.py",
        "--eval-only",
        "--config-file",
        str(config),
    ]
    # The lines for Python run as they are printed.
    _, _, rest = out.partition("in Python:\n")
    code, _, _ = rest.partition("\nIn detectron2's folder")
    names = {}
    exec(textwrap.dedent(code), names)
    predictor = names["predictor"]
    assert names["cfg"].MODEL.WEIGHTS == str(weights)
    assert predictor.metadata.thing_classes == ["dog", "horse"]
    found = predictor(np.full((40, 60, 3), 100, dtype=np.uint8))["instances"]
    assert found.image_size == (40, 60)


def test_the_config_of_a_run_stands_for_its_last_checkpoint(folder, command):
    (folder / "trained.yaml").rename(folder / "config.yaml")  # MODEL.WEIGHTS in it is empty
    status, _, err = command("fold_weights", "--config", "config.yaml", "--output", "out")
    assert status == 0, err
    source, folded = (torch.load(folder / name)["model"] for name in ("trained.pth", "out.pth"))
    name = "roi_heads.box_predictor.cls_score.weight"
    assert torch.equal(folded[name], source[name])


def test_says_what_is_wrong_in_a_sentence(folder, process):
    os.truncate(folder / "trained.pth", 5000)
    arguments = ["--config", "trained.yaml", "--output", "out", "MODEL.WEIGHTS", "trained.pth"]
    status, out, err = process("fold_weights", *arguments)
    assert status == 1
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: trained.pth is truncated") and "Traceback" not in err
    left = ["last_checkpoint", "trained.pth", "trained.yaml"]
    assert sorted(os.listdir(folder)) == left


@pytest.mark.parametrize("name", ["trained", "trained.pth", "trained.yaml"])
def test_the_config_is_not_overwritten(name, folder, command):
    before = (folder / "trained.yaml").read_bytes()
    (folder / "trained.pth").rename(folder / "weights.pth")
    arguments = ["--config", folder / "trained.yaml", "--output", name]
    status, _, err = command("fold_weights", *arguments, "MODEL.WEIGHTS", "weights.pth")
    assert status == 1 and "error: trained.yaml is the config itself" in err
    assert (folder / "trained.yaml").read_bytes() == before


def test_a_folder_is_no_name_of_two_files(folder, command):
    status, _, err = command(
        "fold_weights", "--config", "trained.yaml", "--output", ".", "MODEL.WEIGHTS", "trained.pth"
    )
    assert status == 1 and "error: . is a folder: give the path" in err
