#!/usr/bin/env python
"""Measures how alike the features of different images are before any training.

Example:
    python tools/evidence/similarity.py output/tiny200/R50_*

For each run of tools/evidence/classification.py whose network is a detector's ResNet, this takes
the network at its initialisation and one batch of training images. It averages the last features
of each image over the positions, and then the cosine of the angle between these vectors over all
pairs of images. At 1 all images look the same to the classifier.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from kn_detectron.engine.command_line import run

sys.path.insert(0, str(Path(__file__).parents[1]))
# Beside this file, not installed.
from evidence.classifiers import build_classifier, training_images  # noqa: E402


def mean_cosine(vectors: Tensor) -> float:
    """The average cosine between two different rows.

    Args:
        vectors: shape (N, C), N > 1.
    """
    units = torch.nn.functional.normalize(vectors, dim=1)
    count = len(units)
    # The sum over all pairs is that with itself of the sum of the unit vectors.
    return ((units.sum(0).square().sum() - count) / (count * (count - 1))).item()


@torch.no_grad()
def similarity(folder: Path) -> float:
    """The average cosine between the images of one batch, for the network of a run."""
    cfg, model = build_classifier(folder)
    images = next(training_images(cfg, model))
    return mean_cosine(model.backbone(images)["res5"].mean((2, 3)))


def main():
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of classification.py's runs")
    parser.add_argument("--output", default="docs/evidence/similarity.json", help="(%(default)s)")
    args = parser.parse_args()
    found = {folder.name: round(similarity(folder), 4) for folder in args.runs}
    Path(args.output).write_text(json.dumps(found, indent=1) + "\n")
    for name, value in found.items():
        print(f"{name}: {value:.3f}")


if __name__ == "__main__":
    sys.exit(run(main))
