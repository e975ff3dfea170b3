"""What the processes of a training tell each other."""

import functools
from typing import List

import torch
import torch.distributed as dist
from detectron2.utils import comm

__all__ = ["largest_over_ranks"]


@functools.lru_cache(maxsize=None)
def _cpu_group() -> dist.ProcessGroup:
    """All processes, over a backend that does not wait for the GPU."""
    return dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


def largest_over_ranks(*numbers: int) -> List[int]:
    """The largest of each number over all processes, in one reduction.

    Every process has to call this, with as many numbers.
    """
    if comm.get_world_size() == 1:
        return list(numbers)
    largest = torch.tensor(numbers)
    dist.all_reduce(largest, dist.ReduceOp.MAX, _cpu_group())
    return largest.tolist()
