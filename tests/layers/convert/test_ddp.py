"""Two processes on the CPU (gloo) take the step of one at gain 0, and leave no parameter unused."""

import os

import torch
from torch.nn.parallel import DistributedDataParallel

from kn_detectron.layers import convert_kalman_norm, set_gain_scale

from ...ranks import spawn_two, two_ranks
from .networks import Branchy, images, trained


def build():
    torch.manual_seed(0)
    network = convert_kalman_norm(trained(Branchy()).double())
    set_gain_scale(network, 0.0)
    return network, torch.optim.SGD(network.parameters(), lr=0.01)


def step(network, x, optimizer):
    optimizer.zero_grad()
    network.train()(x.double()).square().mean().backward()
    optimizer.step()


def train(rank, path):
    with two_ranks(rank, path):
        network, optimizer = build()
        model = DistributedDataParallel(network, broadcast_buffers=False)
        for seed in range(3):
            step(model, images(2, seed=seed)[rank : rank + 1], optimizer)
        if rank == 0:
            torch.save(network.state_dict(), os.path.join(path, "two.pth"))


def test_two_processes_take_the_step_of_one(tmp_path):
    spawn_two(train, str(tmp_path))
    network, optimizer = build()
    start = network.stem[0].weight.clone()
    for seed in range(3):
        step(network, images(2, seed=seed), optimizer)
    two = torch.load(tmp_path / "two.pth")
    for name, value in network.state_dict().items():
        torch.testing.assert_close(two[name], value, msg=name)
    assert not torch.allclose(network.stem[0].weight, start)
