"""A process group of two processes on the CPU, for tests."""

import contextlib
import multiprocessing
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm


@contextlib.contextmanager
def two_ranks(rank, folder):
    """What runs inside is one of two processes.

    Args:
        rank: 0 or 1.
        folder: that both see, and where they meet.
    """
    # The two share the cores; threads beyond their number wait for each other, for minutes.
    torch.set_num_threads(max(torch.get_num_threads() // 2, 1))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(minutes=15),  # for one that waits in vain, not for a busy machine
    )
    try:
        dist.barrier()  # none fails, or ends, while the other still connects to it
        yield
        dist.barrier()  # none leaves while the other still waits for it
    finally:
        # detectron2 keeps the group, whose threads would then live into the interpreter's end, which
        # now and then aborts the process.
        comm._get_global_gloo_group.cache_clear()
        dist.destroy_process_group()


def spawn_two(function, *args):
    """Calls ``function(rank, *args)`` in two new processes, and waits for them.

    They are forked from one that has imported what all of them need, since importing it takes
    longer than what most of them do. That one is fresh: it has no threads and no state of a test.
    """
    multiprocessing.set_forkserver_preload(["kn_detectron.engine", "kn_detectron.pretraining"])
    mp.start_processes(function, args, nprocs=2, start_method="forkserver")
