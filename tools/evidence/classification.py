#!/usr/bin/env python
"""Trains a ResNet for CIFAR with each norm, normalising 1 to 64 images of a batch together.

Examples:
    python tools/evidence/classification.py --data cifar10 --output output/cifar --micro-batches 1 2 64
    python tools/evidence/classification.py --data tiny200 --output output/tiny200 --micro-batches 64 \\
        --epochs 6 --arms R50_BN R50_GN R50_KN_annealed

The arms R50_* pre-train the slim ResNet-50 of the detectors in configs/photos/ on photographs.

All runs have the same batch, learning rate and epochs. They differ in the norm and in the number of
images that share statistics (tools/pretrain_net.py --norm-batch-size). Each run has a folder of its
own, OUTPUT/ARM_mMICRO_BATCH_seedSEED. After an interruption the same command goes on where it
stopped, and does not repeat finished runs. tools/evidence/report.py makes a table and a picture.
"""

import argparse
import itertools
import sys
from pathlib import Path
from typing import NamedTuple, Tuple

from kn_detectron.engine.command_line import run
from kn_detectron.model_zoo import get_config_file

sys.path.insert(0, str(Path(__file__).parents[1]))
# Beside this file, not installed.
from evidence.runs import run_all, run_apart, write_result  # noqa: E402


class Arm(NamedTuple):
    """One line of the picture.

    Attributes:
        label: its name in the tables.
        norm: --norm of tools/pretrain_net.py.
        options: KEY, VALUE, ... for the config.
        network: --network of tools/pretrain_net.py; "" is the ResNet of the config.
        shares: whether images share statistics, so that the micro-batch matters.
        config: gives the pixel statistics, the device, and the ResNet if no network is named.
        image_size: in pixels.
    """

    label: str
    norm: str
    options: Tuple[str, ...] = ()
    network: str = "cifar_resnet14"
    shares: bool = True
    config: str = "shapes/mask_rcnn_slim_R50_FPN_KN.yaml"
    image_size: int = 32


_BATCH_SIZE = 64
_ANNEALED = ("MODEL.KN.GAIN_ANNEAL", "[0.6, 0.9]")
_NO_GAIN = ("MODEL.KN.GAIN", "0.0", "MODEL.KN.LEARN_GAIN", "False")
_PREACTIVATION = "cifar_resnet14_preactivation"
# What the authors' code has: a fixed gain, no process noise, and sampled predictions.
_RELEASED = (
    *("MODEL.KN.VARIANT", "paper"),
    *("MODEL.KN.GAIN", "0.1"),
    *("MODEL.KN.LEARN_GAIN", "False"),
    *("MODEL.KN.PROCESS_MODEL", "False"),
    *("MODEL.KN.PREDICTION", "monte_carlo"),
)
CIFAR = {
    "GN": Arm("GN, 4 groups", "GN4", shares=False),
    "BN": Arm("BN", "BN"),
    "KN": Arm("KN", "KN"),
    "KN_annealed": Arm("KN, annealed", "KN", _ANNEALED),
    "KN_gain0": Arm("KN, gain 0", "KN", _NO_GAIN, shares=False),
    "BN_preactivation": Arm("BN, pre-activation", "BN", network=_PREACTIVATION),
    "KN_released_preactivation": Arm(
        "KN as released, pre-activation",
        "KN",
        _RELEASED,
        network=_PREACTIVATION,
    ),
}
# Other norms that the paper compares with.
OTHERS = {
    "GKN": Arm("GKN, 4 groups", "GKN", ("MODEL.KN.NUM_GROUPS", "4"), shares=False),
    "LN": Arm("LN", "LN", shares=False),
    "WN": Arm("WN", "WN", shares=False),
    "BRN": Arm("BRN", "BRN"),
}


def _r50(label: str, norm: str, config: str, options: Tuple[str, ...] = (), shares=True) -> Arm:
    # The same ResNet as in configs/photos/.
    config = f"shapes/mask_rcnn_slim_R50_C4_{config}.yaml"
    return Arm(label, norm, options, network="", shares=shares, config=config, image_size=64)


R50 = {
    "R50_BN": _r50("BN", "BN", "BN"),
    # At the default rate of 0.025 GroupNorm was still at chance after an epoch.
    "R50_GN": _r50("GN, rate 0.1", "GN8", "GN", ("SOLVER.BASE_LR", "0.1"), shares=False),
    "R50_GKN": _r50(
        "GKN, rate 0.1",
        "GKN",
        "GKN",
        ("SOLVER.BASE_LR", "0.1", "MODEL.KN.GAIN", "0.9"),
        shares=False,
    ),
    "R50_KN_annealed": _r50("KN, annealed", "KN", "KN", _ANNEALED),
    "R50_KN_gain0": _r50("KN, gain 0", "KN", "KN", _NO_GAIN, shares=False),
}

ARMS = {**CIFAR, **OTHERS, **R50}


def train(args, name: str, micro_batch: int, seed: int, folder: Path) -> None:
    """Runs tools/pretrain_net.py for one arm and writes its result."""
    arm = ARMS[name]
    command = [sys.executable, str(Path(__file__).parents[1] / "pretrain_net.py"), "--resume"]
    command += ["--config", get_config_file(arm.config), "--data", args.data]
    command += ["--network", arm.network, "--image-size", str(arm.image_size)]
    command += ["--norm", arm.norm, "--norm-batch-size", str(micro_batch)]
    command += ["--epochs", str(args.epochs), "--batch-size", str(_BATCH_SIZE)]
    command += arm.options
    command += ["SEED", str(seed), "OUTPUT_DIR", str(folder)]
    run_apart(command, folder)
    settings = {"arm": name, "micro_batch": micro_batch, "seed": seed, "epochs": args.epochs}
    write_result(folder, settings)


def main():
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", required=True, help="folder with train/<class>/ and val/<class>/")
    parser.add_argument("--output", default="output/cifar", help="folder of the runs (%(default)s)")
    parser.add_argument(
        "--arms", nargs="+", default=list(CIFAR), choices=ARMS, help="(those on CIFAR)"
    )
    parser.add_argument(
        "--micro-batches", nargs="+", type=int, default=[1, 2, 4, 8, 16, 64], help="%(default)s"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], help="(1)")
    parser.add_argument("--epochs", type=int, default=8, help="(%(default)s)")
    args = parser.parse_args()
    runs = {}
    for seed, micro_batch, arm in itertools.product(args.seeds, args.micro_batches, args.arms):
        # One result stands for all micro-batches if images share nothing.
        micro_batch = micro_batch if ARMS[arm].shares else 1
        folder = Path(args.output) / f"{arm}_m{micro_batch}_seed{seed}"
        runs[folder] = arm, micro_batch, seed
    run_all(runs, lambda folder: train(args, *runs[folder], folder))


if __name__ == "__main__":
    sys.exit(run(main))
