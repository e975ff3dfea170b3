"""What the commands share: arguments, the config with its datasets, logs, and sentences for faults."""

import argparse
import contextlib
import io
import logging
import os
import signal
import sys
from pathlib import Path

import torch
from detectron2.engine import default_argument_parser, default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ..compat import without_notices
from ..data import (
    check_datasets,
    check_requirements,
    register_coco_folder,
    register_named_folders,
    use_checked_datasets,
)
from ..errors import InputError
from ..files import atomic_write
from .config_file import read_config
from .detectron2_keys import check_builders
from .launching import check_ranks
from .logs import full_disk_told_once
from .output_dir import folder_of_run, make_output_dir

__all__ = [
    "argument_parser",
    "load_config",
    "run",
    "set_up",
]


def argument_parser(about=None):
    """detectron2's argument parser, in which ``--config`` is another name of ``--config-file``.

    Args:
        about (str): the docstring of a tool for its ``--help``: what it does, "Examples:" and the
            examples. None shows detectron2's own examples.
    """
    description, _, examples = (about or "").partition("Examples:\n")
    parser = argparse.ArgumentParser(
        # The pairs come last, since argparse takes all that follows for pairs too.
        usage="%(prog)s --config FILE [options] [KEY VALUE ...]",
        description=description.strip() or None,
        epilog=f"Examples:\n{examples}" if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[default_argument_parser()],
        add_help=False,  # detectron2's parser has it
        conflict_handler="resolve",  # what follows takes the place of detectron2's
    )
    parser.add_argument(
        "--config", "--config-file", dest="config_file", default="", metavar="FILE", help="a config"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in OUTPUT_DIR"
    )
    parser.set_defaults(dataset=None)
    return parser


def load_config(args):
    """Loads and checks the config that the arguments name, and the datasets it names.

    Args:
        args (argparse.Namespace): of :func:`argument_parser`.

    Returns:
        CfgNode: frozen. With the config.yaml of a run, --resume and --eval-only go on in its
        folder, wherever that is now, unless the pairs have another OUTPUT_DIR.

    Raises:
        InputError: something in it is wrong.
    """
    cfg = read_config(args)
    if not args.eval_only:
        check_builders(cfg)
    folder = folder_of_run(args.config_file)
    if folder and (args.resume or args.eval_only) and "OUTPUT_DIR" not in args.opts[::2]:
        cfg.OUTPUT_DIR = folder
    if args.dataset:
        _refuse_datasets(args.opts)
        splits = ("val",) if args.eval_only else ("train", "val")
        *train, val = register_coco_folder(args.dataset, splits)
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = tuple(train), (val,)
    register_named_folders(cfg)
    keys = ("TEST",) if args.eval_only else ("TRAIN", "TEST")
    if not cfg.DATASETS[keys[0]]:
        raise InputError(f"DATASETS.{keys[0]} is empty: name at least one dataset.")
    check_ranks(args)  # before what takes long
    make_output_dir(cfg, args)
    # The checks log into the file that the processes of the run go on with.
    setup_logger(cfg.OUTPUT_DIR, args.machine_rank * args.num_gpus, name="kn_detectron")
    _escape_what_the_locale_lacks()
    truths = check_datasets(cfg, keys)
    if args.dataset:
        found = [truths[key][name] for key in keys for name in cfg.DATASETS[key]]
        if args.eval_only or args.resume:
            _check_classes(cfg, found[0].classes)
        _fit_to_folder(cfg, found)
    check_requirements(cfg, truths)
    cfg.freeze()
    return cfg


def _refuse_datasets(options):
    for key in ("DATASETS.TRAIN", "DATASETS.TEST"):
        if key in options[::2]:
            raise InputError(f"--dataset sets {key}, and so does a pair: leave one of them out.")


def _check_classes(cfg, classes):
    """Checks that a folder has the classes that a run was trained with, as far as that is known."""
    trained = list(cfg.DATASETS.CLASS_NAMES)
    if trained and trained != list(classes):
        raise InputError(
            f"The run was trained with the classes {', '.join(trained)}, and the folder of --dataset "
            f"has {', '.join(classes)}: give a folder with the same classes in the order of their "
            'ids, or DATASETS.CLASS_NAMES "[]" if they are the same under other names.'
        )


def _fit_to_folder(cfg, truths):
    """Sets what the annotations of a folder decide."""
    num_classes = len(truths[0].classes)
    cfg.DATASETS.CLASS_NAMES = list(truths[0].classes)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = num_classes
    if any(truth.has_encoded_masks for truth in truths):
        cfg.INPUT.MASK_FORMAT = "bitmask"


def set_up(cfg, args):
    """Sets up the logs, in every process of a run, and writes the config into a new folder.

    The config.yaml of an earlier run stays until :meth:`Trainer.train` begins, since an evaluation
    and a run that is refused are not what the checkpoints there come from.

    Args:
        cfg (CfgNode): of :func:`load_config`.
        args (argparse.Namespace): of :func:`argument_parser`.
    """
    register_named_folders(cfg)
    use_checked_datasets(cfg)
    with _former_config_kept(cfg):
        default_setup(cfg, args)
    logger = setup_logger(cfg.OUTPUT_DIR, comm.get_rank(), name="kn_detectron")
    _escape_what_the_locale_lacks()
    if cfg.MODEL.DEVICE == "cpu" and not torch.cuda.is_available():
        logger.info("No GPU is found: the CPU is used, in full precision.")


@contextlib.contextmanager
def _former_config_kept(cfg):
    """Keeps detectron2 from replacing the config.yaml of an earlier run."""
    path, former = Path(cfg.OUTPUT_DIR, "config.yaml"), Path(cfg.OUTPUT_DIR, "config.yaml.former")
    if not comm.is_main_process():
        yield
        return
    if path.is_file() and not former.exists():  # else a process was killed below
        with atomic_write(str(former)) as file:
            file.write(path.read_bytes())
    try:
        yield
    finally:
        if former.exists():
            os.replace(former, path)  # which takes no room on a full disk


def _escape_what_the_locale_lacks():
    """Makes the logs escape characters that they cannot encode, as in names of categories."""
    loggers = map(logging.getLogger, ("detectron2", "fvcore", "kn_detectron"))
    for handler in (handler for logger in loggers for handler in logger.handlers):
        if isinstance(getattr(handler, "stream", None), io.TextIOWrapper):
            handler.stream.reconfigure(errors="backslashreplace")


def run(command):
    """Runs a command line. A fault of the input ends it with one sentence and exit status 1.

    So does a file or folder that may not be read or written.

    Args:
        command (callable): called without arguments.

    Returns:
        int: the exit status.
    """
    try:
        with without_notices(), full_disk_told_once():
            command()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except PermissionError as error:
        if error.filename is None:
            raise
        print(
            f"error: {error.filename} cannot be used ({error.strerror}): change its permissions or "
            "give another path.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("error: interrupted.", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0
