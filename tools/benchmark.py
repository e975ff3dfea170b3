#!/usr/bin/env python
"""Compares Kalman Normalization with the other norms: time, memory and launches.

It prints a table for each measurement, and a table of all ratios at the end. It writes the results,
with every single time, as JSON and as pictures into a folder. What the machine cannot run is listed
as "not run", with the reason.

Examples:
    python tools/benchmark.py  # a set for a CPU, some minutes
    python tools/benchmark.py --preset gpu  # all of the project's targets
    python tools/benchmark.py --what step --norms BN KN --images 1 2 --size 800x1333 --device cuda
    python tools/benchmark.py --configs configs/mask_rcnn_R50_C4_KN.yaml my_config.yaml --size 800x1333
    python tools/benchmark.py --what layer --shapes 1x256x200x336 --dtypes bfloat16 --formats channels_last
"""

import argparse
import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import torch
from tqdm import tqdm

# The folder, which Python prefers to this file of the same name.
from benchmark import (
    PRESETS,
    WHATS,
    describe_machine,
    draw_bars,
    draw_curves,
    format_group,
    format_summary,
    make_groups,
    measure_group,
    write_json,
)
from benchmark.presets import DTYPES, FORMATS, NORMS
from kn_detectron import InputError
from kn_detectron.engine.command_line import run
from kn_detectron.engine.config_file import read_config
from kn_detectron.engine.launching import launch_ranks
from kn_detectron.engine.output_dir import make_writable

from detectron2.utils import comm  # isort: skip  # made importable by kn_detectron


def dimensions(text):
    """``"1x256x200x336"`` as a tuple of numbers."""
    return tuple(int(number) for number in text.split("x"))


def parse_arguments():
    """Parses the command line."""

    def listed(names):
        return "\n".join(f"  {name}: {meaning}" for name, meaning in names.items())

    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"what can be measured:\n{listed(WHATS)}\n\nnorms:\n{listed(NORMS)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--preset", default="cpu", help=f"{', '.join(PRESETS)}; the options below change it")
    add("--what", nargs="+", metavar="WHAT", help="see below")
    add("--norms", nargs="+", metavar="NORM", help="see below")
    add("--configs", nargs="+", metavar="FILE", help="compares training steps with the first one's")
    add("--shapes", nargs="+", metavar="NxCxHxW", type=dimensions, help="of a layer's features")
    add("--images", nargs="+", metavar="N", type=int, help="numbers of images per step")
    add("--size", metavar="PIXELS or HxW", type=dimensions, help="of the images")
    add("--regions", metavar="N", type=int, help="regions of interest per image in a step")
    add("--dtypes", nargs="+", metavar="DTYPE", help=", ".join(DTYPES))
    add("--formats", nargs="+", metavar="FORMAT", help=", ".join(FORMATS))
    add("--rounds", metavar="N", type=int, help="how often each candidate is timed")
    add("--compile", action="store_true", help="also the backbone under torch.compile")
    add("--device", help="cpu or cuda (a GPU if the preset is gpu, else the CPU)")
    add("--num-gpus", metavar="N", type=int, default=1, help="one process each, for SyncBN")
    add("--threads", metavar="N", type=int, help="of torch on the CPU (torch's default)")
    add("--output", default="output/benchmark", help="folder for the results (%(default)s)")
    # For launch_ranks.
    parser.set_defaults(num_machines=1, machine_rank=0, dist_url="auto")
    return parser.parse_args()


def prepare(args):
    """The groups of measurements that the arguments ask for.

    Raises:
        InputError: something in the arguments is wrong.
    """
    if args.device is None:
        args.device = "cuda" if args.preset == "gpu" or args.num_gpus > 1 else "cpu"
    if args.device not in ("cpu", "cuda"):
        raise InputError(f"--device is {args.device!r}, but must be cpu or cuda")
    if args.threads is not None and args.threads < 1:
        raise InputError(f"--threads is {args.threads}, but must be 1 or more")
    if args.size is not None and len(args.size) == 1:
        args.size *= 2
    if args.size is not None and len(args.size) != 2:
        raise InputError("--size takes a number of pixels, or a height and a width as 800x1333")
    if any(len(shape) != 4 for shape in args.shapes or ()):
        raise InputError("--shapes takes four numbers each, as 1x256x200x336")
    if args.configs and (args.what or args.norms or args.compile):
        raise InputError("--configs says what is measured: leave out --what, --norms and --compile")
    for file in args.configs or ():
        if not file.endswith(".yaml"):
            raise InputError(f"--configs takes files of configs, *.yaml, not {file}")
        read_config(SimpleNamespace(config_file=file, opts=["MODEL.DEVICE", args.device]))
    names = ("norms", "shapes", "images", "size", "regions", "dtypes", "formats", "rounds")
    changes = {name: getattr(args, name) for name in names}
    changes = {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()}
    whats = ["step"] if args.configs else args.what
    if args.compile:
        whats = [*(whats or PRESETS.get(args.preset, ())), "compiled"]
    groups = make_groups(args.preset, whats and list(dict.fromkeys(whats)), **changes)
    if args.configs:
        files = tuple(dict.fromkeys(args.configs))
        # As many regions as each config says, unless the command line does.
        fields = dict(candidates=files, bases=files[:1], regions=args.regions)
        groups = [replace(group, **fields) for group in groups]
    make_writable(args.output, "--output")
    return groups


def benchmark(groups, args):
    """What each process does: only the first one prints and writes."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    result = {"machine": describe_machine(), "arguments": vars(args), "groups": []}
    chief = comm.is_main_process()
    if chief:
        machine = (f"{key} {value}" for key, value in result["machine"].items() if value)
        print(", ".join(machine) + "\n", flush=True)
    # On a terminal, a bar shows the time that is left.
    for group in tqdm(groups, unit="table", disable=None if chief else True):
        result["groups"].append(measure_group(group, torch.device(args.device)))
        if chief:
            tqdm.write(format_group(result["groups"][-1]))
            # Written after each group, so that an interruption loses little.
            write_json(result, os.path.join(args.output, "benchmark.json"))
    if not chief:
        return
    print(format_summary(result["groups"]), flush=True)
    for draw, name in ((draw_bars, "ratios.png"), (draw_curves, "curves.png")):
        draw(result["groups"], os.path.join(args.output, name))
    print(
        f"Results, in {os.path.abspath(args.output)}: {', '.join(sorted(os.listdir(args.output)))}"
    )
    rows = [row for group in result["groups"] for row in group["rows"]]
    failed = sum(row["status"] == "failed" for row in rows)
    if failed:
        raise SystemExit(f"error: {failed} of {len(rows)} measurements failed: see above.")


def main():
    """Measures what the command line says."""
    args = parse_arguments()
    launch_ranks(benchmark, prepare(args), args)


if __name__ == "__main__":
    sys.exit(run(main))
