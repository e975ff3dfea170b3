"""What the hooks set and store."""

import random

import numpy as np
import pytest
import torch
from detectron2.engine import HookBase

from kn_detectron.engine import GainAnneal, KalmanStatistics, SeedStep
from kn_detectron.layers import Belief

from .loop import CHANNELS, Images, Loop


def _annealed(start, end, first=0, scale=1.0):
    """The gains of the steps of a run of 10 that is entered at `first`."""
    gains = []
    loop = Loop(GainAnneal(start, end), in_step=lambda _: gains.append(float(loop.model.body.gain)))
    loop.model.body.gain_logit.requires_grad_(False)
    loop.model.body.set_gain_scale(scale)
    loop.train(first, 10)
    return gains


def test_gain_falls_linearly_to_zero():
    scales = [1, 1, 1, 0.75, 0.5, 0.25, 0, 0, 0, 0]
    gains = _annealed(0.2, 0.6)
    assert gains == pytest.approx([0.1 * scale for scale in scales], abs=1e-7)
    assert gains[6:] == [0.0] * 4


def test_annealing_depends_on_the_iteration_alone():
    assert _annealed(0.2, 0.6, first=4) == _annealed(0.2, 0.6)[4:]


def test_without_annealing_the_gain_is_whole_even_from_an_annealed_checkpoint():
    assert _annealed(0.5, 0.5, scale=0.0) == pytest.approx([0.1] * 10)


def _draws(first, seed=3):
    drawn = {}

    def draw(iteration):
        drawn[iteration] = (random.random(), np.random.rand(), torch.rand(()).item())

    loop = Loop(SeedStep(), in_step=draw)
    loop.seed = seed
    loop.train(first, 4)
    return drawn


def test_a_step_draws_the_same_wherever_the_run_started():
    whole, late = _draws(0), _draws(2)
    assert late == {k: whole[k] for k in (2, 3)}
    assert len({number for step in whole.values() for number in step}) == 12
    assert _draws(0, seed=4)[0] != whole[0]


class _Storage(HookBase):
    """Keeps what is stored of each iteration."""

    def __init__(self):
        self.of = {}

    def after_step(self):
        latest = self.trainer.storage.latest().items()
        here = {name: value for name, (value, at) in latest if at == self.trainer.iter}
        self.of[self.trainer.iter] = {k: v for k, v in here.items() if k.startswith("kn/")}


def test_kalman_statistics_store_gain_and_innovation():
    storage = _Storage()
    loop = Loop(KalmanStatistics(period=2), storage)
    for parameter in loop.model.parameters():
        parameter.requires_grad_(parameter is loop.model.head.weight)
    loop.optimizer.param_groups[0]["lr"] = 0.0
    loop.train(0, 5)

    assert [k for k, values in storage.of.items() if values] == [1, 3, 4]  # 4 is the last
    image = [x for x, _ in zip(Images(), range(2))][1]
    x = (image - image.mean((0, 2, 3), keepdim=True)) / (
        image.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5
    ).sqrt()
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    expected = {
        "gain": 0.1,
        "innovation_mean": ((mean - 0.5) / 2).abs().mean().item(),
        "innovation_logvar": (var / 4).log().abs().mean().item(),
    }
    stored = storage.of[1]
    for name, value in expected.items():
        # The head has no prior; so the average over layers is that of the one other.
        assert stored.pop(f"kn/{name}/body") == pytest.approx(value, rel=1e-4)
        assert stored.pop(f"kn/{name}") == pytest.approx(value, rel=1e-4)
    assert not stored


def test_kalman_statistics_leave_nothing_behind_and_change_nothing():
    heard, deaf = Loop(KalmanStatistics(period=1)), Loop()
    heard.train(0, 3), deaf.train(0, 3)
    for one, other in zip(heard.model.state_dict().values(), deaf.model.state_dict().values()):
        assert torch.equal(one, other)
    assert not heard.model.body._forward_pre_hooks


def test_kalman_statistics_do_without_regions():
    storage = _Storage()
    prior = Belief(torch.zeros(1, CHANNELS), torch.ones(1, CHANNELS))

    def also_run_empty(_):
        loop.model.body(torch.zeros(0, CHANNELS, 4, 4), prior=prior)

    loop = Loop(KalmanStatistics(period=1), storage, in_step=also_run_empty)
    loop.train(0, 1)
    assert np.isfinite(list(storage.of[0].values())).all()
    assert "kn/innovation_mean/body" in storage.of[0]
