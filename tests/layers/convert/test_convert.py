"""What a converted network is: an ordinary module that differs by KN's own entries only."""

import copy
import gc
import io
import linecache
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune, spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FrozenBatchNorm2d

from kn_detectron import InputError
from kn_detectron.checkpoint import calibrate, fit_process_noise, fold_network
from kn_detectron.layers import (
    KN_STATE,
    Belief,
    GroupKalmanNorm2d,
    KalmanNorm2d,
    MonteCarloTransition,
    convert_kalman_norm,
    kalman_layers,
    set_gain_scale,
    set_norm_batch_size,
)

from ...gradients import slopes
from .networks import Branchy, frozen_statistics, images, relative_error, trained


@pytest.fixture
def original():
    return trained(Branchy())


@pytest.fixture
def converted(original):
    return convert_kalman_norm(copy.deepcopy(original))


def test_only_entries_of_kn_are_added(original, converted):
    before, after = original.state_dict(), converted.state_dict()
    assert [key for key in after if key.rpartition(".")[2] not in KN_STATE] == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert {n for n, _ in original.named_modules()} | {"kalman_chain", "kalman_chain.image"} == {
        n for n, _ in converted.named_modules()
    }


def test_it_works_in_place_on_the_very_parameters(original):
    before = dict(original.named_parameters())
    converted = convert_kalman_norm(original)
    after = dict(converted.named_parameters())
    assert all(after[name] is p for name, p in before.items())
    assert converted.block is original.block and converted.note == "kept"


@pytest.mark.parametrize("of", ["a fresh network", "a trained one", "a part of another"])
def test_checkpoints_of_the_original_load_and_are_calibrated_to(original, converted, of):
    loaded = convert_kalman_norm(Branchy() if of == "a fresh network" else trained(Branchy()))
    loaded = copy.deepcopy(loaded)  # as a copy, it still does it
    if of == "a part of another":
        nn.Sequential(loaded).load_state_dict(nn.Sequential(original).state_dict())
    else:
        assert not loaded.load_state_dict(original.state_dict()).unexpected_keys
    for got, want in zip(loaded.state_dict().values(), converted.state_dict().values()):
        assert torch.equal(got, want)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("kind", ["KN", "Option B", "GKN"])
def test_export(kind):
    network = Branchy(lambda channels: nn.GroupNorm(2, channels)) if kind == "GKN" else Branchy()
    options = dict(eval_statistics="batch") if kind == "Option B" else {}
    converted = convert_kalman_norm(trained(network), **options).eval()
    x = images()
    want = converted(x)
    torch.testing.assert_close(torch.export.export(converted, (x,)).module()(x), want)
    if kind == "KN":
        torch.testing.assert_close(torch.jit.trace(converted, x)(x), want)
        torch.testing.assert_close(torch.jit.script(fold_network(converted))(x), want)


def test_weights_with_a_filter_are_not_calibrated_to(converted):
    state = copy.deepcopy(converted.state_dict())
    state["last.1.mean_offset"] += 1.0
    converted.load_state_dict(state)
    assert torch.equal(converted.last[1].mean_offset, state["last.1.mean_offset"])


def test_the_restored_network_loads_as_any_other(original, converted):
    converted.last[1].eval()
    restored = converted.restored()
    assert not restored.last[1].training and restored.block.bn1.training
    assert not restored._load_state_dict_post_hooks and not original._load_state_dict_post_hooks
    restored.load_state_dict(original.state_dict())


def test_in_evaluation_it_is_the_original_to_the_bit_and_computes_no_belief(original, converted):
    original.eval()
    assert "kalman_chain" in converted.train().code
    converted.eval()
    with torch.no_grad():
        assert torch.equal(converted(images()), original(images()))
    assert "kalman_chain" not in converted.code and "prior" not in converted.code


class DropsOut(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        return {"y": F.dropout(self.norm(self.conv(x)).relu(), 0.5, self.training)}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("is_graph", [True, False])
def test_it_stays_in_the_mode_of_the_network(training, is_graph):
    network = DropsOut()
    if is_graph:
        network = create_feature_extractor(network, {"dropout": "y"})
    network.train(training)
    want = network(images())["y"]
    converted = convert_kalman_norm(network, return_beliefs=True)
    assert {module.training for module in converted.modules()} == {training}
    y, beliefs = converted(images())
    if training:
        assert not torch.equal(y["y"], converted(images())[0]["y"])
    else:
        assert torch.equal(y["y"], want)
        assert beliefs == {"y": None}


@pytest.mark.parametrize("batch", [1, 3])
def test_in_training_at_gain_0_it_is_the_frozen_network(original, converted, batch):
    set_gain_scale(converted, 0.0)
    with torch.no_grad():
        want = original.eval()(images(batch))
        assert relative_error(converted.train()(images(batch)), want) < 1e-5
    # And not before it was calibrated.
    for layer in kalman_layers(converted).values():
        nn.init.zeros_(layer.mean_offset)
    with torch.no_grad():
        assert relative_error(converted(images(batch)), want) > 1e-2


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_its_gradients_are_those_of_the_function(converted, scale):
    set_gain_scale(converted.double(), scale)
    x = images().double()
    weight = torch.randn(converted(x).shape, generator=torch.Generator().manual_seed(1))
    by_autograd, by_difference = slopes(converted, lambda: (converted(x) * weight).mean())
    assert abs(by_difference) > 1e-2
    assert by_autograd == pytest.approx(by_difference, rel=3e-3)


def test_a_method_of_the_original_is_a_sentence():
    class WithMethod(Branchy):
        def forward_features(self, x):
            return self.stem(x)

    network = convert_kalman_norm(WithMethod())
    with pytest.raises(AttributeError, match="forward_features belongs to WithMethod, and a conv"):
        network.forward_features(images())
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        network.nothing
    assert network.restored().forward_features(images()).shape[1] == 8


class Doubled(nn.Conv2d):
    """A convolution that does something of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("who", ["nobody", "a hook on a norm", "a hook on a convolution"])
def test_at_gain_0_convolutions_absorb_their_norms_unless_somebody_watches(converted, who):
    """With the same values and gradients, and what is watched is called."""
    set_gain_scale(converted.double(), 0.0)
    twin, called = copy.deepcopy(converted), []
    for module in twin.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda *_: None)
    watched = {"a hook on a norm": "block.bn1", "a hook on a convolution": "block.conv1"}.get(who)
    if watched:
        module = converted.get_submodule(watched)
        module.register_forward_hook(lambda module, *_: called.append(module))
    x = images().double()
    outputs = [network.train()(x) for network in (converted, twin)]
    for y in outputs:
        y.square().mean().backward()
    assert called == ([module] if watched else [])
    torch.testing.assert_close(*outputs)
    for p, q in zip(converted.parameters(), twin.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("when", ["before the conversion", "after it"])
def test_a_convolution_that_does_more_is_called(original, when):
    conv = original.block.conv1
    doubled = Doubled(conv.in_channels, conv.out_channels, 3, padding=1, bias=False)
    doubled.load_state_dict(conv.state_dict())
    if when == "before the conversion":
        original.block.conv1 = doubled
    network = convert_kalman_norm(original, gain=0.0, learn_gain=False).train()
    network.block.conv1 = doubled
    y = network(images())
    network.block.bn1.register_forward_hook(lambda *_: None)  # so that it is not absorbed
    torch.testing.assert_close(network(images()), y)


class ChangesItsInput(nn.Module):
    """Between a convolution and its norm it changes the convolution's input in place."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.conv, self.bn2 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        x = self.bn1(self.stem(x))
        y = self.conv(x)
        x.relu_()
        return self.bn2(y).mean((2, 3)) + x.mean((2, 3))


HOOKS_THAT_MAKE_FILTERS = pytest.mark.parametrize(
    "wrap",
    [weight_norm, spectral_norm, lambda conv: prune.l1_unstructured(conv, "weight", 0.5)],
    ids=["weight_norm", "spectral_norm", "pruned"],
)


@HOOKS_THAT_MAKE_FILTERS
def test_a_filter_that_a_hook_makes_is_predicted_through(wrap):
    """The prediction goes through the filter of this step, and not through that of the last."""
    converted = convert_kalman_norm(_pair_of(wrap, 0)).train()
    optimizer = torch.optim.SGD(converted.parameters(), lr=0.1)
    x = torch.randn(2, 3, 9, 9)
    for _ in range(3):
        optimizer.zero_grad()
        converted(x).square().sum().backward()
        optimizer.step()
    assert all(p.grad is not None for p in converted.parameters() if p.requires_grad)


def _pair_of(wrap, seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        *(wrap(nn.Conv2d(3, 8, 3)), nn.BatchNorm2d(8), nn.ReLU()),
        *(wrap(nn.Conv2d(8, 8, 3)), nn.BatchNorm2d(8)),
    )


@HOOKS_THAT_MAKE_FILTERS
@pytest.mark.parametrize("when", ["before the conversion", "after it"])
def test_a_filter_that_a_hook_makes_is_that_of_the_weights_that_were_loaded(wrap, when):
    source, network = trained(_pair_of(wrap, 0)), _pair_of(wrap, 1)
    if when == "before the conversion":
        network.load_state_dict(source.state_dict())
    converted = convert_kalman_norm(network, gain=0.0, learn_gain=False)
    if when == "after it":
        converted.load_state_dict(source.state_dict(), strict=False)
    with torch.no_grad():
        want = source.eval()(images())
        # Spectral norm goes on iterating in training.
        assert relative_error(converted.train()(images()), want) < 0.1
        assert relative_error(converted.eval()(images()), want) < 0.1


@pytest.mark.parametrize("gain", [0.0, 0.1])
def test_a_hook_that_comes_after_the_conversion_makes_the_filter_first(gain):
    converted = convert_kalman_norm(_pair_of(nn.Identity(), 0), gain=gain, learn_gain=False)
    prune.l1_unstructured(converted.get_submodule("3"), "weight", 0.5)
    x = images()
    for _ in range(2):
        converted.train()(x).square().mean().backward()
    with torch.no_grad():
        converted.get_submodule("3").weight_orig.mul_(3.0)
        torch.testing.assert_close(converted(x), converted(x))
    restored = converted.restored()
    assert torch.equal(restored[3].weight_orig, converted.get_submodule("3").weight_orig)


class CountsCalls(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, weight):
        self.calls += 1
        return weight


@pytest.mark.parametrize("gain", [0.0, 0.1])
def test_a_parametrized_filter_is_computed_for_the_prediction_and_for_the_features(gain):
    network = _pair_of(nn.Identity(), 0)
    parametrize.register_parametrization(network[3], "weight", CountsCalls())
    converted = convert_kalman_norm(network, gain=gain, learn_gain=False).train()
    counted = network[3].parametrizations["weight"][0]
    counted.calls = 0
    converted(images())
    assert counted.calls == 2


@pytest.mark.parametrize("gain", [0.0, 0.1])
def test_a_forward_function_of_an_instance(gain, caplog):
    def tripled(z):
        return 3.0 * nn.Conv2d.forward(conv, z)

    network = trained(_pair_of(nn.Identity(), 0))
    conv = network[3]
    converted = convert_kalman_norm(copy.deepcopy(network), gain=gain, learn_gain=False)
    conv.forward = tripled
    late = converted.get_submodule("3")
    late.forward = lambda z: nn.Conv2d.forward(late, z).zero_()
    y = converted.train()(images())
    assert torch.equal(y, y[..., :1, :1].expand_as(y))
    assert not caplog.text
    converted = convert_kalman_norm(network, gain=gain, learn_gain=False)
    assert "it is a Conv2d with a forward function of its own" in caplog.text
    assert converted.get_submodule("4").is_head


class KeepsItsStatistics(nn.Sequential):
    def train(self, mode=True):
        super().train(mode)
        for module in self:
            module.eval()
        return self


def test_a_train_of_its_own_is_missed(caplog):
    convert_kalman_norm(KeepsItsStatistics(*_pair_of(nn.Identity(), 0)))
    assert "KeepsItsStatistics has a train() of its own" in caplog.text


def test_a_network_on_several_devices_is_refused():
    network = _pair_of(nn.Identity(), 0)
    network[3:].to("meta")
    with pytest.raises(InputError, match=r"on several devices \(cpu, meta\)"):
        convert_kalman_norm(network)


def test_a_network_that_gets_its_values_later():
    source = trained(_pair_of(nn.Identity(), 0))
    with torch.device("meta"):
        network = _pair_of(nn.Identity(), 1)
    options = dict(image_mean=(0.1, 0.2, 0.3), gain=0.0, learn_gain=False)
    converted = convert_kalman_norm(network, **options).to_empty(device="cpu")
    converted.load_state_dict(source.state_dict(), strict=False)
    want = convert_kalman_norm(source, **options).train()
    with torch.no_grad():
        torch.testing.assert_close(converted.train()(images()), want(images()))


def test_the_images_statistics_are_in_the_networks_precision_but_not_below_float32():
    numbers = dict(image_mean=(0.1, 0.2, 0.3), image_std=(300.0, 0.1, 0.2))
    network = convert_kalman_norm(_pair_of(nn.Identity(), 0).double(), **numbers)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float64):
        mean, var = network.to(dtype).kalman_chain.start()
        kept = torch.float64 if dtype == torch.float64 else torch.float32
        assert torch.equal(mean, torch.tensor([numbers["image_mean"]], dtype=kept))
        want = torch.tensor([numbers["image_std"]], dtype=torch.float64).square().to(kept)
        torch.testing.assert_close(var, want)


def test_norms_without_moving_statistics_predict_in_evaluation():
    norms = [nn.BatchNorm2d(8, track_running_stats=False) for _ in range(2)]
    network = nn.Sequential(nn.Conv2d(3, 8, 3), norms[0], nn.ReLU(), nn.Conv2d(8, 8, 3), norms[1])
    converted = convert_kalman_norm(network).eval()
    assert converted(torch.randn(2, 3, 9, 9)).isfinite().all()


@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.BatchNorm2d(8),
        lambda: nn.BatchNorm2d(8, track_running_stats=False),
        lambda: nn.BatchNorm2d(8, affine=False, track_running_stats=False),
        lambda: nn.GroupNorm(2, 8, affine=False),
    ],
)
def test_layers_and_chain_are_where_the_network_is(norm):
    network = nn.Sequential(nn.Conv2d(3, 8, 3), norm(), nn.ReLU(), nn.Conv2d(8, 8, 3), norm())
    converted = convert_kalman_norm(network.to("meta"))
    state = [*converted.parameters(), *converted.buffers()]
    assert state and all(tensor.is_meta for tensor in state)
    features = converted.train()(torch.empty(2, 3, 16, 16, device="meta"))
    features.sum().backward()
    assert features.is_meta and converted.get_parameter("3.weight").grad.is_meta


def test_a_joined_convolution_sees_its_input_before_it_is_changed():
    original = trained(ChangesItsInput())
    network = convert_kalman_norm(copy.deepcopy(original), gain=0.0, learn_gain=False)
    with torch.no_grad():
        want = original.eval()(images())
        assert relative_error(network.train()(images()), want) < 1e-5


def test_a_joined_convolution_sees_it_in_a_network_with_group_norm_too():
    """There the prior of a batch norm is made from those of the images."""
    original = trained(ChangesItsInput())
    original.unused = nn.GroupNorm(1, 8)
    network = convert_kalman_norm(copy.deepcopy(original), gain=1.0, learn_gain=False)
    for live in (original, network):
        live.train()
    with torch.no_grad():
        assert relative_error(network(images()), original(images())) < 1e-5


class Standardised(nn.Module):
    """Takes the statistics of its images from buffers."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("std", torch.ones(3))

    def forward(self, x):
        x = (x - self.mean.view(1, 3, 1, 1)) * (1 / self.std[:, None, None])
        return self.norm(self.conv(x))


def test_buffers_have_the_values_that_they_have_when_it_runs():
    converted = convert_kalman_norm(Standardised()).eval()
    assert not converted.norm.is_head
    other = trained(Standardised())
    other.mean.uniform_()
    other.std.uniform_(0.2, 2.0)
    converted.load_state_dict(other.state_dict(), strict=False)
    torch.testing.assert_close(converted(images()), other.eval()(images()))
    assert converted.to("meta")(images().to("meta")).is_meta


def test_fresh_statistics_are_not_calibrated_to():
    for layer in kalman_layers(convert_kalman_norm(Branchy())).values():
        assert (layer.mean_offset == 0).all() and (layer.log_var_scale == 0).all()


def test_every_parameter_gets_a_gradient(converted):
    converted.train()(images()).square().sum().backward()
    for name, p in converted.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
    assert all(layer.mean_offset.grad.any() for layer in kalman_layers(converted).values())


def assert_same_step(one, other):
    """Outputs, gradients and statistics of a training step."""
    results = []
    for network in (one, other):
        torch.manual_seed(1)
        y = network.train()(images())
        y.square().sum().backward()
        results.append([y, *(p.grad for p in network.parameters()), *network.buffers()])
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_copies_and_pickles_are_independent_and_the_same(converted):
    file = io.BytesIO()
    torch.save(converted, file)
    file.seek(0)
    twins = [
        copy.deepcopy(converted),
        pickle.loads(pickle.dumps(converted)),
        torch.load(file, weights_only=False),
        copy.deepcopy(copy.deepcopy(converted)),
    ]
    for twin in twins:
        own = {p.data_ptr() for p in converted.parameters()}
        assert not own & {p.data_ptr() for p in twin.parameters()}
        assert_same_step(twin, copy.deepcopy(converted))
        assert twin.code == converted.code


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision(converted, dtype):
    with torch.autocast("cpu", dtype=dtype):
        y = converted.train()(images())
    y.float().square().sum().backward()
    assert y.dtype == dtype
    assert all(p.grad.isfinite().all() for p in converted.parameters())
    for layer in kalman_layers(converted).values():
        assert layer.running_var.dtype == torch.float32


def test_activation_checkpointing(converted):
    other = copy.deepcopy(converted)

    def forward(x):
        return checkpoint(other, x, use_reentrant=False)

    y, want = forward(images()), converted(images())
    for out in (y, want):
        out.square().sum().backward()
    torch.testing.assert_close(y, want)
    for got, p in zip(other.parameters(), converted.parameters()):
        torch.testing.assert_close(got.grad, p.grad)


@pytest.mark.parametrize("training", [True, False])
def test_it_compiles_as_one_graph_at_several_sizes(training):
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Hardswish(), nn.Conv2d(4, 4, 1)
    network = convert_kalman_norm(trained(nn.Sequential(*layers, nn.BatchNorm2d(4))).double())
    other = copy.deepcopy(network.train(training))
    torch._dynamo.reset()
    compiled = torch.compile(other, backend="eager", fullgraph=True)
    for size in (16, 24, 20):
        y, want = compiled(images(2, size).double()), network(images(2, size).double())
        torch.testing.assert_close(y, want)
        y.square().mean().backward()
        want.square().mean().backward()
    for got, p in zip(other.parameters(), network.parameters()):
        torch.testing.assert_close(got.grad, p.grad)


def test_frozen_batch_norm_is_a_posterior(original):
    """The chain goes through what was frozen."""
    network = frozen_statistics(copy.deepcopy(original), "stem.1")
    converted = convert_kalman_norm(network)
    assert not any(isinstance(m, KalmanNorm2d) for m in converted.stem.modules())
    assert set(kalman_layers(converted)) | {"stem.1"} == set(
        kalman_layers(convert_kalman_norm(copy.deepcopy(original)))
    )
    set_gain_scale(converted, 0.0)
    with torch.no_grad():
        want = original.eval()(images())
        assert relative_error(converted.train()(images()), want) < 1e-5


def test_frozen_layers_of_a_network_in_training(original, converted):
    """What is often done by hand: norms in evaluation, the rest in training."""
    converted.train()
    for layer in kalman_layers(converted).values():
        layer.eval()
    with torch.no_grad():
        want = original.eval()(images())
        torch.testing.assert_close(converted(images()), want, rtol=1e-5, atol=1e-5)


def test_modes_that_do_different_things():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.side, self.unused = Branchy(), Branchy(), Branchy()

        def forward(self, x):
            if self.training:
                return self.body(x), self.side(x)
            return self.body(x)

    network = convert_kalman_norm(trained(Auxiliary()))
    assert len(network.train()(images())) == 2
    assert network.eval()(images()).shape == network.train()(images())[0].shape
    assert not kalman_layers(network.unused) and kalman_layers(network.side)
    network(images())[1].sum().backward()
    assert all(p.grad is not None for p in network.side.parameters())


def test_arguments_with_defaults_keep_them():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Branchy()

        def forward(self, x: torch.Tensor, mask: "Mask" = None, twice: bool = False):
            y = self.body(x)
            if mask is not None:
                y = y * mask
            return self.body(y) if twice else y

    network = convert_kalman_norm(Optional())
    assert network.train()(images()).shape == network(images(), mask=None, twice=False).shape


def test_beliefs_can_be_returned(original):
    network = convert_kalman_norm(nn.Sequential(original, nn.Flatten()), return_beliefs=True)
    y, belief = network.train()(images())
    assert y.dim() == 2 and belief is None
    features = convert_kalman_norm(trained(Branchy()), return_beliefs=True)
    y, belief = features.train()(images())
    assert isinstance(belief, Belief) and belief.mean.shape == (1, y.shape[1])
    # The network ends in a norm and a ReLU.
    norm = features.last[1]
    assert (belief.mean > norm.bias.detach().clamp_min(0)).all()
    assert features.eval()(images())[1] is None


# Options.


def test_options_reach_the_layers(original):
    network = convert_kalman_norm(
        original, gain=0.3, learn_gain=False, process_model=False, eval_statistics="batch"
    )
    for layer in kalman_layers(network).values():
        assert layer.gain.item() == pytest.approx(0.3) and not layer.has_process_model
        assert not isinstance(layer.gain_logit, nn.Parameter)
    x = images()
    with torch.no_grad():
        want = network.train()(x)
        torch.testing.assert_close(network.eval()(x), want)


def test_norms_are_taken_over_with_their_own_options():
    norm = nn.BatchNorm2d(4, eps=1e-3, momentum=None, affine=False)
    network = convert_kalman_norm(nn.Sequential(nn.Conv2d(3, 4, 1), norm).half())
    layer = network.get_submodule("1")
    assert (layer.eps, layer.momentum, layer.affine) == (1e-3, None, False)
    assert layer.mean_offset.dtype == torch.float16


def test_the_paper_variant_starts_behind_the_first_norm(original, caplog):
    network = convert_kalman_norm(original, variant="paper")
    assert not caplog.records
    assert network.stem[1].is_head
    assert (
        len(kalman_layers(network))
        == sum(isinstance(m, KalmanNorm2d) for m in network.modules()) - 1
    )
    network.train()(images()).square().sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    assert fit_process_noise(network) == len(kalman_layers(network))


@pytest.mark.parametrize("size", [0, 64])
def test_monte_carlo_priors_are_near_those_in_closed_form(original, size):
    closed = convert_kalman_norm(copy.deepcopy(original))
    sampled = convert_kalman_norm(original, transition=MonteCarloTransition(size))
    for got, want in zip(sampled.state_dict().values(), closed.state_dict().values()):
        assert torch.equal(got, want)  # calibrated in closed form
    for network in (closed, sampled):
        set_gain_scale(network, 0.0)
    with torch.no_grad():
        want = closed.train()(images(2, 64))
        got = sampled.train()(images(2, 64))
    assert 1e-4 < relative_error(got, want) < 0.3


def test_group_norm_becomes_gkn():
    network = convert_kalman_norm(Branchy(lambda channels: nn.GroupNorm(2, channels)))
    assert all(isinstance(n, GroupKalmanNorm2d) for n in kalman_layers(network).values())
    x = images()
    network.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(x), network.train()(x))


def test_at_gain_1_gkn_is_the_group_norm_network():
    original = Branchy(lambda channels: nn.GroupNorm(2, channels))
    x = images()
    want = original(x)
    network = convert_kalman_norm(original, gain=1.0, learn_gain=False)
    torch.testing.assert_close(network(x), want)


def test_micro_batches(converted):
    """Two micro-batches of one image are what two batches of one image are."""
    x = images(2)
    with torch.no_grad():
        want = torch.cat([copy.deepcopy(converted).train()(part) for part in x.split(1)])
        set_norm_batch_size(converted, 1)
        torch.testing.assert_close(converted.train()(x), want, rtol=1e-4, atol=1e-5)


# Folding.


def test_folding_gives_the_original_back(original, converted):
    optimizer = torch.optim.SGD(converted.parameters(), lr=0.1)
    for seed in range(3):
        y = converted.train()(images(seed=seed))
        optimizer.zero_grad()
        F.mse_loss(y, torch.ones_like(y)).backward()
        optimizer.step()
    folded = fold_network(converted)
    assert type(folded) is Branchy and not folded.training and folded.note == "kept"
    assert list(folded.state_dict()) == list(original.state_dict())
    assert {type(m) for m in folded.modules()} == {type(m) for m in original.modules()}
    with torch.no_grad():
        assert relative_error(folded(images()), converted.eval()(images())) < 1e-5
    assert not torch.equal(folded.stem[0].weight, original.stem[0].weight)
    assert kalman_layers(converted)  # stays as it is
    original.load_state_dict(folded.state_dict())


def test_what_cannot_be_folded(original):
    online = convert_kalman_norm(copy.deepcopy(original), eval_statistics="batch")
    groups = convert_kalman_norm(Branchy(lambda channels: nn.GroupNorm(2, channels)))
    for network in (online, groups):
        with pytest.raises(InputError, match="stem.1 takes its statistics from the images"):
            fold_network(network)
    with pytest.raises(InputError, match="no network that convert_kalman_norm made"):
        fold_network(original)


def extractor(network):
    return create_feature_extractor(network, {"stem": "a", "last": "b"})


@pytest.mark.parametrize("trace", [torch.fx.symbolic_trace, extractor])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))])
def test_folding_gives_a_traced_network_back(original, trace, copied):
    """It has one graph for each mode if the original had, and modes of its modules stay."""
    traced = trace(original)
    kind = type(traced).__mro__[1]
    converted = convert_kalman_norm(traced).train()
    converted(images())
    converted = copied(converted).eval()
    restored, folded = converted.restored(), fold_network(converted)
    with torch.no_grad():
        want = converted(images())
        torch.testing.assert_close(folded(images()), want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(restored(images()), want, rtol=1e-4, atol=1e-5)
    for network in (restored, folded):
        assert isinstance(network, kind) and not kalman_layers(network)
        assert list(network.state_dict()) == list(trace(Branchy()).state_dict())
        again = copied(network).train()
        reference = trace(Branchy()).train()
        reference.load_state_dict(network.state_dict())
        torch.testing.assert_close(again(images()), reference(images()))


def test_a_restored_extractor_has_a_graph_for_each_mode():
    converted = convert_kalman_norm(create_feature_extractor(DropsOut(), {"dropout": "y"})).eval()
    restored = converted.restored()
    with torch.no_grad():
        assert torch.equal(restored(images())["y"], restored(images())["y"])
        restored.train()  # it drops features at random
        assert not torch.equal(restored(images())["y"], restored(images())["y"])


# What cannot be converted.


class DataDependent(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.norm(self.conv(x))
        if y.mean() > 0:
            y = y + 1
        return y


def with_another_forward():
    network = Branchy()
    forward = network.forward
    network.forward = lambda x: 2 * forward(x)
    return network


def with_parametrized_norm():
    network = Branchy()
    parametrize.register_parametrization(network.last[1], "weight", nn.Softplus())
    return network


def with_compiled_part(in_place):
    network = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), nn.Flatten())
    if in_place:
        network[0].compile(backend="eager")
    else:
        network[0] = torch.compile(network[0], backend="eager")
    return network


def with_broken_statistics():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    network[1].running_var[2] = float("nan")
    return network


@pytest.mark.parametrize(
    "network, why",
    [
        (DataDependent(), r"cannot be traced .*test_convert\.py:\d+, 'if y.mean\(\) > 0:'"),
        (nn.Sequential(nn.Conv2d(3, 4, 1)), "neither BatchNorm2d nor GroupNorm"),
        (nn.Sequential(nn.Conv3d(3, 4, 1), nn.BatchNorm3d(4)), "has a Conv3d, 0"),
        (nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4)), "images of 3 channels.* takes 1"),
        (nn.Sequential(nn.Conv2d(3, 4, 1), KalmanNorm2d(4)), "has Kalman layers already"),
        (Branchy(FrozenBatchNorm2d), "All norms of Branchy are frozen BatchNorms"),
        (nn.DataParallel(Branchy()), "DataParallel is the wrapper of a network"),
        (torch.compile(Branchy(), backend="eager"), "OptimizedModule is the wrapper of a network"),
        (with_another_forward(), "The forward function of this Branchy was replaced"),
        (with_parametrized_norm(), "parametrization at last.1, which a Kalman layer"),
        (nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 4, 1)), "images of 3 channels.* takes 1"),
        (AveragedModel(Branchy()), "AveragedModel is the wrapper of a network"),
        (nn.ModuleList([nn.BatchNorm2d(3)]), "ModuleList cannot be traced .*needs: its forward"),
        (with_compiled_part(in_place=False), "has a compiled part, 0, into which"),
        (with_compiled_part(in_place=True), "has a compiled part, 0, into which"),
        (with_broken_statistics(), "1.running_var has values that are not finite"),
    ],
)
def test_what_cannot_be_converted_is_refused_in_a_sentence(network, why):
    with pytest.raises(InputError, match=why):
        convert_kalman_norm(network)


def test_a_network_that_is_refused_is_left_as_it_was():
    network = with_broken_statistics()
    with pytest.raises(InputError, match="not finite"):
        convert_kalman_norm(network)
    assert type(network[1]) is nn.BatchNorm2d
    network[1].reset_running_stats()
    assert len(kalman_layers(convert_kalman_norm(network))) == 1


def test_a_gain_of_none_is_refused(original):
    with pytest.raises(InputError, match="gain is None"):
        convert_kalman_norm(original, gain=None)


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.classifier = nn.Sequential(nn.Dropout(), nn.Linear(4, 2))

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


@pytest.mark.parametrize(
    "head",
    [
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5)),
        nn.Linear(4, 5),
        nn.Identity(),
    ],
)
def test_the_part_behind_all_norms_may_be_exchanged(head):
    """As for fine-tuning to other classes. It stays in one piece, whose own forward is called."""
    original = trained(Classifier())
    converted = convert_kalman_norm(copy.deepcopy(original), gain=0.0, learn_gain=False)
    assert torch.equal(converted.eval()(images()), original.eval()(images()))
    original.classifier = copy.deepcopy(head)
    converted.classifier = copy.deepcopy(head)
    for training in (True, False):
        torch.testing.assert_close(converted.train(training)(images()), original(images()))
    converted.train()(images()).sum().backward()
    assert all(p.grad is not None for p in converted.classifier.parameters())


def test_a_network_that_was_compiled_in_place_runs_converted():
    network, x = trained(Branchy()), images()
    want = network.eval()(x)
    network.compile(backend="eager")
    torch.testing.assert_close(convert_kalman_norm(network)(x), want)


def test_a_frozen_network_stays_frozen():
    network = Branchy()
    network.block.requires_grad_(False)
    converted = convert_kalman_norm(network)
    trains = {name for name, p in converted.named_parameters() if p.requires_grad}
    assert not any(name.startswith("block") for name in trains)
    assert {"last.1.gain_logit", "last.1.mean_offset", "last.1.weight"} <= trains
    # Norms without parameters are not frozen.
    plain = convert_kalman_norm(Branchy(lambda channels: nn.BatchNorm2d(channels, affine=False)))
    assert plain.get_parameter("last.1.gain_logit").requires_grad


def test_a_network_without_parameters():
    network = nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.ReLU())
    assert convert_kalman_norm(network)(images()).shape == (2, 3, 32, 32)


class Shared(nn.Module):
    """One norm behind two convolutions, as the towers of some detectors have it."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv2(F.relu(self.norm(self.conv1(x)))))


def test_a_norm_with_two_predictions_is_warned_of(caplog):
    """No process model fits both."""
    network = convert_kalman_norm(trained(Shared()))
    assert "norm is called more than once, with different priors" in caplog.text
    caplog.clear()
    calibrate(network)
    assert "norm is called more than once, with different priors" in caplog.text


def test_hooks_that_collect_features_are_refused():
    features = []
    network = Branchy()
    network.block.conv1.register_forward_hook(lambda module, args, y: features.append(y))
    assert convert_kalman_norm(network)(images()).shape and len(features) == 1  # it stays
    network = Branchy()
    network.block.register_forward_hook(lambda module, args, y: features.append(y))
    with pytest.raises(InputError, match="has hooks at block"):
        convert_kalman_norm(network)
    network = Branchy()
    network.block.register_full_backward_hook(lambda module, dx, dy: None)
    with pytest.raises(InputError, match="has hooks at block"):
        convert_kalman_norm(network)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    network[1].register_forward_hook(lambda module, args, y: features.append(y))
    with pytest.raises(InputError, match="has hooks at 1,"):
        convert_kalman_norm(network)

    class Collecting(Branchy):
        def forward(self, x):
            super().forward(x)
            return []

    with pytest.raises(InputError, match="Collecting returns nothing that torch.fx sees"):
        convert_kalman_norm(Collecting())


def test_a_transposed_convolution_ends_the_chain(caplog):
    network = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.BatchNorm2d(4))
    assert convert_kalman_norm(network).get_submodule("1").is_head
    assert "ConvTranspose2d: there is no rule for it (at 0)" in caplog.text


class Tokens(nn.Module):
    """Has a GroupNorm of features without height and width."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.of_tokens = (
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.GroupNorm(2, 8),
        )

    def forward(self, x):
        return self.of_tokens(F.relu(self.norm(self.conv(x))).flatten(2))


def test_a_norm_of_no_feature_map_stays(caplog):
    original = trained(Tokens())
    converted = convert_kalman_norm(copy.deepcopy(original))
    assert type(converted.of_tokens) is nn.GroupNorm and not converted.norm.is_head
    assert "1 of the 2 norms" in caplog.text and "its output is no feature map" in caplog.text
    assert torch.equal(converted.eval()(images()), original.eval()(images()))
    assert converted.train()(images()).shape == original(images()).shape


def test_batch_norm_of_vectors_is_warned_of(caplog):
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1))
    network.extend([nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 2)])
    convert_kalman_norm(network)
    assert "1 BatchNorm1d stay as they are (4), and measure in training" in caplog.text


class Gated(Tokens):
    """The chain ends before the norm whose features have no height and width."""

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x)))
        return self.of_tokens((x * x.sigmoid()).mean((2, 3)))


def test_a_norm_behind_the_end_of_a_chain_takes_what_it_took():
    original = trained(Gated())
    converted = convert_kalman_norm(copy.deepcopy(original))
    torch.testing.assert_close(converted.eval()(images()), original.eval()(images()))
    assert converted.train()(images()).shape == original(images()).shape == (len(images()), 8)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x, depth):
        return self.norm1(self.conv1(x)) + self.norm2(self.conv2(depth))


def test_nothing_is_known_about_a_second_input(caplog):
    converted = convert_kalman_norm(TwoInputs())
    assert converted.norm2.is_head and not converted.norm1.is_head
    assert "depth in TwoInputs: nothing is known about this input" in caplog.text


class Twice(nn.Module):
    """Calls a norm twice. In the paper's variant the first call has no prior, so that it is a head."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.last, self.last_norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        for _ in range(2):
            x = F.relu(self.norm(self.conv(x)))
        return self.last_norm(self.last(x))


def test_a_head_that_is_called_twice_may_be_frozen():
    network = convert_kalman_norm(Twice(), variant="paper").train()
    assert network.norm.is_head and not network.last_norm.is_head
    network.norm.eval()
    network(images()).sum().backward()
    assert network.last_norm.gain_logit.grad is not None


def test_mean_and_deviation_are_about_the_same_channels():
    with pytest.raises(InputError, match="image_mean has 1 numbers and image_std has 3"):
        convert_kalman_norm(Branchy(), image_mean=[0.5])
    with pytest.raises(InputError, match=r"image_std is \[0.0, 1.0, 1.0\]: give positive numbers"):
        convert_kalman_norm(Branchy(), image_std=[0.0, 1.0, 1.0])


def test_a_transition_is_no_name():  # as MODEL.KN.PREDICTION is
    with pytest.raises(ValueError, match="build_transition returns, not 'monte_carlo'"):
        convert_kalman_norm(Branchy(), transition="monte_carlo")


def test_a_norm_under_two_names_is_replaced_under_both():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    network.same = network[1]
    converted = convert_kalman_norm(network)
    assert isinstance(converted.same, KalmanNorm2d)
    assert converted.same is converted.get_submodule("1")
    converted(images()).sum().backward()
    restored = converted.restored()
    assert type(restored.same) is nn.BatchNorm2d and restored.same is restored[1]


@pytest.mark.parametrize("training", [True, False])
def test_norms_that_are_called_by_name(training):
    class ByName(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(input=self.conv(input=x))

    network = ByName()
    want = nn.Sequential(copy.deepcopy(network.conv), copy.deepcopy(network.norm)).train(training)
    converted = convert_kalman_norm(network.train(training), gain=1.0, learn_gain=False)
    assert not converted.norm.is_head
    x = images()
    torch.testing.assert_close(converted(x), want(x))


def test_conversion_to_sync_batch_norm_is_a_sentence(converted):
    replaced = nn.SyncBatchNorm.convert_sync_batchnorm(converted).train()
    with pytest.raises(TypeError, match="a SyncBatchNorm stands .*convert_sync_batchnorm must not"):
        replaced(images())


@pytest.mark.parametrize("activation", [nn.ReLU, nn.PReLU])  # for the second there is no rule
def test_sync_batch_norm_of_vectors_stays(activation):
    network = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), activation(), nn.Flatten()),
        *(nn.Linear(8 * 7 * 7, 4), nn.BatchNorm1d(4), nn.ReLU()),
        *(nn.Linear(4, 4), nn.BatchNorm1d(4)),
    ).eval()
    x = images(2, 9)
    want = network(x)
    converted = convert_kalman_norm(nn.SyncBatchNorm.convert_sync_batchnorm(network))
    assert isinstance(converted.get_submodule("1"), KalmanNorm2d)
    for name in ("5", "8"):
        assert type(converted.get_submodule(name)) is nn.SyncBatchNorm
    torch.testing.assert_close(converted(x), want)


def test_code_that_nobody_has_any_more_is_forgotten(converted):
    gc.collect()
    before = set(linecache.cache)
    other = copy.deepcopy(converted)
    assert len(set(linecache.cache) - before) == 4
    del other
    gc.collect()
    assert set(linecache.cache) == before


def test_a_norm_that_does_more_is_warned_of(caplog):
    class Halved(nn.BatchNorm2d):
        def forward(self, x):
            return 0.5 * super().forward(x)

    layers = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
    convert_kalman_norm(nn.Sequential(*copy.deepcopy(layers), nn.BatchNorm2d(4)))
    assert not caplog.records
    convert_kalman_norm(nn.Sequential(*layers, Halved(4)))
    assert "3 is a Halved with a forward function of its own" in caplog.text


def test_a_norm_in_training_in_a_network_in_evaluation_is_a_sentence(converted):
    converted.eval()
    list(kalman_layers(converted).values())[-1].train()
    with pytest.raises(InputError, match=r"network is in evaluation mode .*: call train\(\) of"):
        converted(images())
    with pytest.raises(ValueError, match="expected 4D"):  # not everything is due to the modes
        converted.train()(images()[0])
