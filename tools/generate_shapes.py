#!/usr/bin/env python
"""Writes the generated shapes, one per image, as a classification dataset in ImageNet's layout.

tools/pretrain_net.py takes the folder as its --data. It has FOLDER/train/<category>/*.png and
FOLDER/val/<category>/*.png. The detection datasets, shapes_train and shapes_val, need no command:
they are written when they are first used.

Examples:
    python tools/generate_shapes.py output/single_shapes
    python tools/generate_shapes.py output/few_shapes --num-train 1000 --num-val 200
"""

import argparse
import sys

from kn_detectron.data import SingleShapesSpec, generate_single_shapes
from kn_detectron.engine.command_line import run


def main():
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    default = SingleShapesSpec()
    number = dict(type=int, metavar="N")
    parser.add_argument("folder", help="a new folder")
    parser.add_argument(
        "--num-train", default=default.num_train, **number, help="training images (%(default)s)"
    )
    parser.add_argument(
        "--num-val", default=default.num_val, **number, help="validation images (%(default)s)"
    )
    parser.add_argument("--size", default=default.size, **number, help="in pixels (%(default)s)")
    parser.add_argument("--seed", default=default.seed, **number, help="(%(default)s)")
    args = parser.parse_args()
    spec = SingleShapesSpec(args.num_train, args.num_val, args.size, args.seed)
    generate_single_shapes(args.folder, spec)
    print(f"{spec.num_train} + {spec.num_val} images are in {args.folder}.")


if __name__ == "__main__":
    sys.exit(run(main))
