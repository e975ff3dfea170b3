#!/usr/bin/env python
"""Fine-tunes Mask R-CNN with each norm on a folder of photographs, and writes the results.

Example:
    python tools/evidence/detection.py --dataset persons --output output/evidence --seeds 1 2 3 --images 2

Each run has a folder of its own, OUTPUT/ARM_IMAGESim_seedSEED. After an interruption the same
command goes on where it stopped, and does not repeat finished runs. tools/evidence/report.py makes
tables.
"""

import argparse
import itertools
import sys
import time
from pathlib import Path

from kn_detectron.engine import Trainer
from kn_detectron.engine.command_line import argument_parser, load_config, run, set_up
from kn_detectron.model_zoo import get_config, get_config_file

sys.path.insert(0, str(Path(__file__).parents[1]))
# Beside this file, not installed.
from evidence.arms import ARMS, LITE0, solver_options  # noqa: E402
from evidence.runs import run_all, run_apart, write_result  # noqa: E402


def trainer_class(arm):
    """The trainer of an arm.

    Args:
        arm (Arm): one of :data:`ARMS`.

    Returns:
        type: a :class:`~kn_detectron.engine.Trainer`.
    """
    if arm.change is None:
        return Trainer

    class ChangingTrainer(Trainer):
        """Changes a new model as the arm says."""

        @classmethod
        def build_model(cls, cfg):
            model = super().build_model(cfg)
            arm.change(model)
            return model.to(cfg.MODEL.DEVICE)  # new layers are on the CPU

    return ChangingTrainer


def train(args, name, images, seed, folder):
    """Trains and evaluates one arm in this process, and writes its result.

    Args:
        args (argparse.Namespace): the arguments of :func:`main`.
        name (str): the arm.
        images (int): images per step.
        seed (int): the seed of the run.
        folder (Path): for everything that the run writes.
    """
    arm = ARMS[name]
    options = [*arm.options, *solver_options(get_config(arm.config), images), "SEED", str(seed)]
    options += ["OUTPUT_DIR", str(folder), *args.opts]
    run_args = ["--resume", "--config", get_config_file(arm.config), *options]
    run_args = argument_parser().parse_args(run_args)
    run_args.dataset = args.dataset
    cfg = load_config(run_args)
    set_up(cfg, run_args)
    started = time.time()
    trainer = trainer_class(arm)(cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()
    settings = {
        "arm": name,
        "images": images,
        "seed": seed,
        "steps": cfg.SOLVER.MAX_ITER,
        "learning_rate": cfg.SOLVER.BASE_LR,
        "options": args.opts,
        # Since the last start: a run that was resumed took longer.
        "minutes": round((time.time() - started) / 60, 1),
    }
    write_result(folder, settings)


def train_apart(args, name, images, seed, folder):
    """:func:`train` in a process of its own."""
    command = [sys.executable, __file__, "--dataset", args.dataset, "--output", args.output]
    command += ["--arms", name, "--images", str(images), "--seeds", str(seed)]
    run_apart([*command, *(["--opts", *args.opts] if args.opts else [])], folder)


def main():
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--dataset", required=True, help="folder in COCO's layout")
    parser.add_argument(
        "--output", default="output/evidence", help="folder of the runs (%(default)s)"
    )
    parser.add_argument(
        "--arms", nargs="+", default=list(LITE0), choices=ARMS, help="(those of EfficientNet-Lite0)"
    )
    parser.add_argument("--images", nargs="+", type=int, default=[2, 1], help="per step (2 1)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="(1 2 3)")
    parser.add_argument("--opts", nargs="+", default=[], help="KEY VALUE pairs for all configs")
    args = parser.parse_args()
    runs = {
        Path(args.output) / f"{arm}_{images}im_seed{seed}": (arm, images, seed)
        for images, seed, arm in itertools.product(args.images, args.seeds, args.arms)
    }
    do = train if len(runs) == 1 else train_apart
    run_all(runs, lambda folder: do(args, *runs[folder], folder))


if __name__ == "__main__":
    sys.exit(run(main))
