#!/usr/bin/env python
"""Writes the generated shapes as a classification dataset in ImageNet's layout.

What `tools/pretrain_net.py` takes as its --data: one shape per image, FOLDER/train/<category>/ and
FOLDER/val/<category>/. (The detection dataset, shapes_train and shapes_val, writes itself.)
"""

import argparse
import sys

from kn_detectron.data import generate_classification_shapes
from kn_detectron.engine.command_line import run


def main():
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", help="a new folder")
    parser.add_argument("--num-train", type=int, default=10000, help="images (%(default)s)")
    parser.add_argument("--num-val", type=int, default=1000, help="images (%(default)s)")
    parser.add_argument("--size", type=int, default=96, help="shorter side in px (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the images (%(default)s)")
    args = parser.parse_args()
    generate_classification_shapes(args.folder, args.num_train, args.num_val, args.size, args.seed)
    print(f"{args.num_train} + {args.num_val} images of shapes are in {args.folder}.")


if __name__ == "__main__":
    sys.exit(run(main))
