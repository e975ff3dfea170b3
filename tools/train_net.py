#!/usr/bin/env python
"""Trains and evaluates detectron2 models with Kalman Normalization.

Examples:
    python tools/train_net.py --config configs/shapes/mask_rcnn_slim_R50_C4_KN.yaml
    python tools/train_net.py --config configs/mask_rcnn_R50_C4_KN.yaml --num-gpus 8
    python tools/train_net.py --config configs/mask_rcnn_R50_C4_KN.yaml --resume SOLVER.MAX_ITER 90000
    python tools/train_net.py --config output/config.yaml --eval-only
    python tools/train_net.py --config configs/mask_rcnn_R50_C4_KN_finetune.yaml --dataset my_data

The first example trains for minutes on a CPU, with images that it generates.
"""

import sys

from kn_detectron.checkpoint import KNCheckpointer
from kn_detectron.engine import Trainer, trained_weights
from kn_detectron.engine.command_line import argument_parser, load_config, run, set_up
from kn_detectron.engine.launching import launch_ranks


def train_or_evaluate(cfg, args):
    """What each process does."""
    set_up(cfg, args)
    if args.eval_only:
        weights = trained_weights(args.config_file, args.opts) or cfg.MODEL.WEIGHTS
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.WEIGHTS = weights  # or the model would look for what the run had started from
        model = Trainer.build_model(cfg)
        checkpointer = KNCheckpointer(model, cfg.OUTPUT_DIR)
        checkpointer.load_for_evaluation(weights, resume=args.resume)
        Trainer.test(cfg, model)
        return
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.train()


def main():
    """Runs the command."""
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--dataset",
        metavar="FOLDER",
        help="data of your own in COCO's layout: annotations/instances_{train,val}.json, train/, "
        "val/; sets DATASETS and the number of classes",
    )
    args = parser.parse_args()
    launch_ranks(train_or_evaluate, load_config(args), args)


if __name__ == "__main__":
    sys.exit(run(main))
