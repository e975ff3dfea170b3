"""Reading configs and KEY VALUE pairs."""

import argparse
import re

import pytest
import torch
import yaml

from kn_detectron import InputError
from kn_detectron.engine.command_line import argument_parser, load_config
from kn_detectron.engine.config_file import read_config

from ..models import detectron2_configs
from . import tiny
from .tiny import assert_one_sentence


def test_detectron2s_own_configs_are_read():
    configs = [path for path in detectron2_configs().rglob("*.yaml") if "Base-" not in path.name]
    for path in configs:
        assert read_config(argparse.Namespace(config_file=str(path), opts=[])).MODEL.DEVICE == "cpu"
    assert len(configs) > 60


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to use")
def test_without_gpu_the_default_device_is_replaced_but_a_wish_is_refused(tmp_path, datasets):
    path = tiny.write_config(tmp_path / "tiny.yaml")
    content = yaml.safe_load(path.read_text())
    del content["MODEL"]["DEVICE"]
    content["SOLVER"]["AMP"] = {"ENABLED": True}
    path.write_text(yaml.safe_dump(content))
    arguments = ["--config", str(path), "OUTPUT_DIR", str(tmp_path / "run")]
    cfg = load_config(argument_parser().parse_args(arguments))
    assert cfg.MODEL.DEVICE == "cpu" and not cfg.SOLVER.AMP.ENABLED
    with pytest.raises(InputError, match="MODEL.DEVICE cuda asks for a GPU"):
        load_config(argument_parser().parse_args([*arguments, "MODEL.DEVICE", "cuda"]))


def test_several_ranks_need_several_devices(tmp_path, datasets):
    arguments = ["--config", str(tiny.write_config(tmp_path / "tiny.yaml")), "--num-gpus", "2"]
    arguments += ["MODEL.DEVICE", "cuda:1"]
    with pytest.raises(
        InputError, match="MODEL.DEVICE cuda:1 is one GPU and --num-gpus asks for 2"
    ):
        load_config(argument_parser().parse_args(arguments))


def test_on_the_cpu_there_is_no_mixed_precision(tmp_path, datasets):
    arguments = ["--config", str(tiny.write_config(tmp_path / "tiny.yaml"))]
    arguments += ["OUTPUT_DIR", str(tmp_path / "run"), "MODEL.DEVICE", "cpu"]
    arguments += ["SOLVER.AMP.ENABLED", "True"]
    assert not load_config(argument_parser().parse_args(arguments)).SOLVER.AMP.ENABLED


@pytest.mark.parametrize(
    "content, patterns",
    [
        (None, ["does not exist"]),
        ("MODEL: [", ["not valid YAML"]),
        ("- a list", ["holds no keys where some are expected"]),
        ("a sentence", ["holds no keys where some are expected"]),
        ("# für Köln".encode("latin-1"), ["is not text in UTF-8 .*: save it as that"]),
        ("", ["is empty: give a YAML file"]),
        ("VERSION: 2\nMODEL: {KN: {GAIN: 0}}", ["as in 0.0 for 0"]),
        ("VERSION: 2\nSOLVER: {STEPS: 100}", ['as in "\\(100,\\)" for a single 100']),
        (
            "VERSION: 2\nPRETRAINING: {DATA: d}",
            ["is that of a pre-training: .* MODEL.WEIGHTS .*backbone.pth"],
        ),
        ("_BASE_: nothing.yaml", ["_BASE_ that cannot be read"]),
        ("_BASE_: bad.yaml", ["_BASE_ that leads back to itself"]),
        ("VERSION: 2\nMODEL: {DEVICE: }", ["MODEL.DEVICE is None, but must be a device"]),
        ("VERSION: 2\nSOLVER: {STEPS: }", ["SOLVER.STEPS is None, but must be numbers"]),
        ("MODEL: {KN: {GIAN: 1}}\nVERSION: 2", ["MODEL.KN.GIAN"]),
        ("SOLVER: {MAX_ITER: many}\nVERSION: 2", ["many"]),
    ],
)
def test_bad_config_file(command, tmp_path, content, patterns):
    path = tmp_path / "bad.yaml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    status, out, err = command(config=path)
    assert_one_sentence((status, out, err), *patterns)
    assert str(path) in err or " is None, but " in err


def test_only_the_config_of_a_run_may_not_run_code(tmp_path):
    content = "VERSION: 2\nSOLVER: {MAX_ITER: !!python/object/apply:eval ['2 + 3']}\n"
    for name in ("own.yaml", "config.yaml"):
        (tmp_path / name).write_text(content)
    args = argparse.Namespace(config_file=str(tmp_path / "own.yaml"), opts=[])
    assert read_config(args).SOLVER.MAX_ITER == 5
    args.config_file = str(tmp_path / "config.yaml")
    with pytest.raises(InputError, match="config.yaml is not valid YAML .*python/object/apply"):
        read_config(args)


def test_no_config_file(command, tmp_path):
    assert_one_sentence(command(config=None), "--config FILE")
    late = ["SOLVER.MAX_ITER", "3", "--config", tmp_path / "tiny.yaml"]
    assert_one_sentence(command(*late, config=None), "--config comes after KEY VALUE .* before")
    assert_one_sentence(command(config=tmp_path), "is a folder: give the path of a YAML file")
    (tmp_path / "lazy.py").write_text("model = None")
    assert_one_sentence(command(config=tmp_path / "lazy.py"), "is Python, as .* LazyConfig")
