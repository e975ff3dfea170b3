#!/usr/bin/env python
"""Converts the weights of a ResNet, or of a detector with one, to another norm.

IN may come from torchvision, timm, Caffe2, Detectron1, detectron2 or kn_detectron. OUT is a .pth
file for MODEL.WEIGHTS. BatchNorm becomes Kalman Normalization, whose priors are calibrated to the
running statistics. Training from IN needs no conversion: as MODEL.WEIGHTS of a config, IN is
converted when it is loaded.

Examples:
    python tools/convert_weights.py resnet50.pth r50_kn.pth
    python tools/convert_weights.py detectron2://ImageNetPretrained/MSRA/R-50.pkl r50_kn.pth
    python tools/convert_weights.py output/model_final.pth model_bn.pth --norm BN
    python tools/convert_weights.py output/model_final.pth small.pth --norm same --half
"""

import argparse
import sys

from kn_detectron.checkpoint import convert_weights
from kn_detectron.checkpoint.conversion import NORMS
from kn_detectron.engine.command_line import run
from kn_detectron.layers.mixin import VARIANTS

from detectron2.utils.logger import setup_logger  # isort: skip  # made importable by kn_detectron


def main():
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("source", metavar="IN", help="file or address of weights")
    parser.add_argument("target", metavar="OUT", help=".pth file to write")
    parser.add_argument(
        "--norm",
        choices=NORMS,
        default="KN",
        help="of the ResNet; same: as it is, in other networks too (%(default)s)",
    )
    parser.add_argument(
        "--variant", choices=VARIANTS, default="network", help="of KN (%(default)s)"
    )
    parser.add_argument("--half", action="store_true", help="write filters in float16")
    args = parser.parse_args()
    setup_logger(name="kn_detectron")
    convert_weights(args.source, args.target, args.norm, args.variant, args.half)
    print(f"Written: {args.target}")


if __name__ == "__main__":
    sys.exit(run(main))
