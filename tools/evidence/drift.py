#!/usr/bin/env python
"""Measures how far the statistics of a trained detector are from those that it normalises with.

Example:
    python tools/evidence/drift.py output/evidence/BN_frozen_2im_seed1 --dataset persons

For the run of tools/evidence/detection.py, and for its network before the run, this feeds the
validation photographs and measures the mean m and variance v of each channel in front of each norm,
over all of them. The norm itself takes a mean mu and variance w: the frozen ones of BN*, or what
Kalman Normalization at gain 0 predicts. The drift is the average over channels and norms of
|log(v / w)|, and of |m - mu| / sqrt(w). At 0 the norm does what it says.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Dict, Iterable, Tuple

import torch
import tqdm
from detectron2.config import CfgNode
from torch import Tensor, nn

from kn_detectron.checkpoint import KNCheckpointer
from kn_detectron.engine import load_run
from kn_detectron.engine.command_line import run

# Behind kn_detectron, which makes old versions of detectron2 importable.
from detectron2.data import DatasetMapper  # isort: skip
from detectron2.modeling import build_model  # isort: skip


@torch.no_grad()
def drift(network: nn.Module, batches: Iterable[Tensor]) -> Tuple[float, float]:
    """The drift of the variance and of the mean of a network with moving or frozen statistics.

    Args:
        network: in evaluation mode.
        batches: inputs of the network.

    Returns:
        the averages over all channels of all norms of abs(log(v / w)) and abs(m - mu) / sqrt(w).
        Each variance has the norm's eps added.
    """
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    sums = {norm: torch.zeros(3, norm.num_features, dtype=torch.float64) for norm in norms}

    def add(norm, inputs):
        x = inputs[0].double().transpose(0, 1).flatten(1)
        count = torch.full((len(x),), float(x.shape[1]), dtype=torch.float64)
        sums[norm] += torch.stack([count, x.sum(1).cpu(), x.square().sum(1).cpu()])

    hooks = [norm.register_forward_pre_hook(add) for norm in norms]
    try:
        for batch in batches:
            network(batch)
    finally:
        for hook in hooks:
            hook.remove()
    of_variance, of_mean = [], []
    for norm, (count, total, squares) in sums.items():
        mean = total / count
        var = squares / count - mean.square() + norm.eps
        used = norm.running_var.double().cpu() + norm.eps
        of_variance.append((var / used).log().abs())
        of_mean.append((mean - norm.running_mean.double().cpu()).abs() / used.sqrt())
    return torch.cat(of_variance).mean().item(), torch.cat(of_mean).mean().item()


def photographs(cfg: CfgNode, model: nn.Module, folder: Path) -> Iterable[Tensor]:
    """The validation photographs of a folder in COCO's layout, as the backbone gets them."""
    content = json.loads((folder / "annotations" / "instances_val.json").read_text())
    mapper = DatasetMapper(cfg, is_train=False)
    for image in tqdm.tqdm(content["images"], unit="photo"):
        path = folder / "val" / image["file_name"]
        yield model.preprocess_image([mapper({"file_name": str(path)})]).tensor


def main():
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of detection.py's runs")
    parser.add_argument("--dataset", required=True, type=Path, help="folder in COCO's layout")
    parser.add_argument("--output", default="docs/evidence/drift.json", help="(%(default)s)")
    args = parser.parse_args()
    found = []
    for folder in args.runs:
        cfg = load_run(folder)
        weights, cfg.MODEL.WEIGHTS = cfg.MODEL.WEIGHTS, ""
        model = build_model(cfg).eval()  # with the weights of its network
        result = json.loads((folder / "result.json").read_text())
        row: Dict = {
            key: result[key] for key in ("arm", "learning_rate", "steps", "images", "seed")
        }
        for when in ("before", "after"):
            if when == "after":
                KNCheckpointer(model).load_for_evaluation(weights)
            images = photographs(cfg, model, args.dataset)
            row[when] = [round(value, 4) for value in drift(model.backbone, images)]
        found.append(row)
        print(row, flush=True)
    Path(args.output).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run(main))
