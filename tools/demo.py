#!/usr/bin/env python
"""Detects persons in photographs, then fine-tunes the detector on others, evaluates and draws.

The detector is a Mask R-CNN with Kalman Normalization. The detector and the photographs come with the
package. The first picture is there within a minute, and the rest takes minutes on a CPU. The same
command, given again, goes on where the last one stopped.

Examples:
    python tools/demo.py
    python tools/demo.py --shapes
    python tools/demo.py --output output/short SOLVER.MAX_ITER 100
"""

import argparse
import json
import os
import sys

import torch

from kn_detectron.checkpoint import KNCheckpointer
from kn_detectron.data import register_shapes
from kn_detectron.engine import Trainer
from kn_detectron.engine.command_line import argument_parser, load_config, run, set_up
from kn_detectron.engine.launching import launch_ranks
from kn_detectron.engine.pictures import draw_curves, draw_gains, draw_predictions
from kn_detectron.files import read_container
from kn_detectron.model_zoo import get_config_file

from detectron2.modeling import build_model  # isort: skip  # made importable by kn_detectron

# The config, and the score below which a picture leaves a prediction out.
PHOTOS = "photos/mask_rcnn_lite0_FPN_KN_finetune.yaml", 0.8
SHAPES = "shapes/mask_rcnn_slim_R50_FPN_KN.yaml", 0.35


def load_detector(cfg, weights):
    """A trained detector of a config.

    Args:
        cfg (CfgNode): the config.
        weights (str): its file.

    Returns:
        nn.Module
    """
    model = build_model(cfg)
    KNCheckpointer(model).load_for_evaluation(weights)
    return model


def _is_done(checkpoint, results, steps):
    """Whether a checkpoint is there that was trained for so many steps, and then evaluated."""
    if not (os.path.exists(checkpoint) and os.path.exists(results)):
        return False
    if os.path.getmtime(results) < os.path.getmtime(checkpoint):  # of an evaluation on the way
        return False
    return read_container(checkpoint)["iteration"] >= steps - 1


def train(cfg, args):
    """What the process of the training does."""
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.train()


def main():
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--output", help="folder for everything (output/demo, with --shapes output/shapes_demo)"
    )
    parser.add_argument(
        "--shapes",
        action="store_true",
        help="train on generated shapes, from the released classifier",
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs for the config")
    args = parser.parse_args()
    if args.output is None:
        args.output = "output/shapes_demo" if args.shapes else "output/demo"
    # Layers this small gain nothing from a second thread; the other core loads the images.
    torch.set_num_threads(1)
    if args.shapes:
        register_shapes(os.path.join(args.output, "shapes"))

    config, min_score = SHAPES if args.shapes else PHOTOS
    options = ["OUTPUT_DIR", args.output, *args.opts]
    train_args = argument_parser().parse_args(
        ["--resume", "--config", get_config_file(config), *options]
    )
    cfg = load_config(train_args)
    set_up(cfg, train_args)

    def picture(name, content, draw):
        path = os.path.join(os.path.abspath(cfg.OUTPUT_DIR), name)
        draw(path)
        print(f"{path}: {content}", flush=True)

    models = {}
    if not args.shapes:
        models["released"] = load_detector(cfg, cfg.MODEL.WEIGHTS)
        picture(
            "released.png",
            "what the released detector finds in photographs that it has not seen",
            lambda path: draw_predictions(cfg, models, path, min_score=min_score),
        )

    final = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
    results = os.path.join(cfg.OUTPUT_DIR, "inference", "results.json")
    if not _is_done(final, results, cfg.SOLVER.MAX_ITER):
        launch_ranks(train, cfg, train_args)

    models["fine-tuned"] = load_detector(cfg, final)
    picture(
        "predictions.png",
        "ground truth and predictions on validation images",
        lambda path: draw_predictions(cfg, models, path, min_score=min_score),
    )
    picture(
        "curves.png",
        "losses and APs over the training",
        lambda path: draw_curves(cfg.OUTPUT_DIR, path),
    )
    picture(
        "gains.png",
        "what each layer trusts: its measurement or its prediction",
        lambda path: draw_gains(cfg.OUTPUT_DIR, models["fine-tuned"], path),
    )
    with open(results) as file:
        found = json.load(file)
    names = {"bbox": "box", "segm": "mask"}
    scores = ", ".join(
        f"{names[task]} AP {found[task]['AP']:.1f}" for task in names if task in found
    )
    print(f"{scores} (MODEL_ZOO.md, The demo: what to compare them with)")


if __name__ == "__main__":
    sys.exit(run(main))
