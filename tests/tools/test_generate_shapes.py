import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[2] / "tools" / "generate_shapes.py"


def call(*args):
    return subprocess.run([sys.executable, TOOL, *args], capture_output=True, text=True)


def test_it_writes_a_folder(tmp_path):
    result = call(str(tmp_path / "new"), "--num-train", "5", "--num-val", "5", "--size", "32")
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "new").rglob("*.png"))) == 10


def test_a_fault_is_a_sentence(tmp_path):
    result = call(str(tmp_path / "new"), "--size", "8")
    assert result.returncode == 1
    # Before it comes what torch and detectron2 warn of when they are imported.
    assert result.stderr.splitlines()[-1].startswith("error: size of the single shapes is 8")
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "new").exists()
