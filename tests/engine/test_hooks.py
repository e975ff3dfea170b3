"""What the hooks set and store."""

import copy
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from kn_detectron.engine import GainAnneal, KalmanStatistics, SeedStep
from kn_detectron.engine.hooks import PreciseStatistics
from kn_detectron.layers import Belief, KalmanNorm2d, kalman_layers, set_gain_scale

from ..models import build_backbone, build_rcnn, fpn_rcnn_cfg, images, randomize, resnet_cfg
from .loop import CHANNELS, Images, Loop, TwoNorms

pytestmark = pytest.mark.trains


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


@pytest.fixture(scope="module")
def far_off():
    """A backbone in training whose priors are not where its statistics have settled."""
    model = randomize(build_backbone(resnet_cfg(MODEL__BACKBONE__FREEZE_AT=2)))
    for layer in kalman_layers(model).values():
        if layer.training:
            torch.nn.init.normal_(layer.log_var_scale, 1.0, 0.5)
    for step in range(40):
        model.train()(images(2, seed=step))
    return model


def _before(step, model, start, end=0.9, max_iter=20):
    model = copy.deepcopy(model)
    hook = GainAnneal(start, end)
    hook.trainer = SimpleNamespace(model=model, iter=step, max_iter=max_iter)
    hook.before_step()
    return model


def _gap(model):
    """How far what the network trains with at gain 0 is from what it infers with."""
    set_gain_scale(model, 0.0)
    with torch.no_grad():
        infers, trains = (model.train(mode)(images(2))["res4"] for mode in (False, True))
    return ((trains - infers).norm() / infers.norm()).item()


def test_priors_are_calibrated_where_the_gain_begins_to_fall(far_off):
    assert _gap(_before(10, far_off, start=0.5)) > 0.3  # the last step with the whole gain
    assert _gap(_before(11, far_off, start=0.5)) < 1e-3
    # A run that is resumed behind that step has done it, and one whose schedule was cut has not.
    assert _gap(_before(12, far_off, start=0.5)) < 1e-3
    resumed = copy.deepcopy(far_off)
    set_gain_scale(resumed, 0.9)
    assert _gap(_before(12, resumed, start=0.5)) > 0.3


@pytest.mark.parametrize("start, end", [(0.0, 0.9), (0.5, 0.5)])
def test_nothing_is_calibrated_without_statistics_or_annealing(far_off, start, end):
    for step in range(20):
        model = _before(step, far_off, start, end)
        for name, parameter in far_off.named_parameters():
            assert torch.equal(parameter, model.get_parameter(name)), (step, name)


def test_frozen_layers_are_left_alone(far_off):
    model = _before(11, far_off, start=0.5)
    for name, layer in kalman_layers(far_off).items():
        changed = not torch.equal(layer.mean_offset, model.get_submodule(name).mean_offset)
        assert changed == layer.training, name


def test_group_norm_with_regions_of_an_fpn_is_annealed():
    model = build_rcnn(fpn_rcnn_cfg("GKN")).train()
    annealed = _before(11, model, start=0.5)
    assert all(0 < layer.gain_scale < 1 for layer in kalman_layers(annealed).values())


@pytest.mark.parametrize("options", [dict(MODEL__KN__VARIANT="paper"), dict(norm="GKN")])
def test_what_cannot_be_calibrated_is_annealed_as_it_is(options):
    model = build_backbone(resnet_cfg(**options)).train()
    annealed = _before(11, model, start=0.5)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, annealed.get_parameter(name)), name
    assert all(layer.gain_scale < 1 for layer in kalman_layers(annealed).values())


@pytest.mark.parametrize("scale, var", [(0.0, 4.0), (1.0, 0.9 * 4.0 + 0.1)])
def test_precise_statistics_are_those_of_the_posterior(scale, var):
    """A predicted variance is no sample's: at gain 0 nothing corrects it for their number."""
    model = TwoNorms().train()
    set_gain_scale(model, scale)
    hook = PreciseStatistics(1, model, Images(), 100)
    hook.trainer = SimpleNamespace(iter=0, max_iter=1, seed=0)
    hook.update_stats()
    assert model.body.momentum == 0.1
    exact = scale == 0.0
    want = torch.full((CHANNELS,), var)
    torch.testing.assert_close(model.body.running_var, want, rtol=0 if exact else 0.1, atol=0)
    assert (model.head.running_var - 1).abs().max() < 0.1


def test_precise_statistics_read_the_batches_behind_the_step():
    hook = PreciseStatistics(1, TwoNorms().train(), Images(), 1)
    hook.trainer = SimpleNamespace(iter=7, max_iter=20, seed=5)
    hook.update_stats()
    assert (hook._data_loader.seed, hook._data_loader.start_iter) == (5, 8)


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


def test_each_rank_draws_its_own(monkeypatch):
    first = _draws(0)
    monkeypatch.setattr(comm, "get_rank", lambda: 1)
    second = _draws(0)
    assert not {n for step in first.values() for n in step} & {
        n for step in second.values() for n in step
    }


class _Storage(HookBase):
    """Keeps what is stored of each iteration."""

    def __init__(self):
        self.of = {}

    def after_step(self):
        latest = self.trainer.storage.latest().items()
        here = {name: value for name, (value, at) in latest if at == self.trainer.iter}
        self.of[self.trainer.iter] = {k: v for k, v in here.items() if k.startswith("kn/")}


@pytest.mark.parametrize("is_behind", [False, True])
def test_kalman_statistics_behind_the_writers_are_warned_of(is_behind, kn_log):
    registered = [KalmanStatistics(period=2), hooks.PeriodicWriter([])]
    Loop(*(reversed(registered) if is_behind else registered)).train(0, 1)
    assert ("KalmanStatistics stands behind a PeriodicWriter" in kn_log.text) == is_behind


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


def test_kalman_statistics_average_over_calls_and_layers():
    model, prior = TwoNorms(), Belief(torch.zeros(1, CHANNELS), torch.ones(1, CHANNELS))
    model.again = KalmanNorm2d(CHANNELS, gain=0.3)
    inputs = [x for x, _ in zip(Images(), range(3))]
    with EventStorage() as storage:
        hook = KalmanStatistics(period=1)
        hook.trainer = SimpleNamespace(model=model, iter=0, max_iter=1, storage=storage)
        hook.before_step()
        model.body(inputs[0], prior=prior)
        for x in inputs[1:]:
            model.again(x, prior=prior)
        hook.after_step()
    stored = {name: value for name, (value, _) in storage.latest().items()}
    body, *again = (
        [part.abs().mean().item() for part in model.body.innovation(x, prior)] for x in inputs
    )
    for k, kind in enumerate(["innovation_mean", "innovation_logvar"]):
        of_again = (again[0][k] + again[1][k]) / 2
        assert stored[f"kn/{kind}/again"] == pytest.approx(of_again, rel=1e-4)
        assert stored[f"kn/{kind}"] == pytest.approx((body[k] + of_again) / 2, rel=1e-4)
    assert stored["kn/gain"] == pytest.approx(0.2)


def test_kalman_statistics_leave_nothing_behind_and_change_nothing():
    heard, deaf = Loop(KalmanStatistics(period=1)), Loop()
    heard.train(0, 3), deaf.train(0, 3)
    for one, other in zip(heard.model.state_dict().values(), deaf.model.state_dict().values()):
        assert torch.equal(one, other)
    assert heard.model.body.observer is None


def test_kalman_statistics_stop_listening_when_a_step_fails():
    def fail(_):
        assert loop.model.body.observer is not None
        raise FloatingPointError

    loop = Loop(KalmanStatistics(period=1), in_step=fail)
    with pytest.raises(FloatingPointError):
        loop.train(0, 3)
    assert loop.model.body.observer is None


def test_kalman_statistics_do_without_regions():
    storage = _Storage()
    prior = Belief(torch.zeros(1, CHANNELS), torch.ones(1, CHANNELS))

    def also_run_empty(_):
        loop.model.body(torch.zeros(0, CHANNELS, 4, 4), prior=prior)

    loop = Loop(KalmanStatistics(period=1), storage, in_step=also_run_empty)
    loop.train(0, 1)
    assert np.isfinite(list(storage.of[0].values())).all()
    assert "kn/innovation_mean/body" in storage.of[0]
