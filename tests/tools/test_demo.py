import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from kn_detectron.data import ShapesSpec, generate_shapes

pytestmark = pytest.mark.trains

ROOT = Path(__file__).parents[2]
PICTURES = ("predictions.png", "curves.png", "gains.png")


def run_demo(output, *options):
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, str(ROOT / "tools/demo.py"), "--output", str(output), *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_demo_trains_evaluates_draws_and_does_nothing_twice(tmp_path):
    # A dataset that is there is used: a smaller one than the demo would make.
    generate_shapes(tmp_path / "shapes", ShapesSpec(num_train=4, num_val=2, size=64))
    options = ("SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "(1,)", "DATALOADER.NUM_WORKERS", "0")
    first = run_demo(tmp_path, *options)
    assert first.returncode == 0, first.stderr
    assert "Warning" not in first.stderr
    *_, last = first.stdout.strip().splitlines()
    assert last.startswith("box AP ") and ", mask AP " in last
    for name in PICTURES:
        assert name in first.stdout
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 200
    trained = (tmp_path / "model_final.pth").stat().st_mtime_ns

    second = run_demo(tmp_path, *options)
    assert second.returncode == 0, second.stderr
    assert (tmp_path / "model_final.pth").stat().st_mtime_ns == trained
    assert "Starting training" not in second.stdout
    assert second.stdout.strip().splitlines()[-1] == last


def test_demo_says_what_is_wrong_in_a_sentence(tmp_path):
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes" / "holiday.jpg").touch()
    run = run_demo(tmp_path)
    assert run.returncode == 1
    # Nothing else but what torch and detectron2 warn of when they are imported.
    assert run.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in run.stderr
