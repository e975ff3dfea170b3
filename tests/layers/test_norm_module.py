"""What holds for every norm of the package, whatever its options: one table of cases.

In the manner of torch's own tests of its modules. The values are those of ``reference.py``, of
:class:`torch.nn.BatchNorm2d` and :class:`torch.nn.GroupNorm`; gradients are checked numerically.
"""

import copy
import io
import pickle
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.func import functional_call

from kn_detectron.layers import KN_STATE, Belief, GroupKalmanNorm2d, KalmanNorm2d

from ..models import randomize
from . import reference
from .inputs import features, prior_of

IMAGES, CHANNELS, GROUPS = 3, 6, 3

# The options of a layer, and what belongs to the test: see Case.
BOTH = {
    "gain learned": dict(gain=0.3),
    "gain fixed": dict(gain=0.3, learn_gain=False),
    "gain 0": dict(gain=0.0, learn_gain=False),
    "gain 1": dict(gain=1.0, learn_gain=False),
    "annealed to half": dict(gain=0.3, gain_scale=0.5),
    "annealed to 0": dict(gain=0.3, gain_scale=0.0),
    "no process model, other eps": dict(gain=0.3, process_model=False, eps=1e-3),
    "not affine": dict(gain=0.3, affine=False),
    "not affine, gain 0": dict(gain=0.0, learn_gain=False, affine=False),
    "wide prior": dict(gain=0.3, prior_width=1e4),
    "head, other eps": dict(gain=None, eps=1e-3),
    "head, not affine": dict(gain=None, affine=False),
}
KN_ONLY = {
    "momentum": dict(gain=0.3, momentum=0.8),
    "average of all batches": dict(gain=0.3, momentum=None),
    "batch statistics in evaluation": dict(gain=0.3, eval_statistics="batch"),
    "no running statistics": dict(gain=0.3, track_running_stats=False),
    "nothing": dict(gain=0.3, affine=False, track_running_stats=False),
    "head, average of all batches": dict(gain=None, momentum=None),
    "head, nothing": dict(gain=None, affine=False, track_running_stats=False),
}
GKN_ONLY = {
    "prior per image": dict(gain=0.3, prior_rows=IMAGES),
    "prior per image, annealed to 0": dict(gain=0.3, gain_scale=0.0, prior_rows=IMAGES),
}


class Case(NamedTuple):
    """A kind of layer, and the prior that it is given."""

    cls: type
    options: dict
    gain_scale: float = 1.0
    prior_rows: int = 1
    prior_width: float = 1.0

    @property
    def is_group(self):
        return self.cls is GroupKalmanNorm2d

    @property
    def is_head(self):
        return self.options["gain"] is None

    @property
    def measures(self):
        return self.options["gain"] != 0 and self.gain_scale != 0

    def fresh(self, **options):
        sizes = (GROUPS, CHANNELS) if self.is_group else (CHANNELS,)
        return self.cls(*sizes, **{**self.options, **options})

    def make(self, device="cpu", **options):
        """The layer as after some training, so that no term is hidden by a 0 or a 1."""
        layer = randomize(self.fresh(**options)).to(device)
        if running_statistics(layer):
            layer.num_batches_tracked.fill_(3)
        layer.set_gain_scale(self.gain_scale)
        return layer

    def prior(self, dtype=torch.float32, device="cpu"):
        if self.is_head:
            return None
        mean, var = prior_of(CHANNELS, self.prior_rows, dtype)
        return Belief(mean.to(device), self.prior_width * var.to(device))

    def run(self, layer, x):
        """y and belief of a layer in a chain."""
        return layer(x, prior=self.prior(statistics_dtype(x.dtype), x.device))


def _table():
    for cls, own in ((KalmanNorm2d, KN_ONLY), (GroupKalmanNorm2d, GKN_ONLY)):
        for variant in ("network", "paper"):
            for name, options in {**BOTH, **own}.items():
                of_test = {key: options[key] for key in Case._fields if key in options}
                own_options = {k: v for k, v in options.items() if k not in of_test}
                case = Case(cls, dict(own_options, variant=variant), **of_test)
                yield f"{cls.__name__}, {variant}, {name}", case


TABLE = dict(_table())


def cases(wanted=lambda case: True):
    """The cases of the table, or those that are wanted, as the argument ``case`` of a test."""
    chosen = {name: case for name, case in TABLE.items() if wanted(case)}
    return pytest.mark.parametrize("case", chosen.values(), ids=chosen.keys())


DEVICES = pytest.mark.parametrize("device", ["cpu"] + ["cuda"] * torch.cuda.is_available())
PRECISIONS = (
    (torch.float64, torch.channels_last),
    (torch.float32, torch.contiguous_format),
    (torch.bfloat16, torch.channels_last),
    (torch.float16, torch.contiguous_format),
)


def statistics_dtype(dtype):
    return torch.promote_types(dtype, torch.float32)


def batch(dtype=torch.float32, images=IMAGES, size=(5, 4)):
    return features(dtype, shape=(images, CHANNELS, *size))


def state_of(layer):
    return {name: value.clone() for name, value in layer.state_dict().items()}


def running_statistics(layer):
    names = "running_mean", "running_var", "num_batches_tracked"
    return {name: value for name, value in state_of(layer).items() if name in names}


def assert_same(got, want):
    """Of two dicts of tensors."""
    assert got.keys() == want.keys()
    for name, value in got.items():
        assert torch.equal(value, want[name]), name


def assert_close(got, want, dtype, **options):
    """Within what the dtype can tell apart, with much room for the rounding on the way."""
    bound = {torch.float64: 1e-8, torch.float32: 1e-3}.get(dtype, 4e-2)
    got, want = torch.as_tensor(got).double().cpu(), torch.as_tensor(want).double().cpu()
    got, want = torch.broadcast_tensors(got, want)
    torch.testing.assert_close(got, want, rtol=bound, atol=bound, **options)


def torch_norm(case):
    """The BatchNorm or GroupNorm that a layer derives from, as after some training."""
    options = {"affine", "eps", "momentum", "track_running_stats"} & case.options.keys()
    options = {name: case.options[name] for name in options}
    norm = nn.BatchNorm2d(CHANNELS, **options)
    if case.is_group:
        norm = nn.GroupNorm(GROUPS, CHANNELS, **options)
    norm.load_state_dict({n: v + 1 for n, v in case.make().state_dict().items()}, strict=False)
    return norm


# Values.


@DEVICES
@cases()
@pytest.mark.parametrize("dtype, memory_format", PRECISIONS, ids=str)
def test_values(case, dtype, memory_format, device):
    """Output, belief and running statistics in training: those of the reference."""
    of_statistics = statistics_dtype(dtype)
    layer = case.make(dtype=of_statistics, device=device)
    before = {name: value.double().cpu().numpy() for name, value in state_of(layer).items()}
    x = batch(dtype).to(device, memory_format=memory_format)
    given = x.clone()
    with torch.autocast(device, dtype=dtype, enabled=x.element_size() == 2):
        y, belief = case.run(layer, x)
    assert torch.equal(x, given)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    assert y.is_contiguous(memory_format=memory_format)
    assert belief.mean.shape == belief.var.shape and belief.mean.shape[1:] == (CHANNELS,)
    assert belief.mean.dtype == belief.var.dtype == of_statistics

    want = reference.kalman_norm(
        x.double().cpu().numpy(),
        None if case.is_head else [v.numpy() for v in case.prior(torch.float64)],
        before,
        groups=GROUPS if case.is_group else None,
        paper=layer.variant == "paper",
        eps=layer.eps,
    )
    assert_close(y, want.y, dtype)
    for got, wanted in zip(belief, want.belief):
        assert_close(got, wanted, of_statistics)
    after = running_statistics(layer)
    if after:
        rate = 1 / 4 if layer.momentum is None else layer.momentum
        if not case.measures:  # what does not depend on the batch is not averaged
            rate = 1.0
        for name, (new,) in zip(("running_mean", "running_var"), want.tracked):
            assert_close(after[name], (1 - rate) * before[name] + rate * new, of_statistics)
        assert after["num_batches_tracked"] == 4


@DEVICES
@cases()
def test_evaluation(case, device):
    """That of BatchNorm with moving statistics, else what training does without keeping anything."""
    for dtype, memory_format in PRECISIONS:
        layer = case.make(dtype=statistics_dtype(dtype), device=device).eval()
        before = state_of(layer)
        x = batch(dtype).to(device, memory_format=memory_format)
        y, belief = case.run(layer, x)
        assert y.dtype == dtype and y.is_contiguous(memory_format=memory_format)
        assert_same(state_of(layer), before)
        want_y, want = case.run(copy.deepcopy(layer).train(), x)
        if running_statistics(layer) and layer.eval_statistics == "moving":
            norm = nn.BatchNorm2d(CHANNELS, layer.eps, affine=layer.affine).eval().double()
            norm.load_state_dict({name: before[name] for name in norm.state_dict()})
            want_y = norm.to(device)(x.double())
            if layer.variant == "paper":
                want = Belief(norm.running_mean, norm.running_var)
        assert_close(y, want_y, dtype)
        for got, wanted in zip(belief, want):
            assert_close(got, wanted, belief.mean.dtype)


@cases(lambda case: case.is_head or case.options["gain"] == 1)
def test_without_a_prior_or_at_gain_1_it_is_the_norm_of_torch(case):
    """Three steps and an evaluation, with gradients, from a state dict of that norm."""
    ours, theirs = case.fresh(), torch_norm(case)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for step in (1, 2, 3, 4):
        results = []
        for norm in (ours, theirs):
            norm.train(step < 4)
            x = (step * batch()).requires_grad_()
            y = norm(x) if norm is theirs else case.run(norm, x)[0]
            leaves = [x, *(norm.get_parameter(name) for name, _ in theirs.named_parameters())]
            results.append([y, *torch.autograd.grad(y.sigmoid().sum(), leaves)])
        for got, want in zip(*results):
            torch.testing.assert_close(got, want)
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer)


@cases()
def test_the_belief_is_about_what_it_says(case):
    """Monte Carlo: features as the prior has them, many of them, and the belief behind the norm."""
    layer = case.fresh(process_model=False)
    layer.set_gain_scale(case.gain_scale)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in (layer.weight, layer.bias):
            if p is not None:
                p.copy_(torch.randn(CHANNELS, generator=g))
    mean, var = torch.randn(CHANNELS, generator=g), torch.rand(CHANNELS, generator=g) + 0.5
    if case.is_head:  # of which nothing is believed but that its channels are alike
        mean, var = mean[:1].expand(CHANNELS), var[:1].expand(CHANNELS)
    noise = torch.randn(1, CHANNELS, 200, 200, generator=g)
    x = mean[:, None, None] + var.sqrt()[:, None, None] * noise
    prior = None if case.is_head else Belief(mean[None], var[None])
    y, belief = layer(x, prior=prior)
    about = x if layer.variant == "paper" else y
    if layer.variant == "paper" and case.is_group:
        # The posterior of a group, which its channels share.
        about = x.view(1, GROUPS, -1, 200).repeat_interleave(CHANNELS // GROUPS, 1)
    measured_var, measured_mean = torch.var_mean(about, (0, 2, 3))
    torch.testing.assert_close(belief.mean[0], measured_mean, rtol=0.0, atol=0.05)
    torch.testing.assert_close(belief.var[0], measured_var, rtol=0.05, atol=0.0)


# Gradients.


@cases()
def test_gradcheck(case):
    layer = case.make(dtype=torch.float64)
    parameters, prior = dict(layer.named_parameters()), case.prior(torch.float64) or ()

    def outputs(x, *rest):
        own = dict(zip(parameters, rest[len(prior) :]))
        inputs = dict(prior=Belief(*rest[: len(prior)]) if prior else None)
        y, belief = functional_call(layer, own, (x,), inputs)
        return (y, *belief)

    leaves = batch(torch.float64, size=(2, 2)), *prior, *parameters.values()
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(outputs, leaves, fast_mode=True)


@cases()
def test_second_derivatives_are_refused(case):
    x = batch().requires_grad_()
    y, _ = case.run(case.make(), x)
    (dx,) = torch.autograd.grad(y.sigmoid().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.square().sum().backward()


@DEVICES
@cases()
def test_gradients_in_every_precision(case, device):
    """Against those in float64, which gradcheck has seen."""

    def gradients(x):
        x = x.detach().requires_grad_()
        own = statistics_dtype(x.dtype)
        layer = case.make(dtype=own, device=device)
        y, belief = case.run(layer, x)
        loss = y.to(own).sigmoid().mean() + belief.mean.sin().mean() + belief.var.log().mean()
        loss.backward()
        return {name: leaf.grad for name, leaf in (("x", x), *layer.named_parameters())}

    for dtype, memory_format in PRECISIONS:
        x = batch(dtype).to(device, memory_format=memory_format)
        got, want = gradients(x), gradients(x.double())
        assert got["x"].dtype == dtype and got["x"].is_contiguous(memory_format=memory_format)
        for name, grad in got.items():  # there for every parameter: DDP waits for all of them
            assert_close(grad, want[name], dtype, msg=lambda text: f"{name}, {dtype}: {text}")


# State.


def through_state_dict(layer, case):
    other = case.fresh()
    other.load_state_dict(state_of(layer), strict=True)
    return other


def through_deepcopy(layer, case):
    return copy.deepcopy(layer)


def through_pickle(layer, case):
    return pickle.loads(pickle.dumps(layer))


def through_file(layer, case):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@cases()
def test_copies(case):
    """A copy does what the layer does, and shares nothing with it."""
    layer = case.make()
    case.run(layer, batch())
    before = state_of(layer)
    for way in (through_state_dict, through_deepcopy, through_pickle, through_file):
        other = way(layer, case)
        assert_same(state_of(other), before)
        results = case.run(other, batch() + 1), case.run(copy.deepcopy(layer), batch() + 1)
        for got, want in zip(*([y, *belief] for y, belief in results), strict=True):
            assert torch.equal(got, want), way
        with torch.no_grad():
            for value in other.state_dict().values():
                value.zero_()
        assert_same(state_of(layer), before)


@cases()
def test_state_dict_of_the_norm_of_torch(case):
    """It leaves the filter alone; half of a filter is refused."""
    layer = case.make()
    before, norm = state_of(layer), torch_norm(case)
    layer.load_state_dict(norm.state_dict(), strict=True)
    assert_same(state_of(layer), {**before, **norm.state_dict()})
    if not case.is_head:
        del before["gain_logit"]
        with pytest.raises(RuntimeError, match="gain_logit"):
            layer.load_state_dict(before, strict=True)


@cases()
def test_meta_device_and_reset_parameters(case):
    layer = case.fresh(device="meta")
    assert all(value.is_meta for value in layer.state_dict().values())
    repr(layer)  # which has no values to show
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for value in layer.state_dict().values():
            value.fill_(7)
    layer.reset_parameters()
    fresh = case.fresh()
    assert_same(state_of(layer), state_of(fresh))
    assert torch.equal(case.run(layer, batch())[0], case.run(fresh, batch())[0])


@DEVICES
@cases()
def test_moved_to_a_device_and_dtype(case, device):
    """Also to half precision, which rounds the parameters themselves."""
    for dtype in (torch.bfloat16, torch.float16):
        layer = case.make().to(device, dtype)
        for built in (layer, case.fresh(device=device, dtype=dtype)):
            for name, value in built.state_dict().items():
                assert value.device.type == device, name
                assert value.dtype == (dtype if value.is_floating_point() else torch.long), name
        x = batch(dtype).to(device)
        y, belief = case.run(layer, x)
        want, want_belief = case.run(copy.deepcopy(layer).double(), x.double())
        assert y.dtype == dtype and belief.mean.dtype == torch.float32
        for got, wanted in zip((y, *belief), (want, *want_belief)):
            assert_close(got, wanted, dtype)


WAYS_TO_SCALE = {
    "set_gain_scale": lambda layer, scale: layer.set_gain_scale(scale.item()),
    "written": lambda layer, scale: layer.gain_scale.copy_(scale),
    "assigned": lambda layer, scale: setattr(layer, "gain_scale", scale),
    "loaded": lambda layer, scale: layer.load_state_dict(
        {**layer.state_dict(), "gain_scale": scale}
    ),
}


@cases(lambda case: not case.is_head and case.options["gain"] != 0)
def test_whether_it_measures_follows_from_the_scale(case):
    """A NaN in one image reaches the others only by way of a measurement."""
    layer, spoilt = case.make(), batch()
    spoilt[0] = float("nan")
    for name, way in WAYS_TO_SCALE.items():
        for scale in (0.5, 0.0):
            way(layer, torch.tensor(scale))
            (y, _), (want, _) = (case.run(layer, x) for x in (spoilt, batch()))
            assert y[0].isnan().all()
            assert torch.equal(y[1:], want[1:]) == (scale == 0 or case.is_group), name


# What BatchNorm trips over, and what it refuses.


@cases()
def test_empty_batch(case):
    """It passes through, connected to the gradient, and changes nothing."""
    layer, x = case.make(), batch()[:0].requires_grad_()
    before, prior = state_of(layer), ()
    if not case.is_head:
        rows = slice(0 if case.prior_rows > 1 else 1)
        prior = Belief(*(v[rows].requires_grad_() for v in case.prior()))
    y, belief = layer(x, prior=prior or None)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert belief.mean.shape[1:] == (CHANNELS,) and all(v.isfinite().all() for v in belief)
    y.sum().backward()
    for leaf in (x, *prior, *layer.parameters()):
        assert leaf.grad is not None and not leaf.grad.any()
    assert_same(state_of(layer), before)
    assert layer.eval()(x, prior=prior or None)[0].shape == x.shape


@cases()
def test_non_finite_measurement(case):
    """It changes no running statistic, and is not hidden. Without measurement it is no matter."""
    layer, image = case.make(), 1
    clean, _ = case.run(layer, batch())
    before = running_statistics(layer)
    spoilt = torch.zeros(batch().shape, dtype=torch.bool)
    spoilt[image, 2, 0, 0] = True
    reached = spoilt.clone()
    if case.measures:
        reached[image if case.is_group else slice(None)] = True
    for bad in (float("nan"), float("inf"), 1e30):  # the last one's square is not finite
        y, _ = case.run(layer, batch().masked_fill(spoilt, bad))
        assert bad == 1e30 or not y[image, 2].isfinite().all()
        assert torch.equal(y[~reached], clean[~reached])
        for name, value in running_statistics(layer).items():
            kept = case.measures or name != "num_batches_tracked"
            assert torch.equal(value, before[name]) == kept, name


@cases()
def test_other_shapes_are_refused(case):
    for training in (True, False):
        layer, norm = (norm.train(training) for norm in (case.make(), torch_norm(case)))
        for channels in (1, CHANNELS - GROUPS, CHANNELS + 1, 2 * CHANNELS):
            x = torch.randn(2, channels, 3, 3)
            with pytest.raises((RuntimeError, ValueError), match="channels|elements"):
                case.run(layer, x)
            if case.options.get("affine", True):  # otherwise torch's norms may not notice
                with pytest.raises(RuntimeError):
                    norm(x)
        if case.is_group and case.is_head:  # GroupNorm, which takes them
            continue
        for shape in ((2, CHANNELS), (2, CHANNELS, 4), (2, CHANNELS, 3, 3, 3)):
            with pytest.raises(ValueError, match=rf"expected 4D input \(got {len(shape)}D input\)"):
                case.run(layer, torch.randn(shape))


@cases()
def test_one_value_per_channel(case):
    """Enough where there is a prior; without one it is BatchNorm's error."""
    layer, x = case.make(), batch(images=case.prior_rows, size=(1, 1))
    if case.is_head and not case.is_group:
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            case.run(layer, x)
    else:
        y, belief = case.run(layer, x)
        assert all(v.isfinite().all() for v in (y, *belief, *running_statistics(layer).values()))


@cases()
def test_a_prior_that_does_not_fit_is_a_sentence(case):
    layer, x = case.make(), batch()
    if case.is_head:
        with pytest.raises(ValueError, match="takes no prior"):
            layer(x, prior=Belief(torch.zeros(1, 2), torch.ones(1, 2)))
        return
    with pytest.raises(ValueError, match=r"a prior is a Belief\(mean, var\), not a tuple"):
        layer(x, prior=(torch.zeros(1, CHANNELS), torch.ones(1, CHANNELS)))
    for mean, var in ((CHANNELS + 1, CHANNELS + 1), (CHANNELS, 1)):
        with pytest.raises(ValueError, match=f"expected a prior about {CHANNELS} channels"):
            layer(x, prior=Belief(torch.zeros(1, mean), torch.ones(1, var)))
    with pytest.raises(ValueError, match="mean and var of one shape"):
        layer(x, prior=Belief(torch.zeros(1, CHANNELS), torch.ones(IMAGES, CHANNELS)))
    rows = IMAGES + 1
    with pytest.raises(ValueError, match=rf"a prior of {rows} rows does not fit \d+ (image|micro)"):
        layer(x, prior=Belief(torch.zeros(rows, CHANNELS), torch.ones(rows, CHANNELS)))


@cases(lambda case: not case.is_group)
def test_in_evaluation_a_prior_that_does_not_fit_is_a_sentence_too(case):
    layer, x = case.make().eval(), batch()
    with pytest.raises(ValueError, match=r"a prior is a Belief\(mean, var\), not a Tensor"):
        layer(x, prior=torch.zeros(1, CHANNELS))
    wrong = Belief(torch.zeros(1, CHANNELS + 1), torch.ones(1, CHANNELS + 1))
    with pytest.raises(ValueError, match="takes no prior|expected a prior about"):
        layer(x, prior=wrong)


@cases(
    lambda case: not (case.is_group or case.is_head or case.make().eval().needs_prior)
    and any(True for _ in case.make().parameters())
)
def test_a_layer_in_evaluation_mode_leaves_no_parameter_without_gradient(case):
    """As in a network that trains. DDP would stop at the step after a missing one."""
    layer, x, prior = case.make().eval(), batch(), case.prior()
    y, _ = layer(x, prior=prior)
    torch.testing.assert_close(y, layer(x))
    y.sum().backward()
    for name, parameter in layer.named_parameters():
        is_own = name in KN_STATE
        assert parameter.grad is not None and bool(parameter.grad.any()) != is_own, name
    with torch.no_grad():
        torch.testing.assert_close(layer(x, prior=prior)[0], y)


@cases(lambda case: case.options.get("affine", True))
def test_without_a_bias_it_is_0(case):
    """As torch's norms are that are built with bias=False."""
    layer, without, x = case.make(), case.make(), batch()
    with torch.no_grad():
        layer.bias.zero_()
    without.bias = None
    for training in (True, False):
        got, want = (n.train(training)(x, prior=case.prior()) for n in (without, layer))
        torch.testing.assert_close(got, want)
    without.train()(x, prior=case.prior())[0].square().sum().backward()
    layer.train()(x, prior=case.prior())[0].square().sum().backward()
    torch.testing.assert_close(without.weight.grad, layer.weight.grad)


@pytest.mark.parametrize("shape", [(3, CHANNELS), (3, CHANNELS, 5), (3, CHANNELS, 2, 3, 4)])
def test_a_head_of_groups_takes_what_group_norm_takes(shape):
    x = torch.randn(shape)
    head, plain = GroupKalmanNorm2d(GROUPS, CHANNELS, gain=None), nn.GroupNorm(GROUPS, CHANNELS)
    torch.testing.assert_close(head(x), plain(x))
    y, belief = head(x, prior=None)
    torch.testing.assert_close(y, plain(x))
    assert belief.mean.shape == (1, CHANNELS)
    with pytest.raises(ValueError, match="expected 4D input"):
        GroupKalmanNorm2d(GROUPS, CHANNELS)(x, prior=Belief(*torch.ones(2, 1, CHANNELS)))


@cases()
def test_the_input_may_be_given_by_name(case):
    layer, prior = case.make(), case.prior()
    with torch.no_grad():
        want, _ = layer.eval()(batch(), prior=prior)
        assert torch.equal(layer(input=batch(), prior=prior)[0], want)


@cases()
def test_in_a_chain_and_outside(case):
    """A chain gives a prior, or None to its head, and gets a belief too. Elsewhere there is only y."""
    layer, x = case.make(), batch()
    if not case.is_head:
        for arguments in ({}, dict(prior=None)):
            with pytest.raises(ValueError, match="needs prior="):
                layer(x, **arguments)
    else:
        assert torch.equal(layer(x), layer(x, prior=None)[0])
        with pytest.raises(ValueError, match="takes no prior"):
            layer(x, prior=Belief(torch.zeros(1, CHANNELS), torch.ones(1, CHANNELS)))
    layer.eval()
    if not layer.needs_prior:
        assert torch.equal(layer(x), layer(x, prior=None)[0])
