"""Two processes agree."""

import copy
import os
import signal
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from kn_detectron import InputError, KalmanNorm2d
from kn_detectron.engine import (
    AverageRunningStatistics,
    GainAnneal,
    StopOnSignal,
    Stopped,
    average_running_statistics,
)
from kn_detectron.engine.trainer import _AgreedBatches

from ..models import build_backbone, randomize, resnet_cfg
from ..ranks import two_ranks
from .loop import Loop


def _on_rank(rank, folder):
    with two_ranks(rank, folder):
        _averages(rank)
        _averages_when_due(rank)
        _calibrates_alike(rank)
        _stops_together(rank, os.path.join(folder, "run"))
        _fails_together(rank)
    with open(os.path.join(folder, f"passed{rank}"), "w"):
        pass


def _averages(rank):
    model = nn.ModuleList(
        [
            KalmanNorm2d(3, gain=0.1),
            nn.BatchNorm2d(2),
            nn.BatchNorm2d(2, track_running_stats=False),
            nn.GroupNorm(1, 2),
        ]
    )
    kalman, live = model[0], model[1]
    kalman.running_mean.copy_(torch.tensor([0.0, 2.0, 4.0]) + rank)
    kalman.running_var.fill_(1.0 + 4 * rank)
    live.running_mean.fill_(-3.0 * rank)
    live.running_var.copy_(torch.tensor([1.0, 2.0]) * (rank + 1))
    nn.init.constant_(live.weight, rank)
    average_running_statistics(model)
    assert kalman.running_mean.tolist() == [0.5, 2.5, 4.5]
    assert kalman.running_var.tolist() == [3.0] * 3
    assert live.running_mean.tolist() == [-1.5] * 2
    assert live.running_var.tolist() == [1.5, 3.0]
    assert live.weight.tolist() == [float(rank)] * 2


def _averages_when_due(rank):
    means = {}

    def note(iteration):
        means[iteration] = loop.model.body.running_mean.clone()
        loop.model.body.running_mean.fill_(float(rank))  # and let the step go on from there

    loop = Loop(AverageRunningStatistics([3, 0]), in_step=note)
    loop.train(0, 5)
    means[5] = loop.model.body.running_mean.clone()
    gathered = [None, None]
    dist.all_gather_object(gathered, means)
    same = [k for k in range(1, 6) if torch.equal(gathered[0][k], gathered[1][k])]
    assert same == [3, 5], same


def _calibrates_alike(rank):
    model = build_backbone(resnet_cfg()).train()
    before = copy.deepcopy(model.state_dict())
    randomize(model, seed=rank)  # the statistics of each rank's own images
    for name, value in before.items():
        if "running_" not in name:
            model.state_dict()[name].copy_(value)
    hook = GainAnneal(0.5, 0.9)
    hook.trainer = SimpleNamespace(model=model, iter=6, max_iter=10)
    hook.before_step()
    gathered = [None, None]
    dist.all_gather_object(gathered, model.state_dict())
    for name, value in gathered[0].items():
        assert torch.equal(value, gathered[1][name]), name
    offset = "res4.0.conv2.norm.mean_offset"
    assert not torch.equal(gathered[0][offset], before[offset])


def _stops_together(rank, folder):
    def signal_one(iteration):
        if (rank, iteration) == (1, 2):
            os.kill(os.getpid(), signal.SIGTERM)

    if rank == 0:
        os.makedirs(folder)
    dist.barrier()
    loop = Loop(StopOnSignal(), folder=folder, in_step=signal_one)
    with pytest.raises(Stopped) as stopped:
        loop.train(0, 9)
    assert stopped.value.code == 143
    assert loop.steps == [0, 1, 2]
    dist.barrier()
    assert sorted(os.listdir(folder)) == ["last_checkpoint", "model_2.pth"]


def _fails_together(rank):
    def batches():
        yield "first"
        if rank == 1:
            raise InputError("The image is broken.")
        yield "second"

    agreed = _AgreedBatches(batches())
    assert next(agreed) == "first"
    with pytest.raises(InputError, match="The image is broken."):
        next(agreed)


def test_two_processes(tmp_path):
    mp.spawn(_on_rank, args=(str(tmp_path),), nprocs=2)
    assert (tmp_path / "passed0").exists() and (tmp_path / "passed1").exists()
