"""tools/train_net.py with the real configs, at a size for two cores and a few minutes."""

import os
from pathlib import Path

from ..engine import tiny

ROOT = Path(__file__).resolve().parents[2]
NUM_STEPS = 6

# The network is that of the config; the images and the numbers of regions are smaller.
_SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    # The ImageNet weights take other pixels. From scratch, their scale would go through the frozen
    # stages, and all scores of the few detections would be 0.
    "MODEL.PIXEL_STD": (57.375, 57.12, 58.395),
    "SEED": 5,
    "DATALOADER.NUM_WORKERS": 1,
    "INPUT.MIN_SIZE_TRAIN": (128,),
    "INPUT.MIN_SIZE_TEST": 128,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 100,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 5,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    "TEST.DETECTIONS_PER_IMAGE": 5,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.WARMUP_ITERS": 3,
    "SOLVER.STEPS": (5,),
    "SOLVER.MAX_ITER": NUM_STEPS,
}


def config(norm):
    """The path of a config."""
    return str(ROOT / f"configs/mask_rcnn_R50_C4_{norm}.yaml")


def small(*options):
    """KEY, VALUE, ... that make it small, and further options."""
    return [str(o) for pair in _SMALL.items() for o in pair] + [str(o) for o in options]


def run_train_net(*arguments, stopped_at=None):
    """Runs the command with the KN config.

    Args:
        arguments: flags come first, then KEY, VALUE, ...
        stopped_at: as for :func:`tiny.start_train_net`.

    Returns:
        its exit status, and what it printed.
    """
    flags = [a for a in arguments if str(a).startswith("--")]
    options = small(*arguments[len(flags) :])
    datasets = os.environ["DETECTRON2_DATASETS"]
    process = tiny.start_train_net(
        "--config", config("KN"), *flags, *options, datasets=datasets, stopped_at=stopped_at
    )
    output = process.communicate()[0]
    return process.returncode, output
