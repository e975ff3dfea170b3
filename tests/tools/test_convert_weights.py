import importlib.util
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kn_detectron.checkpoint import KNCheckpointer
from kn_detectron.engine.command_line import run

from ..checkpoint import formats
from ..engine.conftest import fresh_logs  # noqa: F401
from ..models import build_backbone, build_rcnn, randomize, rcnn_cfg, resnet_cfg

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "convert_weights.py"


@pytest.fixture(scope="module")
def resnet():
    """A bare ResNet with BatchNorm."""
    backbone = build_backbone(resnet_cfg("BN", MODEL__RESNETS__OUT_FEATURES=["res5"]))
    return randomize(backbone).state_dict()


def convert(*arguments):
    """Runs the command in a process of its own."""
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_it_converts_and_says_what_became_of_the_tensors(tmp_path, resnet):
    source, target = formats.write(tmp_path, formats.msra(resnet), "R-50.pkl"), tmp_path / "kn.pth"
    result = convert(source, target)
    assert result.returncode == 0, result.stderr
    assert "265 loaded" in result.stdout and "KN process models" in result.stdout
    assert "priors of 53 Kalman layers were set" in result.stdout
    assert result.stdout.strip().splitlines()[-1] == f"Written: {target}"
    models = [build_rcnn(rcnn_cfg("KN")) for _ in range(2)]
    for model, path in zip(models, (source, str(target))):
        KNCheckpointer(model).load(path, [])
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[name]), name

    back = tmp_path / "bn.pth"
    result = convert(target, back, "--norm", "BN")
    assert result.returncode == 0, result.stderr
    state = torch.load(back, weights_only=True)["model"]
    for name, value in resnet.items():
        assert "num_batches" in name or torch.equal(state[name], value), name


class _Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def _truncated(path, resnet):
    torch.save(resnet, path)
    os.truncate(path, os.path.getsize(path) // 2)


def _malicious(path, resnet):
    path.write_bytes(pickle.dumps({"model": {"stem": _Harmful(str(path) + ".ran")}}))


def _nan(path, resnet):
    torch.save(
        {**resnet, "res2.0.conv1.weight": resnet["res2.0.conv1.weight"] * float("nan")}, path
    )


def _group_norm(path, resnet):
    torch.save(formats.without_statistics(resnet), path)


@pytest.mark.parametrize(
    "write, pattern",
    [
        (_truncated, "is truncated"),
        (_malicious, "mkdir"),
        (_nan, "not finite"),
        (_group_norm, "no running statistics"),
        (lambda path, resnet: None, "does not exist"),
    ],
)
def test_bad_input_is_a_sentence_and_no_file(
    tmp_path, resnet, write, pattern, monkeypatch, capsys, fresh_logs  # noqa: F811
):
    source, target = tmp_path / "in.pth", tmp_path / "out.pth"
    write(source, resnet)
    spec = importlib.util.spec_from_file_location("convert_weights", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(sys, "argv", ["convert_weights.py", str(source), str(target)])
    assert run(tool.main) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and str(source) in error and pattern in error
    assert "\n" not in error
    assert set(os.listdir(tmp_path)) <= {"in.pth"}


def test_the_exit_status_is_that_of_the_process(tmp_path):
    result = convert(tmp_path / "in.pth", tmp_path / "out.pth")
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in result.stderr
