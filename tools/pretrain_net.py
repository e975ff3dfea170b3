#!/usr/bin/env python
"""Pre-trains the backbone of a detection config, or any network, by image classification.

Examples:
    python tools/pretrain_net.py --config configs/mask_rcnn_R50_C4_KN.yaml --data imagenet --num-gpus 8
    python tools/pretrain_net.py --config configs/shapes/mask_rcnn_slim_R50_FPN_KN.yaml --data cifar10 \\
        --norm BN --norm-batch-size 2 --epochs 30 --batch-size 64 --image-size 64
    python tools/pretrain_net.py --config configs/mask_rcnn_R50_C4_KN.yaml --data cifar10 --image-size 32 \\
        --network cifar_resnet32_preactivation --norm-batch-size 2 MODEL.KN.VARIANT paper
    python tools/train_net.py --config configs/mask_rcnn_R50_C4_KN.yaml --num-gpus 8 \\
        MODEL.WEIGHTS output/pretraining_KN/backbone.pth
"""

import sys

from kn_detectron.checkpoint import KNCheckpointer
from kn_detectron.engine.command_line import argument_parser, run, set_up
from kn_detectron.engine.config_file import merge_options, read_config
from kn_detectron.engine.launching import launch_ranks
from kn_detectron.engine.output_dir import make_output_dir
from kn_detectron.errors import InputError
from kn_detectron.pretraining import (
    DECIDED_KEYS,
    ClassificationTrainer,
    add_pretraining_config,
    classification_config,
    open_folders,
)


def train_or_evaluate(cfg, args):
    """What each process does."""
    set_up(cfg, args)
    if args.eval_only:
        model = ClassificationTrainer.build_model(cfg)
        checkpointer = KNCheckpointer(model, cfg.OUTPUT_DIR)
        resume = args.resume or not cfg.MODEL.WEIGHTS
        checkpointer.load_for_evaluation(cfg.MODEL.WEIGHTS, resume=resume)
        ClassificationTrainer.test(cfg, model)
        return
    trainer = ClassificationTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.train()


def load_config(args):
    """The config of the pre-training that the arguments ask for."""
    for key in args.opts[::2]:
        if key.startswith("PRETRAINING."):
            raise InputError(
                f"{key} follows from the options: leave it out, and see those of --help, such as "
                "--norm and --data."
            )
    detection = read_config(args, add_pretraining_config)
    if detection.PRETRAINING.DATA:
        raise InputError(
            f"Config file {args.config_file} is that of a pre-training: give the config of the "
            "detector that it was made from, and the same options as then."
        )
    train, _ = open_folders(args.data)
    cfg = classification_config(
        detection,
        data=args.data,
        num_classes=len(train.classes),
        num_images=len(train),
        norm=args.norm,
        norm_batch_size=args.norm_batch_size,
        epochs=args.epochs,
        batch_size=args.batch_size,
        lr=args.lr,
        weight_decay=args.weight_decay,
        image_size=args.image_size,
        network=args.network,
    )
    # A detector's config has values for fine-tuning, which pairs on the command line override; but
    # what the classifier is, classification_config has decided, with the pairs before it.
    pairs = zip(args.opts[::2], args.opts[1::2])
    merge_options(cfg, [text for pair in pairs if pair[0] not in DECIDED_KEYS for text in pair])
    cfg.freeze()
    make_output_dir(cfg, args)
    return cfg


def main():
    """Runs the command."""
    parser = argument_parser(__doc__)
    parser.add_argument("--data", required=True, help="folder with train/<class>/ and val/<class>/")
    parser.add_argument(
        "--network",
        default="",
        metavar="NAME",
        help="instead of the config's ResNet: cifar_resnet14, cifar_resnet32, cifar_resnet110 "
        "(each also with _preactivation), small_inception, inception_v2, one of "
        "torchvision.models, or timm/NAME",
    )
    parser.add_argument("--norm", help="BN, KN, GN, GN<n>, GKN, LN, WN or BRN (the config's)")
    parser.add_argument(
        "--norm-batch-size",
        type=int,
        default=0,
        metavar="M",
        help="images that are normalised together in training (all of a process's batch)",
    )
    parser.add_argument("--epochs", type=float, default=100, help="(%(default)s)")
    parser.add_argument("--batch-size", type=int, default=256, help="on all GPUs (%(default)s)")
    parser.add_argument("--lr", type=float, help="(0.1 per 256 images of the batch)")
    parser.add_argument("--weight-decay", type=float, default=1e-4, help="(%(default)s)")
    parser.add_argument("--image-size", type=int, default=224, help="in pixels (%(default)s)")
    args = parser.parse_args()
    launch_ranks(train_or_evaluate, load_config(args), args)


if __name__ == "__main__":
    sys.exit(run(main))
