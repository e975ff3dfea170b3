"""The prior behind each operation against features that went through the operation itself."""

import copy
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import StochasticDepth

from kn_detectron.layers import Belief, MonteCarloTransition, convert_kalman_norm

from ..test_belief import assert_within_sampling_error, sample

CHANNELS = 8


class Call(nn.Module):
    """A function as a module; one of two arguments gets the module for its tensors."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.factor = nn.Parameter(torch.randn(CHANNELS, 1, 1))
        self.weight = nn.Parameter(torch.randn(CHANNELS, 2, 3, 3))
        self.register_buffer("offset", torch.randn(CHANNELS))
        self.register_buffer("blur", torch.rand(1, 1, 3, 3))

    def forward(self, x):
        own = (self,) if self.function.__code__.co_argcount == 2 else ()
        return self.function(*own, x)


class Between(nn.Module):
    """Two normalised convolutions with an operation between them."""

    def __init__(self, operation):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, CHANNELS, 3, bias=False), nn.BatchNorm2d(CHANNELS)
        operation = operation if isinstance(operation, nn.Module) else Call(operation)
        self.operation = copy.deepcopy(operation).float()  # other tests have it too
        with torch.no_grad():
            channels = self.operation(torch.zeros(2, CHANNELS, 12, 12)).shape[1]
        # One channel each: the features that it gets need not be independent.
        self.conv2 = nn.Conv2d(channels, channels, 1, groups=channels)
        self.norm2 = nn.BatchNorm2d(channels)
        nn.init.uniform_(self.norm1.weight, 0.5, 1.5)
        nn.init.uniform_(self.norm1.bias, -1.0, 1.0)
        self.double()

    def forward(self, x):
        return self.norm2(self.conv2(self.operation(self.norm1(self.conv1(x)))))


def images(n=2, size=12):
    return torch.randn(n, 3, size, size, dtype=torch.float64)


def prior_of(network, name="norm2"):
    """What a norm of a converted network is given as its prior."""
    priors = []
    handle = network.get_submodule(name).register_forward_pre_hook(
        lambda layer, args, kwargs: priors.append(kwargs["prior"]), with_kwargs=True
    )
    with torch.no_grad():
        network.train()(images())
    handle.remove()
    return priors[0]


def shuffled(x):
    n, c, h, w = x.size()
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


def halves(x):
    first, second = x.chunk(2, dim=1)
    return torch.cat((first.relu(), second * 0.5), dim=1)


def half_plus_half(x):
    half = x.shape[1] // 2
    return x[:, :half] + x[:, half:]


def in_place_under_another_name(x):
    y = x
    F.relu_(x)
    y += 1
    return x


def sizes_in_place(x):
    channels = half = x.shape[1]
    half -= 4
    return x[:, half:channels]


def sizes_divided_in_place(x):
    half = x.shape[1]
    half //= 2
    return x[:, half:]


def in_place_by_name(x):
    y = x
    F.relu(input=x, inplace=True)
    return y


def shuffled_by_name(x):
    n, c, h, w = (x.size(dim=i) for i in range(4))
    x = x.reshape(shape=(n, 2, c // 2, h, w)).permute(dims=(0, 2, 1, 3, 4))
    return torch.reshape(input=x, shape=(n, c, h, w))


class ByName(nn.Module):
    """Gives a module its input by name."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(input=x)


EXACT = {
    "relu module": nn.ReLU(inplace=True),
    "relu function": lambda x: F.relu(x, inplace=True),
    "relu method": lambda x: x.relu_(),
    "clamp": lambda x: x.clamp(-0.5, 1.5),
    "clamp from below": lambda x: torch.clamp(x, min=0.2),
    "clamp from above": lambda x: x.clamp(max=0.3),
    "hardtanh with one bound": nn.Hardtanh(-0.3, float("inf")),
    "silu": lambda x: F.silu(x, inplace=True),
    "leaky relu": lambda x: F.leaky_relu(x, negative_slope=0.3),
    "elu": nn.ELU(0.7, inplace=True),
    "hardtanh": lambda x: F.hardtanh(x, -0.3, max_val=0.8),
    "convolution": nn.Conv2d(CHANNELS, CHANNELS, 3),
    "depthwise convolution": nn.Conv2d(CHANNELS, CHANNELS, 3, groups=CHANNELS),
    "grouped, dilated convolution": nn.Conv2d(CHANNELS, CHANNELS, 3, 2, dilation=2, groups=4),
    "convolution function": lambda self, x: F.conv2d(x, self.weight, groups=4),
    "standardised weights": lambda self, x: F.conv2d(
        x, (self.weight - self.weight.mean()) / self.weight.std(), stride=2, groups=4
    ),
    "numbers": lambda x: (2 * x / 3 + 0.5) - 0.25,
    "negative": lambda x: 1.0 - (-x),
    "in-place arithmetic": lambda x: x.add_(1).mul_(0.3),
    "torch arithmetic": lambda x: torch.sub(torch.mul(x, 0.1), 0.2),
    "a factor and an offset per channel": lambda self, x: x * self.factor + self.factor,
    "an offset and a divisor per channel": lambda self, x: (x - self.factor) / self.factor.exp(),
    "buffers": lambda self, x: (x - self.offset.view(1, -1, 1, 1))
    / self.offset.exp()[:, None, None],
    "a fixed filter": lambda self, x: F.conv2d(
        x, self.blur.repeat(CHANNELS, 1, 1, 1), groups=self.offset.shape[0]
    ),
    "a filter for each channel": lambda self, x: F.conv2d(
        x, self.blur.repeat(CHANNELS, 1, 1, 1), groups=x.shape[1]
    ),
    "sum with itself": lambda x: x + x,
    "sum of independent features": half_plus_half,
    "product of independent features": lambda x: x[:, :4] * x[:, 4:].sigmoid(),
    "channels of zeros": lambda x: F.pad(x[:, :4], (0, 0, 0, 0, 0, 4))
    + F.pad(x[:, 4:], (0, 0, 0, 0, 4, 0)),
    "chunks": halves,
    "uneven chunks": lambda x: torch.cat(x.chunk(3, 1)[::-1], 1),
    "as many chunks as there are channels": lambda x: torch.cat(x.chunk(x.shape[1], 1)[::-1], 1),
    "split": lambda x: torch.cat(x.split([3, 5], 1)[::-1], 1),
    "equal split": lambda x: torch.cat(torch.split(x, 3, dim=1)[::-1], 1),
    "narrow": lambda x: x.narrow(1, 2, 4),
    "narrow from the end": lambda x: x.narrow(1, -4, 4),
    "every second channel": lambda x: x[:, 1::2],
    "single channels": lambda x: torch.cat([x[:, i].unsqueeze(1) for i in (5, 2)], 1),
    "shuffle by hand": shuffled,
    "shuffle module": nn.ChannelShuffle(4),
    "dimensions counted from the rank": lambda x: x.unsqueeze(x.dim() - 2).flatten(x.dim() - 3, 2),
    "the shape that it has": lambda x: x.view(x.shape),
    "that shape but for the channels": lambda x: x.view(x.shape[:1] + (-1,) + x.shape[2:]),
    "groups and back": lambda x: x.view(x.size(0), 4, -1, x.size(2), x.size(3)).flatten(1, 2),
    "in place under another name": in_place_under_another_name,
    "sizes change in place too": sizes_in_place,
    "sizes are divided in place": sizes_divided_in_place,
    "crop": lambda x: x[..., 1:-1, 1:-1],
    "dtype": lambda x: x.float().double(),
    # Arguments by name, as torch takes them.
    "relu by name": lambda x: F.relu(input=x, inplace=True) + 1,
    "in place by name": in_place_by_name,
    "convolution by name": lambda self, x: F.conv2d(input=x, weight=self.weight, groups=4),
    "convolution module by name": ByName(nn.Conv2d(CHANNELS, CHANNELS, 3)),
    "chunks by name": lambda x: torch.cat(
        tensors=torch.chunk(input=x, chunks=2, dim=1)[::-1], axis=1
    ),
    "split by name": lambda x: torch.cat(torch.split(tensor=x, split_size_or_sections=3, dim=1), 1),
    "split method by name": lambda x: torch.cat(x.split(split_size=3, dim=1), dim=1),
    "shuffle by name": shuffled_by_name,
    "arithmetic by name": lambda x: torch.div(
        input=torch.sub(torch.mul(input=x, other=0.1), other=0.2, alpha=1), other=2
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_priors_against_monte_carlo(name):
    network = Between(EXACT[name])
    norm = network.norm1
    about = Belief(norm.bias.detach()[None], norm.weight.detach().square()[None])
    with torch.no_grad():
        # Not each pixel, since outputs that share inputs are dependent.
        y = network.conv2(network.operation(sample(about, 8, 200, 200)))[:, :, ::5, ::5]
    prior = prior_of(convert_kalman_norm(network))
    assert_within_sampling_error(prior, y)


@pytest.mark.parametrize("name", EXACT)
def test_sampled_priors_are_near_those_in_closed_form(name):
    network = Between(EXACT[name])
    want = prior_of(convert_kalman_norm(copy.deepcopy(network)))
    got = prior_of(convert_kalman_norm(network, transition=MonteCarloTransition(64)))
    assert ((got.mean - want.mean).abs() < 0.2 * want.var.sqrt()).all()
    assert (0.7 * want.var < got.var).all() and (got.var < 1.4 * want.var).all()
    assert not torch.equal(got.var, want.var)


@pytest.mark.parametrize("name", EXACT)
def test_behind_group_norm_each_image_has_its_prior(name):
    network = Between(EXACT[name])
    channels = network.norm2.num_features
    network.norm1 = nn.GroupNorm(2, CHANNELS).double()
    mixed = convert_kalman_norm(copy.deepcopy(network))
    network.norm2 = nn.GroupNorm(1, channels).double()
    torch.manual_seed(0)
    prior = prior_of(convert_kalman_norm(network))
    assert prior.mean.shape == prior.var.shape == (2, channels)
    assert not torch.equal(prior.var[0], prior.var[1])
    # And BatchNorm behind it that of all of them.
    torch.manual_seed(0)
    one = prior_of(mixed)
    torch.testing.assert_close(one.mean, prior.mean.mean(0, keepdim=True))
    between = prior.mean.var(0, unbiased=False)
    torch.testing.assert_close(one.var, (prior.var.mean(0) + between)[None])


def test_the_prior_of_the_first_norm_is_about_the_images():
    network = Between(nn.ReLU())
    mean, std = (0.3, -0.2, 0.0), (1.0, 0.5, 2.0)
    about = Belief(torch.tensor([mean]).double(), torch.tensor([std]).double().square())
    with torch.no_grad():
        y = network.conv1(sample(about, 8, 200, 200))[:, :, ::5, ::5]
    kalman = convert_kalman_norm(network, image_mean=mean, image_std=std)
    assert_within_sampling_error(prior_of(kalman, "norm1"), y)


# What is documented to leave a belief as it is.
IDENTITIES = {
    "max-pool": nn.MaxPool2d(3, 2),
    "max-pool function": lambda x: F.max_pool2d(x, 2),
    "average pool": nn.AvgPool2d(2),
    "average pool function": lambda x: F.avg_pool2d(x, 2),
    "pool to one pixel": lambda x: F.adaptive_avg_pool2d(x, 1),
    "mean": lambda x: x.mean((2, 3), keepdim=True),
    "interpolation": lambda x: F.interpolate(x, scale_factor=2),
    "upsampling": nn.Upsample(scale_factor=2, mode="bilinear"),
    "dropout": nn.Dropout2d(0.5),
    "stochastic depth": StochasticDepth(0.5, "row"),
    "padding": lambda x: F.pad(x, (1, 1, 1, 1)),
    "padding module": nn.ZeroPad2d(1),
    "identity": nn.Identity(),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_what_leaves_a_belief_as_it_is(name):
    network, plain = Between(IDENTITIES[name]), Between(nn.Identity())
    plain.load_state_dict(network.state_dict(), strict=False)
    for got, want in zip(*(prior_of(convert_kalman_norm(n)) for n in (network, plain))):
        assert torch.equal(got, want)


def test_functional_dropout_knows_the_mode():
    network = convert_kalman_norm(Between(Drop()))
    x = images()
    with torch.no_grad():
        assert torch.equal(network.eval()(x), network(x))
        assert not torch.equal(network.train()(x), network(x))


class Drop(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, self.training)


# Ends.


class Gate(nn.Module):
    """Attention to channels."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Conv2d(CHANNELS, CHANNELS, 1)

    def forward(self, x):
        gate = self.fc(x.mean((2, 3), keepdim=True))
        gate = gate.softmax(1)
        return x * gate


class Opaque(nn.Module):
    """Cannot be traced, and has no norm."""

    def forward(self, x):
        return x + 1 if x.sum() > 0 else x


def keeps_an_old_name(x):
    part = x[:, :4]
    part.relu_()
    return x


class Doubling(nn.ReLU):
    """Has a rule as a ReLU, but does more, in a way that cannot be traced."""

    def forward(self, x):
        return super().forward(x) * (2 if x.sum() > -1 else 2)


ENDS = {
    "it is the product of a feature with itself": lambda x: x * x,
    "it adds features of different numbers": lambda x: x + x[:, :1],
    "its output is no feature map (": lambda x: x * x.mean(1, keepdim=True).sigmoid(),
    "there is no rule for it (at operation": lambda x: torch.cat(x.unsqueeze(1).unbind(1), 1),
    "it takes a number that is computed": lambda x: torch.cat(x.chunk(x.shape[2] // 6, 1), 1),
    "its output is no feature map (at": lambda x: x.view(
        x.shape[0], -1, x.shape[2] // 2, 2, x.shape[3] // 2, 2
    ).mean((3, 5)),
    "it multiplies features of different numbers of channels": lambda x: x * x[:, :1],
    "there is no rule for it (": Gate(),
    "there is no rule for it": Opaque(),
    "it concatenates along another dimension": lambda x: torch.cat([x, x], 0),
    "it pads channels with values other than 0": lambda x: F.pad(x, (0, 0, 0, 0, 0, 2), value=1.0),
    "its weights depend on the images": lambda self, x: F.conv2d(
        x, self.weight * x.mean(), groups=4
    ),
    "its output is no feature map": lambda x: x.flatten(2).unflatten(2, x.shape[2:]),
    # As in attention by groups, which become images.
    "its output is no feature": lambda x: x.reshape(x.shape[0] * 2, -1, x.shape[2], x.shape[3]),
    "its output is no": lambda x: x.reshape(-1).view(x.shape),
    "its output is": lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2),
    "it takes images or positions out of a batch": lambda x: x[:1],
    "there is no rule for bounds that are computed": lambda x: x.clamp(max=x.shape[2] ** -0.5),
    "there is no rule for a weighted sum": lambda x: torch.add(x, x, alpha=2),
    "there is no rule for a weighted difference": lambda x: torch.sub(x, x, alpha=2),
    "it takes an argument that is no feature": lambda x: x * x.shape[1] ** -0.5,
    "there is no rule for rounding": lambda x: torch.div(x, 2, rounding_mode="floor"),
    "there is no rule for these arguments": lambda x: torch.mul(x, 2, out=None),
    "it was changed in place under another name": keeps_an_old_name,
    "it is a ReLU with a forward function": Doubling(),
}


class Aliased(nn.Module):
    """Changes its input under another name."""

    def __init__(self, alias):
        super().__init__()
        self.alias = alias

    def forward(self, x):
        self.alias(x).mul_(10.0)
        return x


@pytest.mark.parametrize(
    "alias",
    [
        lambda x: x.type_as(x),
        lambda x: x.detach(),
        lambda x: x.expand(-1, -1, -1, -1),
        StochasticDepth(0.0, "row"),
    ],
)
def test_what_may_be_the_very_feature_is_taken_for_it(alias, caplog):
    """It was changed in place under the other name, so the belief about it is gone."""
    network = convert_kalman_norm(Between(Aliased(alias)))
    assert "it was changed in place under another name" in caplog.text
    assert network.norm2.is_head


@pytest.mark.parametrize("why", ENDS)
def test_at_an_end_there_is_a_warning_and_the_next_norm_is_a_head(why, caplog):
    network = convert_kalman_norm(Between(ENDS[why]))
    assert why in caplog.text and "1 of the 2 norms" in caplog.text
    assert network.norm2.is_head and not network.norm1.is_head
    assert prior_of(network) is None
    network(images()).square().sum().backward()
    assert all(p.grad is not None for p in network.norm2.parameters())


COMBINED = [operator.add, operator.sub, operator.mul, operator.truediv, lambda x, v: v - x]


class Positions(nn.Module):
    """Combines features of 8 x 8 pixels with a value for each position."""

    def __init__(self, combine, *shape):
        super().__init__()
        self.values, self.combine = nn.Parameter(torch.rand(shape)), combine

    def forward(self, x):
        return self.combine(F.adaptive_avg_pool2d(x, 8), self.values)


@pytest.mark.parametrize("shape", [(1, CHANNELS, 8, 8), (8, 8), (8,)])
@pytest.mark.parametrize("combine", COMBINED)
def test_a_constant_that_differs_from_position_to_position_ends_the_chain(combine, shape, caplog):
    with torch.no_grad():
        operation = Positions(combine, *shape)
        network = nn.Sequential(
            *(nn.Conv2d(3, CHANNELS, 3), nn.BatchNorm2d(CHANNELS)),
            *(operation, nn.Conv2d(CHANNELS, 3, 1), nn.BatchNorm2d(3)),
        )
    converted = convert_kalman_norm(network)
    assert "differs from position to position" in caplog.text
    assert converted.get_submodule("4").is_head and not converted.get_submodule("1").is_head


@pytest.mark.parametrize("combine", COMBINED)
def test_a_constant_that_makes_more_channels_ends_the_chain(combine, caplog):
    with torch.no_grad():
        network = nn.Sequential(
            *(nn.Conv2d(3, 1, 3), nn.BatchNorm2d(1), Positions(combine, CHANNELS, 1, 1)),
            *(nn.Conv2d(CHANNELS, 3, 1), nn.BatchNorm2d(3)),
        )
    converted = convert_kalman_norm(network)
    assert "its constant makes more channels" in caplog.text
    assert converted.get_submodule("4").is_head and not converted.get_submodule("1").is_head


def test_the_warning_names_module_and_line_once(caplog):
    three = [
        Between(Gate()),
        *(nn.Sequential(nn.Conv2d(CHANNELS, 3, 1), Between(Gate())) for _ in "ab"),
    ]
    convert_kalman_norm(nn.Sequential(*three).double())
    (record,) = caplog.records
    message = record.getMessage()
    assert message.count("softmax in Gate") == 1 and "(at 0.operation and 2 more)" in message
    line = int(message.split(f"{__file__}:")[1].split(":")[0])
    with open(__file__) as file:
        assert file.read().splitlines()[line - 1].strip() == "gate = gate.softmax(1)"


def test_what_comes_behind_the_last_norm_ends_no_chain(caplog):
    convert_kalman_norm(
        nn.Sequential(Between(nn.ReLU()), nn.Flatten(), nn.Linear(CHANNELS, 2)).double()
    )
    assert not caplog.records


def test_a_chain_goes_on_behind_a_head():
    end = nn.Sequential(
        Between(Gate()), nn.SiLU(), nn.Conv2d(CHANNELS, 4, 1), nn.BatchNorm2d(4)
    ).double()
    network = convert_kalman_norm(end)
    assert network.get_submodule("0.norm2").is_head
    want = prior_of(network, "3")
    # Also where the head does not measure.
    network.get_submodule("0.norm2").eval()
    with torch.no_grad():
        network.get_submodule("3").register_forward_pre_hook(
            lambda layer, args, kwargs: torch.testing.assert_close(kwargs["prior"], want),
            with_kwargs=True,
        )
        network.train()
        network.get_submodule("0.norm2").eval()
        network(images())
