"""A Mask R-CNN that trains in seconds, images for it, and ways to run it."""

import contextlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from detectron2.config import get_cfg
from detectron2.engine import HookBase
from detectron2.utils.env import seed_all_rng

from kn_detectron import add_kn_config
from kn_detectron.data import ShapesSpec, register_shapes, register_shapes_lazily
from kn_detectron.engine import Trainer

TRAIN_NET = Path(__file__).resolve().parents[2] / "tools" / "train_net.py"

SETTINGS = {
    "VERSION": 2,
    "SEED": 7,
    "DATASETS": {"TRAIN": ["shapes_train"], "TEST": ["shapes_val"]},
    "DATALOADER": {"NUM_WORKERS": 0},
    "INPUT": {
        "MIN_SIZE_TRAIN": [48, 64],
        "MAX_SIZE_TRAIN": 90,
        "MIN_SIZE_TEST": 64,
        "MASK_FORMAT": "bitmask",
    },
    "MODEL": {
        "DEVICE": "cpu",
        "WEIGHTS": "",
        "MASK_ON": True,
        "BACKBONE": {"NAME": "build_kn_resnet_backbone", "FREEZE_AT": 0},
        "RESNETS": {
            "DEPTH": 50,
            "NORM": "KN",
            "STEM_OUT_CHANNELS": 8,
            "RES2_OUT_CHANNELS": 16,
            "WIDTH_PER_GROUP": 4,
        },
        "ANCHOR_GENERATOR": {"SIZES": [[16, 32]]},
        "RPN": {"PRE_NMS_TOPK_TEST": 40, "POST_NMS_TOPK_TEST": 10, "BATCH_SIZE_PER_IMAGE": 32},
        "ROI_HEADS": {
            "NAME": "KNRes5ROIHeads",
            "NUM_CLASSES": 5,
            "BATCH_SIZE_PER_IMAGE": 8,
            "SCORE_THRESH_TEST": 0.0,
        },
        "ROI_BOX_HEAD": {"POOLER_RESOLUTION": 7},
        "ROI_MASK_HEAD": {"NAME": "MaskRCNNConvUpsampleHead", "CONV_DIM": 8},
        "KN": {"GAIN_ANNEAL": [0.3, 0.8]},
    },
    "SOLVER": {
        "IMS_PER_BATCH": 2,
        "BASE_LR": 0.02,
        "WARMUP_ITERS": 3,
        "STEPS": [4],
        "MAX_ITER": 6,
        "CHECKPOINT_PERIOD": 3,
    },
    "TEST": {"EVAL_PERIOD": 0, "DETECTIONS_PER_IMAGE": 5},
}
SPEC = ShapesSpec(num_train=6, num_val=2, size=64, max_shapes=2)


def config(output_dir, *options):
    """The tiny config, with options KEY, VALUE, ..."""
    cfg = get_cfg()
    add_kn_config(cfg)
    cfg.merge_from_other_cfg(type(cfg)(SETTINGS))
    cfg.merge_from_list(["OUTPUT_DIR", str(output_dir), *options])
    return cfg


def write_config(path):
    """The tiny config as a file."""
    path.write_text(yaml.safe_dump(SETTINGS))
    return path


_registered = []


def restore_shapes():
    """Registers what was registered before a test registered something else."""
    if _registered:
        register_shapes(_registered[-1], SPEC)
    else:
        register_shapes_lazily()


@contextlib.contextmanager
def shapes(datasets):
    """Generates the images in a folder of datasets, and has them registered within the context."""
    _registered.append(datasets / "shapes")
    register_shapes(_registered[-1], SPEC)
    try:
        yield
    finally:
        _registered.pop()
        restore_shapes()


class Losses(HookBase):
    """Notes the losses of every step."""

    def __init__(self):
        self.of = {}

    def after_step(self):
        latest = self.trainer.storage.latest()
        losses = {name: value for name, (value, _) in latest.items() if "loss" in name}
        self.of[self.trainer.iter] = losses


def trainer(cfg, *, resume=False):
    """A trainer and the losses that it will note."""
    if cfg.SEED >= 0:
        seed_all_rng(cfg.SEED)  # as the command line does
    result, losses = Trainer(cfg), Losses()
    result.register_hooks([losses])
    result.resume_or_load(resume)
    return result, losses


def read(path):
    """A checkpoint."""
    return torch.load(path, map_location="cpu", weights_only=True)


def assert_same_state(one, other):
    """Two checkpoints hold the same model and the same optimizer, to the bit."""
    one, other = read(one), read(other)
    assert one["iteration"] == other["iteration"]
    assert one["model"].keys() == other["model"].keys()
    for name, value in one["model"].items():
        assert torch.equal(value, other["model"][name]), name
    one, other = (c["trainer"]["_trainer"]["optimizer"] for c in (one, other))
    assert one["param_groups"] == other["param_groups"]
    assert one["state"].keys() == other["state"].keys() and one["state"]
    for key, state in one["state"].items():
        assert torch.equal(state["momentum_buffer"], other["state"][key]["momentum_buffer"])


def train_net_module():
    """tools/train_net.py as a module."""
    spec = importlib.util.spec_from_file_location("train_net", TRAIN_NET)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Runs a command, and sends its group of processes SIGTERM when a file of this name is complete.
_STOPPED_AT = """
import multiprocessing, os, runpy, subprocess, sys

def stop(event, args):
    if event == "os.rename" and os.path.basename(args[1]) == name:
        # By another process: what its parent sends does not kill a process that loads.
        loaders = multiprocessing.active_children()
        subprocess.run(["sh", "-c", f"kill -s TERM -- -{os.getpgrp()}"])
        for loader in loaders:  # they die meanwhile
            loader.join()

name, *sys.argv = sys.argv[1:]
sys.addaudithook(stop)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start_train_net(*arguments, datasets, stopped_at=None):
    """Starts tools/train_net.py as its users do.

    Args:
        arguments: of the command line.
        datasets: the folder of datasets.
        stopped_at: the name of a checkpoint; when it is written, the process gets SIGTERM, and so do
            those that load for it, as from a terminal or a batch system.
    """
    driver = ["-c", _STOPPED_AT, stopped_at] if stopped_at else []
    return subprocess.Popen(
        [sys.executable, *driver, str(TRAIN_NET), *map(str, arguments)],
        env={
            **os.environ,
            "DETECTRON2_DATASETS": str(datasets),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def assert_one_sentence(result, *patterns):
    """Checks that a command, with its status, stdout and stderr, failed with one sentence."""
    status, out, err = result
    assert status == 1
    assert "Traceback" not in out + err
    sentence = err.splitlines()[-1]  # torch has its own to say before
    assert sentence.startswith("error: ") and err.count("error: ") == 1
    for pattern in patterns:
        assert re.search(pattern, sentence), sentence
