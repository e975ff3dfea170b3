import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from kn_detectron.checkpoint import KNCheckpointer

from ..checkpoint.deployed import c4_cfg
from ..models import build_rcnn, randomize

ROOT = Path(__file__).parents[2]


def run(*arguments, cwd):
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, str(ROOT / "tools/fold_weights.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd)


@pytest.fixture
def folder(tmp_path):
    """A folder with a checkpoint and its config."""
    cfg = c4_cfg(DATASETS__CLASS_NAMES=["dog", "horse"])
    KNCheckpointer(randomize(build_rcnn(cfg)), str(tmp_path)).save("trained")
    (tmp_path / "trained.yaml").write_text(cfg.dump())
    return tmp_path


def test_writes_both_files_and_says_how_to_use_them(folder):
    arguments = ["--config", "trained.yaml", "MODEL.WEIGHTS", "trained.pth", "--output", "new/out"]
    result = run(*arguments, cwd=folder)
    assert result.returncode == 0, result.stderr
    weights, config = folder / "new" / "out.pth", folder / "new" / "out.yaml"
    assert sorted((folder / "new").iterdir()) == [weights, config]
    source, folded = (torch.load(path)["model"] for path in (folder / "trained.pth", weights))
    name = "roi_heads.res5.2.conv3.norm.running_var"
    assert torch.equal(folded[name], source[name])
    assert yaml.safe_load(config.read_text())["MODEL"]["WEIGHTS"] == str(weights)
    assert f"tools/train_net.py --eval-only --config-file {config}" in result.stdout
    assert f'cfg.merge_from_file("{config}")' in result.stdout
    assert "predictor.metadata.thing_classes = ['dog', 'horse']" in result.stdout


def test_says_what_is_wrong_in_a_sentence(folder):
    os.truncate(folder / "trained.pth", 5000)
    arguments = ["--config", "trained.yaml", "--output", "out", "MODEL.WEIGHTS", "trained.pth"]
    result = run(*arguments, cwd=folder)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: trained.pth is truncated") and "Traceback" not in result.stderr
    left = ["last_checkpoint", "trained.pth", "trained.yaml"]
    assert sorted(os.listdir(folder)) == left
