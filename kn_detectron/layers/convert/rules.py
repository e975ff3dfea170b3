"""Rules: they derive what is known about the output of a node from what is known about its inputs.

For a function or method a rule is ``rule(walk, *args, **kwargs)``, with a :class:`~.walk.Walk` and
the arguments of the node. For a module it is ``rule(walk, module, x)``. It returns an
:class:`~.about.About` or a tuple of them, or raises an :class:`~.about.End` that says why it
cannot. The arguments behind the first have torch's names. The rules for channels are in
:mod:`.channels`. The tables of rules are at the end of this file. The arithmetic of beliefs is in
:class:`~.chain.Chain`.
"""

import math
import operator
from typing import Any, Callable, Dict, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from ..activations import ACTIVATIONS, Activation
from ..introspection import forward_of
from . import channels as on_channels
from .about import NO_FEATURE_MAP, About, End

__all__ = ["find_rule", "is_ruled"]

# Operations that leave the belief as it is, or nearly so.


def _same(walk, x, *args, **kwargs) -> About:
    """Pooling, interpolation and padding (see belief.max_pool2d), dropout, changes of dtype."""
    return walk.about(x)


def _same_module(walk, module, x) -> About:
    return walk.about(x)


def _pad(walk, x, pad, mode="constant", value=None) -> About:
    about = walk.about(x)
    channels, more = on_channels.numbers(walk, pad)[4:6], pad[6:]
    if not any(channels):
        return about
    known = None not in channels and mode == "constant" and not value
    if more or not known or len(about.channels) != 1:
        raise End("it pads channels with values other than 0")
    return walk.make([about.channels[0] + sum(channels)], "pad", walk.belief(about), channels)


def _mean(walk, x, dim=None, keepdim=False, **kwargs) -> About:
    """Average pooling over all positions, if the dimensions are kept."""
    about = walk.about(x)
    rank = len(about.channels) + 3
    dims = on_channels.numbers(walk, dim)
    if not keepdim or None in dims or not {d % rank for d in dims} <= {rank - 2, rank - 1}:
        raise End(NO_FEATURE_MAP)
    return about


# Activations.


def _activation(name: str, activation: Activation) -> Callable:
    def rule(walk, x, *args, **kwargs) -> About:
        parameters = dict(zip(activation.parameters, args))
        parameters.update((k, v) for k, v in kwargs.items() if k in activation.parameters)
        values = {**activation.parameters, **parameters}.values()
        if not all(isinstance(value, (int, float, str)) for value in values):
            raise End("its parameters are computed")
        return walk.activated(walk.about(x), name, *values)

    return rule


def _activation_module(name: str, activation: Activation) -> Callable:
    def rule(walk, module, x) -> About:
        values = [getattr(module, parameter) for parameter in activation.parameters]
        return walk.activated(walk.about(x), name, *values)

    return rule


def _clamp(walk, x, min=None, max=None) -> About:
    low, high = -math.inf if min is None else min, math.inf if max is None else max
    if not (isinstance(low, (int, float)) and isinstance(high, (int, float))):
        raise End("there is no rule for bounds that are computed")
    return walk.activated(walk.about(x), "hardtanh", float(low), float(high))


# Convolutions.


def _conv_module(walk, module: nn.Conv2d, x) -> About:
    walk.check_channels(walk.about(x), module.in_channels)
    return walk.convolved(x, module.out_channels)


def _conv2d(walk, x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> About:
    about = walk.about(x)
    if not walk.is_constant(weight):
        raise End("its weights depend on the images")
    groups = walk.constant(groups) if walk.is_constant(groups) else walk.size(groups)
    if groups is None:
        raise End("its groups depend on the images")
    channels, per_group = walk.constant(weight).shape[:2]
    walk.check_channels(about, per_group * groups)
    return walk.convolved(x, channels, weight, bias, stride, padding, dilation, groups)


# Arithmetic.


def _add(walk, x, other, alpha=1) -> About:
    if alpha != 1:
        raise End("there is no rule for a weighted sum")
    if walk.is_constant(x):
        x, other = other, x
    about = walk.about(x)
    if walk.is_constant(other):
        return _by_constant(walk, "shift", about, other)
    return _sum(walk, about, walk.about(other))


def _subtract(walk, x, other, alpha=1) -> About:
    if alpha != 1:
        raise End("there is no rule for a weighted difference")
    if walk.is_constant(x):
        return _by_constant(walk, "shift", _negate(walk, other), x)
    about = walk.about(x)
    if walk.is_constant(other):
        return _by_constant(walk, "subtract", about, other)
    return _sum(walk, about, _negate(walk, other))


def _by_constant(walk, method: str, about: About, x) -> About:
    """A feature that is shifted or scaled by a constant."""
    constant = walk.constant(x)
    if isinstance(constant, Tensor):
        # A belief is about a pixel anywhere in the image.
        if any(size != 1 for size in constant.shape[-2:]):
            raise End("its constant differs from position to position")
        channels = zip(constant.shape[-3::-1], about.channels[::-1])
        if any(size not in (1, known) for size, known in channels):
            raise End("its constant makes more channels of the feature")
    return walk.make(about.channels, method, walk.belief(about), x)


def _sum(walk, a: About, b: About) -> About:
    if a.channels != b.channels:
        raise End("it adds features of different numbers of channels")
    if a is b:
        return walk.make(a.channels, "scale", walk.belief(a), 2)
    return walk.make(a.channels, "add", walk.belief(a), walk.belief(b))


def _negate(walk, x) -> About:
    about = walk.about(x)
    return walk.make(about.channels, "scale", walk.belief(about), -1)


def _multiply(walk, x, other) -> About:
    if walk.is_constant(x):
        x, other = other, x
    about = walk.about(x)
    if walk.is_constant(other):
        return _by_constant(walk, "scale", about, other)
    # As in squeeze and excitation. Both may have other sizes in height and width.
    gate = walk.about(other)
    if about is gate:
        raise End("it is the product of a feature with itself")
    if about.channels != gate.channels:
        raise End("it multiplies features of different numbers of channels")
    return walk.make(about.channels, "product", walk.belief(about), walk.belief(gate))


def _divide(walk, x, other, rounding_mode=None) -> About:
    about = walk.about(x)
    if rounding_mode is not None:
        raise End("there is no rule for rounding")
    if not walk.is_constant(other):
        raise End("it divides by a value that is computed")
    return _by_constant(walk, "divide", about, other)


# The tables.

_SAME_MODULES = (
    nn.Identity,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.Dropout,
    nn.Dropout2d,
    nn.Upsample,  # and its two subclasses
    nn.ConstantPad2d,  # and ZeroPad2d
    nn.ReflectionPad2d,
    nn.ReplicationPad2d,
    StochasticDepth,
)

# By class. The rule of the nearest base class counts, if the module has its forward function.
_MODULES: Dict[type, Callable] = {
    **dict.fromkeys(_SAME_MODULES, _same_module),
    **{a.module: _activation_module(name, a) for name, a in ACTIVATIONS.items()},
    nn.Conv2d: _conv_module,
    nn.ChannelShuffle: on_channels.channel_shuffle_module,
}

# By the name of the class, since timm is optional. Those with "Same" pad as TensorFlow does.
_MODULES_BY_NAME: Dict[str, Callable] = {
    "DropPath": _same_module,
    "AvgPool2dSame": _same_module,
    "MaxPool2dSame": _same_module,
    "Conv2dSame": _conv_module,
    "Conv2dSameExport": _conv_module,
}

# By the name in torch, torch.nn.functional and torch.Tensor, with and without a final "_".
_BY_NAME: Dict[str, Callable] = {
    **{name: _activation(name, activation) for name, activation in ACTIVATIONS.items()},
    **dict.fromkeys(("adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool2d"), _same),
    **dict.fromkeys(("max_pool2d", "dropout", "dropout2d", "interpolate", "upsample"), _same),
    **dict.fromkeys(("contiguous", "clone", "to", "type_as"), _same),
    **dict.fromkeys(("float", "half", "bfloat16", "double"), _same),
    "pad": _pad,
    "mean": _mean,
    "clamp": _clamp,
    "clip": _clamp,
    "conv2d": _conv2d,
    "add": _add,
    "sub": _subtract,
    "neg": _negate,
    "mul": _multiply,
    "div": _divide,
    "cat": on_channels.cat,
    "concat": on_channels.cat,
    "split": on_channels.split,
    "chunk": on_channels.chunk,
    "narrow": on_channels.narrow,
    "view": on_channels.view,
    "reshape": on_channels.view,
    "unsqueeze": on_channels.unsqueeze,
    "flatten": on_channels.flatten,
    "permute": on_channels.permute,
    "transpose": on_channels.transpose,
    "channel_shuffle": on_channels.channel_shuffle,
}

_NAMESPACES = (torch, F)
_FUNCTIONS: Dict[Callable, Callable] = {
    getattr(space, variant): rule
    for name, rule in _BY_NAME.items()
    for space in _NAMESPACES
    for variant in (name, f"{name}_")
    if hasattr(space, variant)
}
_FUNCTIONS.update(
    {
        operator.add: _add,
        operator.iadd: _add,
        operator.sub: _subtract,
        operator.isub: _subtract,
        operator.neg: _negate,
        operator.mul: _multiply,
        operator.imul: _multiply,
        operator.truediv: _divide,
        operator.itruediv: _divide,
        operator.getitem: on_channels.getitem,
    }
)


def find_rule(op: str, target: Any) -> Optional[Callable]:
    """The rule for a node, or None.

    Args:
        op: the node's op.
        target: the function, the name of the method, or the module itself.
    """
    if op == "call_function":
        return _FUNCTIONS.get(target)
    if op == "call_method":
        return _BY_NAME.get(target.rstrip("_"))
    if type(target).__name__ in _MODULES_BY_NAME:
        return _MODULES_BY_NAME[type(target).__name__]
    for base in type(target).__mro__:
        if base in _MODULES:
            same = forward_of(target) is base.forward
            return _MODULES[base] if same else _changed(base)
    return None


def _changed(base: type) -> Callable:
    def rule(walk, *args, **kwargs):
        raise End(f"it is a {base.__name__} with a forward function of its own")

    return rule


def is_ruled(module_class: type) -> bool:
    """Whether there is a rule for this very class of modules. A rule for its base class does not
    count, since a subclass may do more."""
    return module_class in _MODULES or module_class.__name__ in _MODULES_BY_NAME
