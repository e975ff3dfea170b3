"""Reading the architecture of a ResNet off its tensors."""

from typing import Dict, List

from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock, ResNet
from torch import Tensor, nn

from ..modeling import ChainConfig, KNBasicBlock, KNBasicStem, KNBottleneckBlock, KNResNet

__all__ = ["resnet_of"]

_PLAIN_NORMS = {"BN": nn.BatchNorm2d, "GN": lambda channels: nn.GroupNorm(1, channels)}


def resnet_of(tensors: Dict[str, Tensor], norm: str, variant: str) -> ResNet:
    """Builds the ResNet that has these tensors, with their depth, widths and groups.

    The network only holds the tensors and is not for images. No tensor shows strides and dilations,
    so they are those of ResNet-50. GN and GKN have one group.

    Args:
        tensors: by detectron2's names without prefix: the stem, and stages from res2 on.
        norm: "KN", "GKN", "BN" or "GN".
        variant: of KN and GKN.

    Returns:
        ResNet: a :class:`~kn_detectron.modeling.KNResNet` for "KN" and "GKN", else detectron2's.

    Raises:
        AssertionError, IndexError, KeyError, ValueError, ZeroDivisionError: the tensors are
            not those of a ResNet.
    """
    width, in_channels = tensors["stem.conv1.weight"].shape[:2]
    if norm in _PLAIN_NORMS:
        options = dict(norm=_PLAIN_NORMS[norm])
        blocks = BasicBlock, BottleneckBlock
        stem = BasicStem(in_channels, width, **options)
    else:
        chain = ChainConfig(norm=norm, variant=variant, num_groups=1)
        options = dict(chain=chain)
        blocks = KNBasicBlock, KNBottleneckBlock
        stem = KNBasicStem(in_channels, width, chain)
    stages = []
    for name in sorted({tensor.partition(".")[0] for tensor in tensors} - {"stem"}):
        if name != f"res{len(stages) + 2}":
            raise ValueError(f"{name} is there without the stage before it")
        stages.append(_stage(tensors, name, width, len(stages), blocks, options))
        width = stages[-1][-1].out_channels
    if norm in _PLAIN_NORMS:
        return ResNet(stem, stages)
    return KNResNet(stem, stages, image_std=[1.0] * in_channels, chain=chain)


def _stage(tensors, name: str, in_channels: int, index: int, blocks, options) -> List[nn.Module]:
    num_blocks = len({tensor.split(".")[1] for tensor in tensors if tensor.startswith(name + ".")})
    options = dict(
        options,
        num_blocks=num_blocks,
        in_channels=in_channels,
        stride_per_block=[1 if index == 0 else 2] + [1] * (num_blocks - 1),
    )
    outer, inner = (tensors[f"{name}.0.{conv}.weight"].shape for conv in ("conv1", "conv2"))
    if f"{name}.0.conv3.weight" not in tensors:
        return ResNet.make_stage(blocks[0], out_channels=inner[0], **options)
    return ResNet.make_stage(
        blocks[1],
        out_channels=tensors[f"{name}.0.conv3.weight"].shape[0],
        bottleneck_channels=outer[0],
        num_groups=outer[0] // inner[1],
        **options,
    )
