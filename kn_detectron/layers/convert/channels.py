"""Rules for operations that split, select, reorder and join channels; see :mod:`.rules`."""

import math
from typing import Any, Optional, Sequence, Tuple

from .about import NO_FEATURE_MAP, About, End

__all__ = [
    "cat",
    "channel_shuffle",
    "channel_shuffle_module",
    "chunk",
    "flatten",
    "getitem",
    "narrow",
    "numbers",
    "one_channel_dimension",
    "permute",
    "split",
    "transpose",
    "unsqueeze",
    "view",
]


def one_channel_dimension(about: About) -> int:
    """The number of channels of a feature, whose channels must not be split into groups."""
    if len(about.channels) != 1:
        raise End("the channels are split into groups")
    return about.channels[0]


def _channel_dim(dim: Any, about: About, what: str) -> None:
    if not isinstance(dim, int) or dim % (len(about.channels) + 3) != 1 or len(about.channels) != 1:
        raise End(f"it {what} along another dimension than the channels")


def cat(walk, tensors: Sequence, dim=0) -> About:
    given = tensors if isinstance(tensors, (tuple, list)) else [tensors]
    abouts = walk.pieces(tensors) or [walk.about(x) for x in given]
    _channel_dim(dim, abouts[0], "concatenates")
    channels = sum(one_channel_dimension(about) for about in abouts)
    return walk.make([channels], "cat", [walk.belief(about) for about in abouts])


def split(walk, x, split_size_or_sections, dim=0) -> Tuple[About, ...]:
    about = walk.about(x)
    _channel_dim(dim, about, "splits")
    sizes = numbers(walk, split_size_or_sections)
    if len(sizes) == 1 and sizes[0] is not None:
        size = sizes[0]
        sizes = [min(size, about.channels[0] - i) for i in range(0, about.channels[0], size)]
    if None in sizes or sum(sizes) != about.channels[0]:
        raise End("it splits into parts of unknown sizes")
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(_slice(walk, about, i, i + size) for i, size in zip(starts, sizes))


def chunk(walk, x, chunks, dim=0) -> Tuple[About, ...]:
    channels = one_channel_dimension(walk.about(x))
    return split(walk, x, -(-channels // _number(walk, chunks)), dim)


def _slice(walk, about: About, start: int, stop: int) -> About:
    index = slice(None), slice(start, stop)
    return walk.make([stop - start], "index", walk.belief(about), index)


def narrow(walk, x, dim, start, length) -> About:
    about = walk.about(x)
    _channel_dim(dim, about, "cuts")
    start, length = numbers(walk, (start, length))
    if start is None or length is None:
        raise End("it cuts at an index that is computed")
    if start < 0:
        start += about.channels[0]
    return _slice(walk, about, start, start + length)


def getitem(walk, x, index) -> About:
    pieces = walk.pieces(x)
    if pieces is not None:
        return pieces[index]
    about = walk.about(x)
    index = index if isinstance(index, tuple) else (index,)
    if index and index[0] is Ellipsis:  # the last dimensions
        index = (slice(None),) * (len(about.channels) + 4 - len(index)) + index[1:]
    index = tuple(_bounds(walk, i) for i in index)
    inside, positions = index[: 1 + len(about.channels)], index[1 + len(about.channels) :]
    if not inside or inside[0] != slice(None) or not all(isinstance(i, slice) for i in positions):
        raise End("it takes images or positions out of a batch")
    if all(i == slice(None) for i in inside):  # cropped
        return about
    if not all(isinstance(i, (int, slice)) for i in inside):
        raise End("it takes channels by an index that is computed")
    channels = [
        len(range(n)[i]) for n, i in zip(about.channels, inside[1:]) if isinstance(i, slice)
    ]
    channels += about.channels[len(inside) - 1 :]
    return walk.make(channels, "index", walk.belief(about), inside)


def _bounds(walk, index: Any) -> Any:
    if isinstance(index, slice):
        bounds = (index.start, index.stop, index.step)
        known = [walk.size(bound) for bound in bounds]
        if any(k is None and b is not None for k, b in zip(known, bounds)):
            raise End("it takes channels or positions by bounds that are computed")
        return slice(*known)
    return walk.size(index)


def numbers(walk, values: Any) -> Tuple[Optional[int], ...]:
    """One or several sizes or dimensions, with None for each that is not known."""
    return tuple(walk.size(value) for value in _several(walk, values))


def _several(walk, values: Any) -> Sequence:
    """One or several arguments as a sequence."""
    if not isinstance(values, (tuple, list)):
        values = walk.size(values)  # a tuple, if it is x.shape
    return values if isinstance(values, (tuple, list)) else (values,)


def _number(walk, value: Any) -> int:
    number = walk.size(value)
    if not isinstance(number, int):
        raise End("it takes a number that is computed")
    return number


def view(walk, x, *sizes, shape=None, size=None) -> About:
    """Splits the channels into groups or merges them: (N, ..., H, W) before and after."""
    about = walk.about(x)
    sizes = shape or size or (sizes[0] if len(sizes) == 1 else sizes)
    given = _several(walk, sizes)
    sizes = numbers(walk, given)
    channels = sizes[1:-2]
    number = math.prod(about.channels)
    # With another number of images, some of the channels have become images.
    if channels.count(-1) == 1 and None not in channels and walk.is_batch_size(given[0]):
        rest = -math.prod(channels)
        channels = tuple(number // rest if size == -1 else size for size in channels)
    if len(sizes) < 3 or None in channels or math.prod(channels) != number:
        raise End(NO_FEATURE_MAP)
    return walk.make(channels, "reshape", walk.belief(about), channels)


def unsqueeze(walk, x, dim) -> About:
    about, dim = walk.about(x), _number(walk, dim)
    if not 1 <= dim <= len(about.channels) + 1:
        raise End(NO_FEATURE_MAP)
    channels = (*about.channels[: dim - 1], 1, *about.channels[dim - 1 :])
    return walk.make(channels, "reshape", walk.belief(about), channels)


def flatten(walk, x, start_dim=0, end_dim=-1) -> About:
    about = walk.about(x)
    rank = len(about.channels) + 3
    start, end = (_number(walk, dim) % rank for dim in (start_dim, end_dim))
    if start < 1 or end > len(about.channels):
        raise End(NO_FEATURE_MAP)
    merged = math.prod(about.channels[start - 1 : end])
    channels = (*about.channels[: start - 1], merged, *about.channels[end:])
    return walk.make(channels, "reshape", walk.belief(about), channels)


def permute(walk, x, *order, dims=None) -> About:
    about = walk.about(x)
    order = numbers(walk, dims or (order[0] if len(order) == 1 else order))
    rank = len(about.channels) + 3
    if None in order or len(order) != rank:
        raise End("the order of its dimensions is computed")
    order = [d % rank for d in order]
    if order[0] != 0 or order[-2:] != [rank - 2, rank - 1]:
        raise End(NO_FEATURE_MAP)
    channels = [about.channels[d - 1] for d in order[1:-2]]
    return walk.make(channels, "permute", walk.belief(about), order[:-2])


def transpose(walk, x, dim0, dim1) -> About:
    rank = len(walk.about(x).channels) + 3
    order = list(range(rank))
    dim0, dim1 = _number(walk, dim0), _number(walk, dim1)
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return permute(walk, x, order)


def channel_shuffle(walk, x, groups) -> About:
    about = walk.about(x)
    channels, groups = one_channel_dimension(about), _number(walk, groups)
    shape = groups, channels // groups
    grouped = walk.make(shape, "reshape", walk.belief(about), shape)
    turned = walk.make(shape[::-1], "permute", grouped.belief, (0, 2, 1))
    return walk.make([channels], "reshape", turned.belief, (channels,))


def channel_shuffle_module(walk, module, x) -> About:
    return channel_shuffle(walk, x, module.groups)
