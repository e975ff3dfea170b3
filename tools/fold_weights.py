#!/usr/bin/env python
"""Folds a trained KN model into a FrozenBN model that detectron2 runs without this package.

Examples:
    python tools/fold_weights.py --config output/config.yaml --output output/folded
    python tools/fold_weights.py --config configs/mask_rcnn_R50_C4_KN.yaml --output output/folded \\
        MODEL.WEIGHTS output/model_final.pth
"""

import argparse
import os
import shlex
import sys

import torch

from kn_detectron.checkpoint import fold_weights
from kn_detectron.checkpoint.folding import folded_files
from kn_detectron.engine import trained_weights
from kn_detectron.engine.command_line import run
from kn_detectron.engine.config_file import read_config
from kn_detectron.errors import InputError

from detectron2.utils.logger import setup_logger  # isort: skip  # made importable by kn_detectron

_USE = """
With detectron2 alone, in Python:
    from detectron2.config import get_cfg
    from detectron2.engine import DefaultPredictor
    cfg = get_cfg()
    cfg.merge_from_file({config!r}){device}
    predictor = DefaultPredictor(cfg){names}
In detectron2's folder, to evaluate on {datasets}, which must be registered there:
    tools/train_net.py --eval-only --config-file {quoted}{option}
If you move the two files, set MODEL.WEIGHTS to the new place of the weights.
"""
_DEVICE = '\n    cfg.MODEL.DEVICE = "cpu"'
_NAMES = "\n    predictor.metadata.thing_classes = {names}"


def main():
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--config",
        "--config-file",
        dest="config_file",
        required=True,
        metavar="FILE",
        help="the config that the model was trained with",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="NAME",
        help="where to write NAME.pth, the weights, and NAME.yaml, their config",
    )
    parser.add_argument(
        "opts",
        nargs="*",
        metavar="KEY VALUE",
        help="for the config; without MODEL.WEIGHTS a run's config.yaml means its last checkpoint",
    )
    args = parser.parse_intermixed_args()
    _, config = folded_files(args.output)
    if os.path.realpath(config) == os.path.realpath(args.config_file):
        raise InputError(
            f"{config} is the config itself, which folding would overwrite: give another --output."
        )
    setup_logger(name="kn_detectron")
    cfg = read_config(args)
    cfg.MODEL.WEIGHTS = trained_weights(args.config_file, args.opts) or cfg.MODEL.WEIGHTS
    weights, config = fold_weights(cfg, args.output)
    print(f"{weights} and {config} are written.")
    has_gpu, names = torch.cuda.is_available(), cfg.DATASETS.CLASS_NAMES
    use = _USE.format(
        config=config,
        quoted=shlex.quote(config),
        device="" if has_gpu else _DEVICE,
        option="" if has_gpu else " MODEL.DEVICE cpu",
        names=_NAMES.format(names=names) if names and cfg.DATASETS.TEST else "",
        datasets=", ".join(cfg.DATASETS.TEST) or "a dataset",
    )
    print(use.rstrip())


if __name__ == "__main__":
    sys.exit(run(main))
