import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmark import measure_group
from kn_detectron import InputError

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools/benchmark.py"


def prepare(monkeypatch, *arguments):
    spec = importlib.util.spec_from_file_location("benchmark_tool", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    args = tool.parse_arguments()
    return tool.prepare(args), args


def test_benchmark_measures_prints_and_writes(tmp_path, process):
    options = ["--preset", "quick", "--what", "layer", "size", "--rounds", "1"]
    options += ["--norms", "BN", "KN", "SyncBN", "--threads", "1", "--output", str(tmp_path)]
    status, out, err = process("benchmark", *options)
    assert status == 0, err
    assert "**layer: 2x32x8x8, float32, contiguous, cpu**" in out
    assert "threads 1" in out and "- SyncBN: not run: " in out
    result = json.loads((tmp_path / "benchmark.json").read_text())
    assert [group["what"] for group in result["groups"]] == ["layer", "size", "size"]
    assert result["machine"]["threads"] == 1 and result["arguments"]["preset"] == "quick"
    for group in result["groups"]:
        assert not [row for row in group["rows"] if row["status"] == "failed"]
    for name in ("ratios.png", "curves.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 200
    assert len(list(tmp_path.iterdir())) == 3


def test_arguments_change_the_preset(monkeypatch, tmp_path):
    output = ["--output", str(tmp_path / "out")]
    groups, args = prepare(
        monkeypatch, "--what", "layer", "--shapes", "1x8x4x4", "2x8x4x4", "--compile", *output
    )
    assert [g.what for g in groups] == ["layer"] * 8 + ["compiled"]
    assert groups[0].shape == (1, 8, 4, 4) and args.device == "cpu"
    groups, args = prepare(monkeypatch, "--preset", "gpu", "--size", "96", *output)
    assert args.device == "cuda"
    assert {g.shape[2:] for g in groups if g.what == "step"} == {(96, 96)}
    assert [g.what for g in groups].count("compiled") == 1
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize("detector", ["mask_rcnn_R50_C4", "retinanet_R50_FPN"])
def test_configs_are_measured_side_by_side(monkeypatch, tmp_path, detector):
    names = ("BN", "KN")
    files = [str(ROOT / f"configs/quick_schedules/{detector}_{n}_instant_test.yaml") for n in names]
    options = ["--size", "64", "--rounds", "1", "--output", str(tmp_path)]
    (group,), args = prepare(monkeypatch, "--configs", *files, *options)
    assert (group.what, group.candidates, group.regions) == ("step", tuple(files), None)
    result = measure_group(group, torch.device(args.device))
    bn, kn = result["rows"]
    assert (bn["status"], kn["status"]) == ("measured", "measured")
    assert bn["ratios"][files[0]]["median"] == 1 and kn["parameters"] > bn["parameters"]


def test_a_config_of_one_class_is_measured(monkeypatch, tmp_path):
    base = ROOT / "configs/quick_schedules/mask_rcnn_R50_C4_KN_instant_test.yaml"
    file = tmp_path / "one.yaml"
    file.write_text(f"_BASE_: {base}\nMODEL: {{ROI_HEADS: {{NUM_CLASSES: 1}}}}\n")
    options = ["--size", "64", "--rounds", "1", "--output", str(tmp_path)]
    (group,), args = prepare(monkeypatch, "--configs", str(file), *options)
    (row,) = measure_group(group, torch.device(args.device))["rows"]
    assert row["status"] == "measured"


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--configs", "no.yaml"], "no.yaml"),
        (["--configs", "README.md"], "--configs takes files of configs"),
        (["--configs", "a.yaml", "--norms", "BN"], "leave out --what, --norms and --compile"),
        (["--preset", "all"], "there is no preset 'all'"),
        (["--preset", "all", "--compile"], "there is no preset 'all'"),
        (["--device", "tpu"], "--device is 'tpu'"),
        (["--threads", "0"], "--threads is 0"),
        (["--size", "1x2x3"], "--size takes a number of pixels"),
        (["--shapes", "2x3"], "--shapes takes four numbers"),
        (["--rounds", "0"], "rounds has the value 0"),
    ],
)
def test_arguments_that_are_wrong_are_a_sentence(monkeypatch, tmp_path, arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        prepare(monkeypatch, *arguments, "--output", str(tmp_path))


def test_a_folder_that_cannot_be_made_is_a_sentence(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be created"):
        prepare(monkeypatch, "--output", str(tmp_path / "file"))
