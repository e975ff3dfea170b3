"""What torch.fx does not record is refused, or stays in one piece; it is never lost."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import spectral_norm

from kn_detectron import InputError
from kn_detectron.layers import convert_kalman_norm

from .networks import images, trained


class _Two(nn.Module):
    """Two convolutions with a norm each, and something in between."""

    def __init__(self, between):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.between, self.feature = between, "what was there"

    def first(self, x):
        return F.relu(self.norm1(self.conv1(x)))

    def second(self, x):
        return self.norm2(self.conv2(x))

    def forward(self, x):
        return self.second(self.between(self, self.first(x)))


class _Within(nn.Module):
    """The same as a module without norms."""

    def __init__(self, between):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.between = between

    def forward(self, x):
        return self.between(self, x * self.scale)


class _Checked(_Two):
    """Looks at the dimensions of the image, as detectron2's RegNet does."""

    def forward(self, x):
        assert x.dim() == 4 and x.ndim == 4, "expected (N, C, H, W)"
        return super().forward(x)


def _frozen(network, x):
    with torch.no_grad():
        return x * 2


def _not_differentiated(network, x):
    with torch.inference_mode():
        return (x * 2).clone()


def _in_float32(network, x):
    with torch.autocast("cpu", enabled=False):
        return x.float() * 2


def _at_random(network, x):
    return x * 2 if random.random() < 0.5 else x


def _at_random_by_numpy(network, x):
    return x * 2 if np.random.rand() < 0.5 else x


def _at_random_by_torch(network, x):
    return x * 2 if torch.rand(1).item() < 0.5 else x


def _kept(network, x):
    network.feature = x
    return x


@pytest.mark.parametrize(
    "between, why",
    [
        (_frozen, "with statement"),
        (_not_differentiated, "with statement"),
        (_in_float32, "with statement"),
        (_at_random, "of _Two draws a random number"),
        (_at_random_by_numpy, "of _Two draws a random number"),
        (_at_random_by_torch, "of _Two draws a random number"),
        (_kept, "of _Two keeps a feature as self.feature"),
    ],
)
@pytest.mark.parametrize("grad", [True, False])
def test_what_is_not_recorded_is_refused_around_norms(between, why, grad):
    network = _Two(between)
    with torch.set_grad_enabled(grad), pytest.raises(InputError, match=why):
        convert_kalman_norm(network)
    assert network.feature == "what was there"


def test_the_error_names_the_line_of_a_with_statement():
    with pytest.raises(InputError, match=r"test_tracing.py:\d+, 'return x \* 2'"):
        convert_kalman_norm(_Two(_frozen))


def _batch():
    return images(2, 16)


def _two_with(between):
    network = _Two(lambda network, x: network.within(x))
    network.within = _Within(between)
    trained(network, 16)
    network.within.feature = None
    return network


def test_the_random_numbers_of_others_are_left_alone():
    network = _two_with(_at_random_by_torch)
    before = torch.get_rng_state()
    convert_kalman_norm(network)
    assert torch.equal(torch.get_rng_state(), before)


class _Named(nn.Module):
    """Its inputs are called as torch.fx calls those that have a default."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x, mask_map, size_2, mask=None, size=1):
        x = self.norm(self.conv(x))
        return x * mask_map * size * size_2 if mask is None else x


def test_inputs_that_are_called_nearly_as_others_with_a_default():
    network = _Named().eval()
    x, mask = torch.randn(2, 3, 9, 9), torch.rand(2, 1, 7, 7)
    want = network(x, mask, size_2=3.0)
    torch.testing.assert_close(convert_kalman_norm(network)(x, mask, size_2=3.0), want)


@pytest.mark.parametrize("between", [_frozen, _in_float32, _kept])
def test_a_part_without_norms_stays_in_one_piece(between):
    network = _two_with(between)
    converted = convert_kalman_norm(copy.deepcopy(network), gain=0.0, learn_gain=False)
    x = _batch()
    torch.testing.assert_close(converted.eval()(x), network.eval()(x))
    converted.train()(x).sum().backward()
    assert (converted.within.scale.grad is None) == (between is _frozen)
    assert (converted.norm1.weight.grad is None) == (between is _frozen)
    if between is _kept:
        assert isinstance(converted.within.feature, torch.Tensor)


def test_a_random_part_without_norms_goes_on_drawing():
    converted = convert_kalman_norm(_two_with(_at_random)).eval()
    random.seed(0)
    x, seen = _batch(), set()
    converted.within.register_forward_hook(lambda m, args, y: seen.add(torch.equal(y, args[0])))
    for _ in range(20):
        converted(x)
    assert seen == {False, True}


class _Activation(nn.Module):
    def forward(self, x):
        return F.relu(x)


def test_hooks_on_a_module_without_children_go_on_being_called():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), _Activation(), nn.BatchNorm2d(4))
    calls = []
    network[2].register_forward_hook(lambda m, x, y: calls.append(y))
    network[2].register_full_backward_hook(lambda m, dx, dy: calls.append(dy[0]))
    converted = convert_kalman_norm(network)
    assert not calls
    converted(_batch()).square().sum().backward()
    assert len(calls) == 2 and all(type(call) is torch.Tensor for call in calls)


@pytest.mark.parametrize("operation", ["//", "%", "**"])
def test_operators_in_place_change_the_other_names_of_a_feature(operation):
    def between(network, x):
        y = x
        if operation == "//":
            y //= 0.5
        elif operation == "%":
            y %= 0.5
        else:
            y **= 2.0
        return x

    network = trained(_Two(between), 16).eval()
    converted = convert_kalman_norm(copy.deepcopy(network))
    torch.testing.assert_close(converted(_batch()), network(_batch()))


def _by_data(network, x):
    x.data.mul_(5)
    return x


def _by_out(network, x):
    torch.mul(x.detach(), 5, out=x.detach())
    return x


@pytest.mark.parametrize("between", [_by_data, _by_out])
def test_nothing_is_known_about_a_feature_that_was_written_to(between, caplog):
    converted = convert_kalman_norm(_Two(between))
    assert converted.norm2.is_head and not converted.norm1.is_head
    assert "1 of the 2 norms have no prior" in caplog.text


class _OwnConv(nn.Conv2d):
    pass


def test_a_filter_that_a_hook_makes_in_a_class_of_ones_own():
    network = nn.Sequential(spectral_norm(_OwnConv(3, 4, 3)), nn.BatchNorm2d(4)).eval()
    converted = convert_kalman_norm(copy.deepcopy(network))
    torch.testing.assert_close(converted(_batch()), network(_batch()))
    converted.train()(_batch()).sum().backward()
    assert converted.get_submodule("0").weight_orig.grad is not None


def test_another_value_of_an_argument_with_a_default_is_a_sentence():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x, both=False):
            return (self.norm(x), x) if both else self.norm(x)

    converted = convert_kalman_norm(Optional())
    with pytest.raises(InputError, match="both has been specialized.*convert a subclass"):
        converted(_batch(), both=True)


def test_the_image_is_known_to_have_four_dimensions():
    network = trained(_Checked(lambda network, x: x.flatten(x.dim() - 2).reshape(x.shape)))
    want = network.eval()(images())
    converted = convert_kalman_norm(network, gain=0.0, learn_gain=False)
    torch.testing.assert_close(converted.eval()(images()), want)
    assert converted.train()(images()).shape == want.shape
