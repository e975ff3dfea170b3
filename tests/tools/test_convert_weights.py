import os
import pickle

import pytest
import torch

from kn_detectron.checkpoint import KNCheckpointer

from ..checkpoint import formats
from ..models import build_backbone, build_rcnn, randomize, rcnn_cfg, resnet_cfg


@pytest.fixture(scope="module")
def resnet():
    """A bare ResNet with BatchNorm."""
    backbone = build_backbone(resnet_cfg("BN", MODEL__RESNETS__OUT_FEATURES=["res5"]))
    return randomize(backbone).state_dict()


def test_it_converts_and_says_what_became_of_the_tensors(tmp_path, resnet, command):
    source, target = formats.write(tmp_path, formats.msra(resnet), "R-50.pkl"), tmp_path / "kn.pth"
    status, out, err = command("convert_weights", source, target)
    assert status == 0, err
    assert "265 loaded" in out and "KN process models" in out
    assert "priors of 53 Kalman layers were set" in out
    assert out.strip().splitlines()[-1] == f"Written: {target}"
    models = [build_rcnn(rcnn_cfg("KN")) for _ in range(2)]
    for model, path in zip(models, (source, str(target))):
        KNCheckpointer(model).load(path, [])
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[name]), name

    back = tmp_path / "bn.pth"
    status, out, err = command("convert_weights", target, back, "--norm", "BN")
    assert status == 0, err
    state = torch.load(back, weights_only=True)["model"]
    for name, value in resnet.items():
        assert "num_batches" in name or torch.equal(state[name], value), name


def test_half_the_size_for_the_priors_of_the_paper(tmp_path, resnet, command):
    source, target = formats.write(tmp_path, formats.msra(resnet), "R-50.pkl"), tmp_path / "kn.pth"
    status, _, err = command("convert_weights", source, target, "--variant", "paper", "--half")
    assert status == 0, err
    state = torch.load(target, weights_only=True)["model"]
    leaves = {name.rpartition(".")[2] for name in state}
    assert "process_noise" in leaves and not leaves & {"mean_offset", "log_var_scale"}
    for name, tensor in state.items():
        assert (tensor.dtype == torch.float16) == (tensor.dim() > 1), name


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
def test_bad_input_is_a_sentence_and_no_file(tmp_path, resnet, write, pattern, command):
    source, target = tmp_path / "in.pth", tmp_path / "out.pth"
    write(source, resnet)
    status, out, err = command("convert_weights", source, target)
    assert status == 1
    error = err.strip()
    assert error.startswith("error: ") and str(source) in error and pattern in error
    assert "\n" not in error
    assert set(os.listdir(tmp_path)) <= {"in.pth"}


def test_the_exit_status_is_that_of_the_process(tmp_path, process):
    status, out, err = process("convert_weights", tmp_path / "in.pth", tmp_path / "out.pth")
    assert status == 1
    # Before it comes what torch and detectron2 warn of when they are imported.
    assert err.strip().splitlines()[-1].startswith("error: ") and "Traceback" not in err
