#!/usr/bin/env python
"""Draws how far the variance that a micro-batch is normalised by is from the moving one.

Example:
    python tools/evidence/variance_gap.py output/cifar/BN_m2_seed1 output/cifar/KN_m2_seed1

This is the paper's Fig. 5. For each run of tools/evidence/classification.py it takes the trained
network and micro-batches of the size that it was trained with. The gap of a channel in a
micro-batch is |log(v / w)|: v is the variance that training would normalise by, which is the
measured one for BatchNorm and the posterior for Kalman Normalization; w is the moving average. The
picture shows the last norm, channel by channel, and the average gap of every norm.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Dict, Iterable

import torch
from torch import Tensor, nn

from kn_detectron.checkpoint import KNCheckpointer
from kn_detectron.engine.command_line import run

sys.path.insert(0, str(Path(__file__).parents[1]))
# Beside this file, not installed.
from evidence.classifiers import build_classifier, training_images  # noqa: E402
from evidence.picture import draw_gaps  # noqa: E402


@torch.no_grad()
def variance_gaps(network: nn.Module, batches: Iterable[Tensor]) -> Dict[str, Tensor]:
    """The gap of each norm between the variance of each micro-batch and the moving one.

    Args:
        network: in any mode; its norms keep moving statistics, and have those of training when the
            function returns.
        batches: inputs of the network, each of one micro-batch.

    Returns:
        dict: for each BatchNorm or Kalman layer by its name, |log(v / w)| of shape (C, batches).
    """
    norms = {n: m for n, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}
    state = {name: buffer.clone() for name, buffer in network.state_dict().items()}
    moving = {name: norm.running_var.clone() for name, norm in norms.items()}
    momentum = {name: norm.momentum for name, norm in norms.items()}
    gaps = {name: [] for name in norms}
    network.train()
    try:
        for norm in norms.values():
            norm.momentum = 1.0  # the moving variance becomes that of the batch
        for batch in batches:
            network(batch)
            for name, norm in norms.items():
                gaps[name].append((norm.running_var / moving[name]).log().abs())
    finally:
        for name, norm in norms.items():
            norm.momentum = momentum[name]
        network.load_state_dict(state)
    return {name: torch.stack(columns, 1) for name, columns in gaps.items()}


def read_run(folder: Path, count: int) -> Dict[str, Tensor]:
    """The gaps of a run, over ``count`` micro-batches of training images."""
    cfg, model = build_classifier(folder)
    KNCheckpointer(model, str(folder)).load_for_evaluation("", resume=True)
    size = cfg.PRETRAINING.NORM_BATCH_SIZE
    parts = (part for batch in training_images(cfg, model) for part in batch.split(size))
    return variance_gaps(model.backbone, itertools.islice(parts, count))


def main():
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of classification.py's runs")
    parser.add_argument(
        "--output",
        default="docs/evidence/variance_gap",
        help="writes OUTPUT.json and OUTPUT.png (%(default)s)",
    )
    parser.add_argument("--batches", type=int, default=50, help="micro-batches (%(default)s)")
    args = parser.parse_args()
    gaps = {folder.name: read_run(folder, args.batches) for folder in args.runs}
    means = {
        name: {norm: round(gap.mean().item(), 4) for norm, gap in by_norm.items()}
        for name, by_norm in gaps.items()
    }
    Path(f"{args.output}.json").write_text(json.dumps(means, indent=1) + "\n")
    draw_gaps(gaps, Path(f"{args.output}.png"))
    for name, by_norm in means.items():
        print(f"{name}: {sum(by_norm.values()) / len(by_norm):.3f} on average over the norms")


if __name__ == "__main__":
    sys.exit(run(main))
