"""What the commands share: arguments, the config, several processes, and sentences for faults."""

import argparse
import contextlib
import io
import logging
import multiprocessing
import os
import re
import signal
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from ..compat import without_notices
from ..config import add_kn_config, check_config
from ..data import (
    check_datasets,
    check_requirements,
    register_coco_folder,
    register_named_folders,
    use_checked_datasets,
)
from ..errors import InputError, one_line
from ..files import atomic_write, explained_full_disk
from .detectron2_keys import check_detectron2_keys
from .logs import full_disk_told_once
from .output_dir import folder_of_run, make_output_dir
from .stopping import STOPPING_SIGNALS, signals_to_take_over

__all__ = [
    "argument_parser",
    "launch_ranks",
    "load_config",
    "merge_options",
    "read_config",
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
    _check_ranks(args)  # before what takes long
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


def read_config(args, *extensions):
    """Reads the config that the arguments name, without looking at its datasets.

    Without a GPU, MODEL.DEVICE "cuda", which is detectron2's default, becomes "cpu". A command line
    that asks for "cuda" itself is refused. On the CPU mixed precision is switched off.

    Args:
        args (argparse.Namespace): of :func:`argument_parser`.
        extensions (callable): each adds keys to a config, as :func:`add_kn_config` does.

    Returns:
        CfgNode: not frozen.

    Raises:
        InputError: something in it is wrong.
    """
    cfg = get_cfg()
    for extend in (add_kn_config, *extensions):
        extend(cfg)
    _refuse_flags(args.opts)  # --config may be one
    _merge_file(cfg, args.config_file)
    merge_options(cfg, args.opts)
    # Only commands that train have several ranks.
    _choose_device(cfg, args.opts, getattr(args, "num_gpus", 1))
    check_config(cfg)
    check_detectron2_keys(cfg)
    return cfg


def _merge_file(cfg, path):
    if not path:
        raise InputError(
            "No config is given: give one with --config FILE, and begin with --config "
            "configs/shapes/mask_rcnn_slim_R50_C4_KN.yaml, which trains for minutes on a CPU with "
            "images that it generates (GETTING_STARTED.md goes on from there)."
        )
    if not os.path.isfile(path):
        what = "is a folder" if os.path.isdir(path) else "does not exist"
        raise InputError(f"Config file {path} {what}: give the path of a YAML file.")
    if path.endswith(".py"):
        raise InputError(
            f"Config file {path} is Python, as detectron2's LazyConfig: give a YAML file, or train it "
            "with detectron2's lazyconfig_train_net.py (docs/config.md, LazyConfig)."
        )
    if not Path(path).read_bytes().strip():
        raise InputError(f"Config file {path} is empty: give a YAML file with keys of the config.")
    try:
        cfg.merge_from_file(path)
    except yaml.YAMLError as error:
        raise InputError(
            f"Config file {path} is not valid YAML ({one_line(error)}): correct it."
        ) from error
    except OSError as error:  # of _BASE_
        raise InputError(
            f"Config file {path} has a _BASE_ that cannot be read ({one_line(error)}): give a path "
            "from the folder of the config file, or an absolute one."
        ) from error
    # What detectron2 and yacs raise depends on how the content is wrong.
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        if "Non-existent config key: PRETRAINING" in str(error):
            raise InputError(
                f"Config file {path} is that of a pre-training: give the config of the detector, "
                f"and MODEL.WEIGHTS {os.path.join(os.path.dirname(path), 'backbone.pth')}."
            ) from error
        raise InputError(
            f"Config file {path} cannot be used ({one_line(error)}): correct or remove the entry"
            f"{_form_that_fits(error)}."
        ) from error


def _refuse_flags(options):
    flags = [option for option in options if option.startswith("--")]
    if flags:
        raise InputError(f"{flags[0]} comes after KEY VALUE pairs: put it before them.")


def merge_options(cfg, options):
    """Sets the KEY VALUE pairs of a command line in a config.

    Args:
        cfg (CfgNode): not frozen.
        options (list[str]): KEY, VALUE, ...

    Raises:
        InputError: a key or a value is wrong, or half a pair is missing.
    """
    _refuse_flags(options)
    if len(options) % 2:
        raise InputError(
            f"The last of the KEY VALUE pairs, {options[-1]}, is only half a pair: give a key and "
            "a value, separated by a space."
        )
    for key, value in zip(options[::2], options[1::2]):
        try:
            cfg.merge_from_list([key, value])
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{key} {value} cannot be set ({one_line(error)}): correct the key or the value"
                f"{_form_that_fits(error)}."
            ) from error


def _choose_device(cfg, options, num_gpus):
    if num_gpus > 1 and ":" in cfg.MODEL.DEVICE:
        raise InputError(
            f"MODEL.DEVICE {cfg.MODEL.DEVICE} is one GPU and --num-gpus asks for {num_gpus}: give "
            "MODEL.DEVICE cuda."
        )
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        if "MODEL.DEVICE" in options[::2]:
            raise InputError(
                f"MODEL.DEVICE {cfg.MODEL.DEVICE} asks for a GPU and torch finds none: check the "
                "driver and torch's CUDA version, or give MODEL.DEVICE cpu."
            )
        cfg.MODEL.DEVICE = "cpu"
    if not cfg.MODEL.DEVICE.startswith("cuda"):
        cfg.SOLVER.AMP.ENABLED = False  # detectron2 has it for GPUs only


def _form_that_fits(error):
    """How to write a value of the type that yacs names in its error about a type."""
    pattern = r"Type mismatch \(<class '(\w+)'> vs. <class '(\w+)'>\) with values \(.* vs. (.*)\)"
    types = re.search(pattern, str(error), re.DOTALL)
    if types is None:
        return ""
    wanted, given, value = types.groups()
    if (wanted, given) == ("float", "int"):
        return f", as in {value}.0 for {value}"
    if wanted in ("tuple", "list"):
        if given == "str":
            return ", as in \"('my_data',)\" with both kinds of quotes"
        return ', as in "(100,)" for a single 100' if wanted == "tuple" else ', as in "[0.6, 0.9]"'
    return ""


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
    path = Path(cfg.OUTPUT_DIR, "config.yaml")
    written = path.read_bytes() if path.is_file() else None
    yield
    if written is not None and comm.is_main_process():
        with atomic_write(str(path)) as file:
            file.write(written)


def _on_rank(main, cfg, args):
    explained = contextlib.nullcontext()
    if isinstance(cfg, CfgNode):  # a run, which can be resumed; a benchmark cannot
        explained = explained_full_disk(f"OUTPUT_DIR {cfg.OUTPUT_DIR}")
    with explained, full_disk_told_once():
        main(cfg, args)


def _on_one_of_several_ranks(main, cfg, args, sentences):
    try:
        with without_notices():
            _on_rank(main, cfg, args)
    except InputError as error:
        # Before this process ends: what the others then fail of is no cause, but may be seen first.
        Path(sentences, str(comm.get_rank())).write_text(str(error), encoding="utf-8")
        raise


def _escape_what_the_locale_lacks():
    """Makes the logs escape characters that they cannot encode, as in names of categories."""
    loggers = map(logging.getLogger, ("detectron2", "fvcore", "kn_detectron"))
    for handler in (handler for logger in loggers for handler in logger.handlers):
        if isinstance(getattr(handler, "stream", None), io.TextIOWrapper):
            handler.stream.reconfigure(errors="backslashreplace")


def _check_ranks(args):
    if args.num_gpus * args.num_machines <= 1:
        return
    if torch.cuda.is_available() and args.num_gpus > torch.cuda.device_count():
        raise InputError(
            f"--num-gpus {args.num_gpus} asks for more than the {torch.cuda.device_count()} GPUs "
            "that torch finds: give that many or fewer."
        )
    if not torch.cuda.is_available() and not hasattr(comm, "create_local_process_group"):
        asked = ("--num-gpus", args.num_gpus), ("--num-machines", args.num_machines)
        options = " ".join(f"{option} {count}" for option, count in asked if count > 1)
        raise InputError(
            f"{options} needs GPUs with this version of detectron2: leave it out, or install a "
            "newer detectron2, which can use several processes on a CPU."
        )


def launch_ranks(main, cfg, args):
    """Calls ``main(cfg, args)`` in as many processes as the arguments ask for.

    Args:
        main (callable): importable by its name from a new process.
        cfg (CfgNode or object): of :func:`load_config`, or what else ``main`` takes.
        args (argparse.Namespace): of :func:`argument_parser`.

    Raises:
        InputError: one of the processes raised it, or they cannot be started.
    """
    if args.num_gpus * args.num_machines <= 1:
        _on_rank(main, cfg, args)
        return
    _check_ranks(args)
    with tempfile.TemporaryDirectory() as sentences:
        try:
            with _signals_left_to_children():
                launch(
                    _on_one_of_several_ranks,
                    args.num_gpus,
                    num_machines=args.num_machines,
                    machine_rank=args.machine_rank,
                    dist_url=args.dist_url,
                    args=(main, cfg, args, sentences),
                )
        except (ProcessRaisedException, ProcessExitedException) as error:
            for path in sorted(Path(sentences).iterdir()):
                raise InputError(path.read_text(encoding="utf-8")) from None
            code = getattr(error, "exit_code", None)
            if code in {128 + signum for signum in STOPPING_SIGNALS}:
                raise SystemExit(code) from None  # stopped, and said so
            raise


@contextlib.contextmanager
def _signals_left_to_children():
    """Makes this process pass a signal to stop on to its children, and wait for them."""

    def forward(signum, frame):
        for child in multiprocessing.active_children():
            child.terminate()

    # A terminal sends Ctrl-C to the children by itself, and tells them too when it is closed.
    former = {
        signum: signal.signal(signum, forward if signum == signal.SIGTERM else lambda *_: None)
        for signum in signals_to_take_over()
    }
    try:
        yield
    finally:
        for signum, handler in former.items():
            signal.signal(signum, handler)


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
