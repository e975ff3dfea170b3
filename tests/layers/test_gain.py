"""The gain: its range, its annealing, and whether the layer measures."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode

from kn_detectron.layers import (
    Belief,
    KalmanNorm2d,
    kalman_layers,
    set_gain_scale,
)

from .inputs import BOTH, make, prior_of


def test_gain_is_a_sigmoid_and_starts_where_it_is_told():
    norm = KalmanNorm2d(4, gain=0.02)
    assert norm.gain.item() == pytest.approx(0.02)
    for logit in (-50.0, 50.0):
        norm.gain_logit.data.fill_(logit)
        assert 0 <= norm.gain.item() <= 1
    head = KalmanNorm2d(4, gain=None)
    assert head.gain is None and not head.learns_gain and head.measures


@pytest.mark.parametrize("gain", [0.0, 1.0])
def test_an_average_of_weights_has_the_fixed_gain(gain):
    norm = KalmanNorm2d(4, gain=gain, learn_gain=False)
    averaged = AveragedModel(norm, use_buffers=True)
    for _ in range(2):
        averaged.update_parameters(norm)
    assert averaged.module.gain.item() == gain == norm.gain.item()
    assert averaged.module.measures is (gain == 1.0)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert norm.to(dtype).gain_logit.sigmoid().item() == gain


@pytest.mark.parametrize("learn_gain", [False, True])
@pytest.mark.parametrize("gain, infinite", [(0.0, -math.inf), (1.0, math.inf)])
def test_infinite_logits_of_older_checkpoints_become_finite(gain, infinite, learn_gain):
    state = KalmanNorm2d(4, gain=0.5, learn_gain=False).state_dict()
    state["gain_logit"] = torch.tensor(infinite)
    norm = KalmanNorm2d(4, gain=0.5, learn_gain=learn_gain)
    norm.load_state_dict(state)
    assert norm.gain_logit.isfinite() and norm.gain.item() == gain
    assert state["gain_logit"].isinf()  # the caller's


def test_a_fixed_gain_measures_again_after_a_scale_of_0():
    norm = KalmanNorm2d(4, gain=0.3, learn_gain=False)
    for scale, measures in ((0.0, False), (0.5, True)):
        norm.set_gain_scale(scale)
        assert norm.measures == measures


def test_set_gain_scale_reaches_all_layers_but_heads():
    model = nn.ModuleDict({"a": KalmanNorm2d(4), "b": make("GKN"), "c": KalmanNorm2d(4, gain=None)})
    assert list(kalman_layers(model)) == ["a", "b"]
    set_gain_scale(model, 0.5)
    assert model["a"].gain.item() == pytest.approx(0.05)
    assert model["b"].gain.item() == pytest.approx(0.05)
    for scale in (-0.5, 1.5):
        with pytest.raises(ValueError, match=f"between 0 and 1, not {scale}"):
            set_gain_scale(model, scale)


class Waits(TorchDispatchMode):
    """Counts the operations that read a number off the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@BOTH
@pytest.mark.parametrize("learn_gain", [True, False])
def test_annealing_waits_for_no_device(kind, learn_gain, x):
    norm = make(kind, learn_gain=learn_gain)
    with Waits() as waits:
        for scale in (1.0, 0.7, 0.2, 0.0):
            set_gain_scale(norm, scale)
            norm(x, prior=prior_of())
    assert waits.count == 0


@BOTH
@pytest.mark.parametrize("learn_gain", [True, False])
def test_whether_it_measures_follows_from_its_state(kind, learn_gain):
    """Whoever writes the state, and however: by loading, in place, or with another tensor."""
    norm, annealed = make(kind, learn_gain=learn_gain), make(kind, learn_gain=learn_gain)
    annealed.set_gain_scale(0.0)
    assert norm.measures and not annealed.measures
    norm.load_state_dict(annealed.state_dict())
    assert not norm.measures
    norm.gain_scale.fill_(0.5)
    assert norm.measures and copy.deepcopy(norm).measures
    for own, other in zip(norm.buffers(), annealed.buffers()):
        own.copy_(other)
    assert not norm.measures and not copy.deepcopy(norm).measures
    norm.gain_scale = torch.ones(())
    assert norm.measures
    with torch.inference_mode():
        norm.gain_scale = torch.zeros(())
        assert not norm.measures


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(gain=1.2), "a number between 0 and 1, or None for the head of a chain, not 1.2"),
        (dict(gain="0.02"), "a number between 0 and 1, .* not '0.02'"),
        (dict(gain=0.0), "cannot be learned"),
    ],
)
def test_bad_arguments(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        KalmanNorm2d(4, **options)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_loaded_weights_measures_as_they_do(clone):
    """The copies of the tensors have versions of their own, which may equal the remembered ones."""
    norm = KalmanNorm2d(4, gain=0.0, learn_gain=False)
    norm.load_state_dict(KalmanNorm2d(4, gain=0.5, learn_gain=False).state_dict())
    assert clone(norm).measures and norm.measures
    norm.gain_scale.zero_()
    assert not clone(norm).measures and not norm.measures


def test_a_compiled_layer_measures_as_the_loaded_weights_do(x):
    torch._dynamo.reset()
    norm = KalmanNorm2d(4)
    norm.set_gain_scale(0.0)
    norm.load_state_dict(KalmanNorm2d(4, gain=0.5).state_dict())
    want = copy.deepcopy(norm)(x, prior=prior_of())[0]
    torch.testing.assert_close(torch.compile(norm, backend="eager")(x, prior=prior_of())[0], want)
