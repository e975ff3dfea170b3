"""Two processes on the CPU (gloo): the same step as one process, and no unused parameter."""

import os

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch.nn.parallel import DistributedDataParallel

from kn_detectron.layers import set_gain_scale

from ..models import (
    build_backbone,
    build_rcnn,
    fpn_rcnn_cfg,
    images,
    rcnn_cfg,
    rcnn_inputs,
    resnet_cfg,
    retinanet_cfg,
)
from ..ranks import spawn_two, two_ranks


def step(backbone, x, optimizer):
    optimizer.zero_grad()
    loss = sum(feature.square().mean() for feature in backbone(x.double()).values())
    loss.backward()
    optimizer.step()
    return loss.item()


def build(config, gain_scale):
    # In double precision, since the differences of rounding grow from step to step.
    backbone = build_backbone(config("KN")).double()
    set_gain_scale(backbone, gain_scale)
    return backbone, torch.optim.SGD(backbone.parameters(), lr=1e-3, momentum=0.9)


def same_step(rank, path, config, gain_scale):
    with two_ranks(rank, path):
        backbone, optimizer = build(config, gain_scale)
        model = DistributedDataParallel(backbone, broadcast_buffers=False)
        for k in range(3):
            step(model, images(2, seed=k)[rank : rank + 1], optimizer)
        if rank == 0:
            torch.save(backbone.state_dict(), os.path.join(path, "two.pth"))


@pytest.mark.trains
@pytest.mark.parametrize("config", [resnet_cfg, fpn_rcnn_cfg], ids=["C4", "FPN"])
@pytest.mark.parametrize("gain_scale", [0.0, 1.0])
def test_two_processes_take_the_step_of_one(gain_scale, config, tmp_path):
    """At gain 0 no statistic depends on the batch, so splitting it changes nothing.

    With a gain each process measures its own image, and the step must differ: as with BatchNorm.
    """
    spawn_two(same_step, str(tmp_path), config, gain_scale)
    two = torch.load(tmp_path / "two.pth")
    backbone, optimizer = build(config, gain_scale)
    for k in range(3):
        step(backbone, images(2, seed=k), optimizer)
    start_of_run = build(config, gain_scale)[0].state_dict()
    error = moved = 0.0
    for name, p in backbone.named_parameters():
        error += (p - two[name]).square().sum().item()
        moved += (p - start_of_run[name]).square().sum().item()
    relative = (error / moved) ** 0.5
    assert relative < 1e-9 if gain_scale == 0 else relative > 1e-2


def no_unused_parameters(rank, path):
    steps = 0
    with two_ranks(rank, path):
        for config, norm, options in MODELS:
            model = build_rcnn(config(norm, **options))
            model = DistributedDataParallel(model, broadcast_buffers=False)
            # A parameter that gets no gradient makes the step after it fail. Rank 1 has no ground
            # truth in the first one; the last two are those of an annealed gain.
            for k, gain_scale in enumerate((1.0, 1.0, 0.0, 0.0)):
                set_gain_scale(model, gain_scale)
                with EventStorage():
                    losses = model(rcnn_inputs(1, objects=0 if rank == 1 and k == 0 else 1))
                sum(losses.values()).backward()
                steps += 1
    with open(os.path.join(path, f"rank{rank}"), "w") as f:
        f.write(str(steps))


MODELS = [
    (config, norm, dict(MODEL__KN__VARIANT=variant, MODEL__KN__PREDICTION=prediction))
    # C4, and FPN with norms in the FPN and all heads
    for config in (rcnn_cfg, fpn_rcnn_cfg, retinanet_cfg)
    for norm in ("KN", "GKN")
    for variant, prediction in (
        ("network", "closed_form"),
        ("paper", "closed_form"),
        ("paper", "monte_carlo"),
    )
    # How a belief is predicted is the same in both.
    if config is rcnn_cfg or prediction == "closed_form"
]


def test_no_parameter_is_unused(tmp_path):
    spawn_two(no_unused_parameters, str(tmp_path))
    for rank in range(2):
        assert (tmp_path / f"rank{rank}").read_text() == str(4 * len(MODELS))


@pytest.mark.parametrize("variant", ["network", "paper"])
@pytest.mark.parametrize("freeze_at", [1, 2, 3, 4, 5])
def test_no_parameter_is_unused_behind_frozen_stages(variant, freeze_at):
    """One without gradient is what makes the step fail above."""
    options = dict(MODEL__KN__VARIANT=variant, MODEL__BACKBONE__FREEZE_AT=freeze_at)
    for gain_scale in (1.0, 0.0):
        model = build_rcnn(rcnn_cfg("KN", **options))
        set_gain_scale(model, gain_scale)
        with EventStorage():
            sum(model(rcnn_inputs(1)).values()).backward()
        unused = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not unused
