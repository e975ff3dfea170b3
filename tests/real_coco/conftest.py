"""The images, and a Mask R-CNN that was trained on them for a few steps."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .commands import run_train_net


@pytest.fixture(scope="session", autouse=True)
def datasets():
    """The folder of datasets; there is nothing to test without COCO in it."""
    folder = Path(os.environ.get("DETECTRON2_DATASETS", ""))
    annotations = folder / "coco/annotations/instances_val2017.json"
    if not annotations.is_file():
        pytest.fail(
            f"{annotations} does not exist: set the environment variable DETECTRON2_DATASETS to "
            "the folder that contains coco/, laid out as detectron2 expects it.",
            pytrace=False,
        )
    return folder


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Where runs go; their checkpoints of 290 MB each do not stay there."""
    folder = tmp_path_factory.mktemp("runs")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def whole_begun(runs):
    """A run that nothing interrupts, as a future. It goes on beside other runs."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(run_train_net, "OUTPUT_DIR", runs / "whole")


@pytest.fixture(scope="session")
def whole(runs, whole_begun):
    """That run, finished: its folder."""
    status, output = whole_begun.result()
    assert status == 0, output
    return runs / "whole"


@pytest.fixture(scope="session")
def interrupted(runs, whole_begun):
    """The same run, told to stop on its way: its folder, what it printed and its exit status."""
    folder = runs / "interrupted"
    options = ["OUTPUT_DIR", folder, "SOLVER.CHECKPOINT_PERIOD", 2]
    status, output = run_train_net(*options, stopped_at="model_0000001.pth")
    return folder, output, status


@pytest.fixture(scope="session")
def resumed(interrupted):
    """That run, resumed: its folder and what it printed."""
    status, output = run_train_net("--resume", "OUTPUT_DIR", interrupted[0])
    assert status == 0, output
    return interrupted[0], output
