"""Box and mask heads that are chains.

They are detectron2's own, parameter by parameter and key by key. Only KN's parameters are added.
"""

import functools
import itertools
from typing import Union

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_BOX_HEAD_REGISTRY, ROI_MASK_HEAD_REGISTRY
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, MaskRCNNConvUpsampleHead
from torch import Tensor

from ..errors import InputError
from .chain import ChainConfig, build_norm, link_convolutions
from .features import Feature, value_of

__all__ = ["KNFastRCNNConvFCHead", "KNMaskRCNNConvUpsampleHead"]


class _KNHead:
    """Makes a chain of the convolutions with which a sequential head begins.

    Attributes:
        PART: the node of MODEL that has the NORM of the head.
    """

    PART: str

    @configurable
    def __init__(self, input_shape: ShapeSpec, *, chain: ChainConfig, **kwargs):
        """
        Args:
            input_shape: as in the head of detectron2.
            chain: the settings of its layers, which it shares with the backbone.
            kwargs: as in the head of detectron2, but for ``conv_norm``.
        """
        super().__init__(input_shape, conv_norm=functools.partial(build_norm, chain), **kwargs)
        self.chain = chain
        self.conv_norm_relus = link_convolutions(self, self.conv_norm_relus, chain)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec):
        """Reads the config as the head of detectron2 does.

        The NORM of the head must equal MODEL.RESNETS.NORM.

        Raises:
            InputError: the two norms differ.
        """
        options = super().from_config(cfg, input_shape)
        del options["conv_norm"]
        return dict(options, chain=ChainConfig.from_config(cfg, cls.PART))

    def _check_needs_no_belief(self) -> None:
        norms = (conv.norm for conv in self.conv_norm_relus)
        if any(getattr(norm, "needs_prior", False) for norm in norms):
            raise InputError(
                f"{type(self).__name__} needs the beliefs about its regions, which only the ROI "
                'heads of this package give it: set MODEL.ROI_HEADS.NAME "KNStandardROIHeads" or '
                '"KNCascadeROIHeads"'
            )

    def _run(self, x: Union[Tensor, Feature]) -> Tensor:
        if isinstance(x, Tensor):
            self._check_needs_no_belief()
        for conv in self.conv_norm_relus:
            x = conv(x)
        y = value_of(x)
        for layer in itertools.islice(self, len(self.conv_norm_relus), None):
            y = layer(y)
        return y


@ROI_BOX_HEAD_REGISTRY.register()
class KNFastRCNNConvFCHead(_KNHead, FastRCNNConvFCHead):
    """detectron2's ``FastRCNNConvFCHead`` with Kalman Normalization in its convolutions.

    Use it in :class:`~kn_detectron.modeling.KNStandardROIHeads` or
    :class:`~kn_detectron.modeling.KNCascadeROIHeads`, which give it the belief about its regions.
    """

    PART = "ROI_BOX_HEAD"

    def forward(self, x: Union[Tensor, Feature]) -> Tensor:
        """The regions with the belief about them, or the regions alone."""
        return self._run(x)


@ROI_MASK_HEAD_REGISTRY.register()
class KNMaskRCNNConvUpsampleHead(_KNHead, MaskRCNNConvUpsampleHead):
    """detectron2's ``MaskRCNNConvUpsampleHead`` with Kalman Normalization in its convolutions.

    Use it in :class:`~kn_detectron.modeling.KNStandardROIHeads` or
    :class:`~kn_detectron.modeling.KNCascadeROIHeads`, which give it the belief about its regions.
    """

    PART = "ROI_MASK_HEAD"

    def layers(self, x: Union[Tensor, Feature]) -> Tensor:
        """The regions with the belief about them, or the regions alone."""
        return self._run(x)
