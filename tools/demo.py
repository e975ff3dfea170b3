#!/usr/bin/env python
"""Fine-tunes a small Mask R-CNN with Kalman Normalization on generated images, evaluates and draws.

It starts from released weights, which come with the package, and takes minutes on a CPU. The same
command, given again, goes on where the last one stopped.

Examples:
    python tools/demo.py
    python tools/demo.py --output output/short SOLVER.MAX_ITER 300
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
from kn_detectron.engine.pictures import draw_curves, draw_gains, draw_predictions
from kn_detectron.model_zoo import get_config_file

from detectron2.modeling import build_model  # isort: skip  # made importable by kn_detectron

CONFIG = "shapes/mask_rcnn_slim_R50_FPN_KN.yaml"


def main():
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--output", default="output/demo", help="folder for everything (%(default)s)"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs for the config")
    args = parser.parse_args()
    # Layers this small gain nothing from a second thread; the other core loads the images.
    torch.set_num_threads(1)
    register_shapes(os.path.join(args.output, "shapes"))

    options = ["OUTPUT_DIR", args.output, *args.opts]
    train_args = argument_parser().parse_args(
        ["--resume", "--config", get_config_file(CONFIG), *options]
    )
    cfg = load_config(train_args)
    final = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
    results = os.path.join(cfg.OUTPUT_DIR, "inference", "results.json")
    set_up(cfg, train_args)
    if not (os.path.exists(final) and os.path.exists(results)):
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=True)
        trainer.train()

    model = build_model(cfg)
    KNCheckpointer(model).load_for_evaluation(final)
    pictures = {
        "predictions.png": lambda path: draw_predictions(cfg, model, path),
        "curves.png": lambda path: draw_curves(cfg.OUTPUT_DIR, path),
        "gains.png": lambda path: draw_gains(cfg.OUTPUT_DIR, model, path),
    }
    for name, draw in pictures.items():
        draw(os.path.join(cfg.OUTPUT_DIR, name))

    with open(results) as file:
        found = json.load(file)
    print(f"\nPictures, in {os.path.abspath(cfg.OUTPUT_DIR)}:")
    for name, content in (
        ("predictions.png", "ground truth and predictions on validation images"),
        ("curves.png", "losses and APs over the training"),
        ("gains.png", "what each layer trusts: its measurement or its prediction"),
    ):
        print(f"  {name:16} {content}")
    print(f"box AP {found['bbox']['AP']:.1f}, mask AP {found['segm']['AP']:.1f}")


if __name__ == "__main__":
    sys.exit(run(main))
