"""GETTING_STARTED.md, walked from its top to its bottom: each command leaves what the next one takes.

The commands are those of the page. What they train on, how long and at which size is less.
"""

import json
import runpy
import sys

import pytest

from kn_detectron.data import ShapesSpec, generate_shapes, register_shapes_lazily

from .documents import ROOT, blocks, commands
from .engine.conftest import shapes_restored  # noqa: F401

_QUICK = "INPUT.MIN_SIZE_TRAIN (64,) INPUT.MIN_SIZE_TEST 64 DATALOADER.NUM_WORKERS 0".split()
_STEPS = {"output/first": 2, "resume": 4, "output/my_data": 2, "output/second": 2}


def quick(words):
    """A command of the page that does the same with less."""
    tool = words[0]
    if tool == "tools/train_net.py" and "--eval-only" in words:
        return [*words, *_QUICK]
    if tool == "tools/train_net.py":
        run = "resume" if "--resume" in words else words[words.index("OUTPUT_DIR") + 1]
        return [*words, *_QUICK, "SOLVER.MAX_ITER", str(_STEPS[run])]
    if tool == "tools/generate_shapes.py":
        return [*words, "--num-train", "64", "--num-val", "10"]
    if tool == "tools/pretrain_net.py":
        return [*words, "DATALOADER.NUM_WORKERS", "0"]
    return words


def call(words, monkeypatch):
    """Runs a tool in this process."""
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    assert not ended.value.code, words


@pytest.mark.usefixtures("shapes_restored")
def test_the_page_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("tools", "configs", "kn_detectron"):
        (tmp_path / name).symlink_to(ROOT / name)
    # Where the package would write 1000 + 200, whatever DETECTRON2_DATASETS is.
    generate_shapes("datasets/shapes", ShapesSpec(num_train=8, num_val=3, size=64))
    register_shapes_lazily("datasets/shapes")

    printed = {}
    for block in blocks("GETTING_STARTED.md"):
        if block.language == "sh":
            for words in commands(block.code):
                call(quick(words[1:]), monkeypatch)
                printed[" ".join(words[1:])] = capsys.readouterr().out
        elif block.language == "python" and "load_run" in block.code:
            exec(compile(block.code, "GETTING_STARTED.md", "exec"), {})
            assert "'circle'" in capsys.readouterr().out

    # What the page says of them.
    for name in ("config.yaml", "log.txt", "model_final.pth", "inference/results.json"):
        assert (tmp_path / "output" / "first" / name).is_file()
    lines = (tmp_path / "output/first/metrics.json").read_text().splitlines()
    assert max(json.loads(line)["iteration"] for line in lines) == 4
    (resumed,) = [text for command, text in printed.items() if "--resume" in command]
    assert "Starting training from iteration 2" in resumed
    assert "SOLVER.MAX_ITER 4 (before: 2)" in resumed
    (pretrained,) = [text for command, text in printed.items() if "pretrain_net" in command]
    assert "Option A" in pretrained and "Option B" in pretrained
    for name in ("pretraining/backbone.pth", "folded.yaml", "folded.pth", "first_batch"):
        assert (tmp_path / "output" / name).exists()
