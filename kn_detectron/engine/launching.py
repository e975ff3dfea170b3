"""The processes of a run, one for each GPU."""

import contextlib
import multiprocessing
import signal
import tempfile
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.engine import launch
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from ..compat import without_notices
from ..errors import InputError
from ..files import explained_full_disk
from .logs import full_disk_told_once
from .stopping import STOPPING_SIGNALS, signals_to_take_over

__all__ = ["check_ranks", "launch_ranks"]


def launch_ranks(main, cfg, args):
    """Calls ``main(cfg, args)`` in as many processes as the arguments ask for.

    Args:
        main (callable): importable by its name from a new process.
        cfg (CfgNode or object): of :func:`~.command_line.load_config`, or what else ``main`` takes.
        args (argparse.Namespace): of :func:`~.command_line.argument_parser`.

    Raises:
        InputError: one of the processes raised it, or they cannot be started.
    """
    if args.num_gpus * args.num_machines <= 1:
        _on_rank(main, cfg, args)
        return
    check_ranks(args)
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
            for signum in STOPPING_SIGNALS:
                if code in (128 + signum, -signum):  # stopped, and said so; or before it could
                    raise SystemExit(128 + signum) from None
            raise


def check_ranks(args):
    """Checks that there can be as many processes as the arguments ask for.

    Args:
        args (argparse.Namespace): of :func:`~.command_line.argument_parser`.

    Raises:
        InputError: there are fewer GPUs, or none and this detectron2 needs one for each process.
    """
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


def _on_rank(main, cfg, args):
    explained = contextlib.nullcontext()
    if isinstance(cfg, CfgNode):  # a run, which can be resumed; a benchmark cannot
        explained = explained_full_disk(f"OUTPUT_DIR {cfg.OUTPUT_DIR}")
    with explained:
        main(cfg, args)


def _on_one_of_several_ranks(main, cfg, args, sentences):
    try:
        with without_notices(), full_disk_told_once():
            _on_rank(main, cfg, args)
    except InputError as error:
        # Before this process ends: what the others then fail of is no cause, but may be seen first.
        Path(sentences, str(comm.get_rank())).write_text(str(error), encoding="utf-8")
        raise


@contextlib.contextmanager
def _signals_left_to_children():
    """Makes this process pass a signal to stop on to its children, and wait for them."""

    def forward(signum, frame):
        children = multiprocessing.active_children()
        if not children:
            raise SystemExit(128 + signum)
        for child in children:
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
