"""How the tests call a tool: in this process, which has imported all that it needs.

A process of its own takes seconds for that, so each tool is started as one in one test only.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kn_detectron.engine.command_line import run

from ..engine.conftest import shapes_restored  # noqa: F401

ROOT = Path(__file__).parents[2]


@pytest.fixture
def process_restored(shapes_restored):  # noqa: F811
    """Takes back what a tool leaves behind in this process: datasets, number of threads."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def command(monkeypatch, capsys, process_restored):
    """Runs tools/NAME.py with arguments, and gives its status, stdout and stderr."""

    def call(name, *arguments):
        path = ROOT / "tools" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"tool_{name}", path)
        tool = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tool)
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        status = run(tool.main)
        return (status, *capsys.readouterr())

    return call


@pytest.fixture
def process():
    """The same in a process of its own."""

    def call(name, *arguments):
        path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
        done = subprocess.run(
            [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout, done.stderr

    return call
