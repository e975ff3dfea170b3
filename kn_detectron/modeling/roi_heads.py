"""ROI heads that continue the chain of the backbone, or of the FPN."""

from typing import List, Tuple, Union

from detectron2.config import CfgNode, configurable
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import CascadeROIHeads, Res5ROIHeads, StandardROIHeads
from detectron2.modeling.roi_heads.cascade_rcnn import _ScaleGradient
from detectron2.structures import Boxes
from torch import Tensor, nn

from ..errors import InputError
from ..layers import kalman_layers
from ..layers.belief import Belief, roi_align
from .chain import TRAIN_ALL, ChainConfig, as_source
from .features import Feature, Features, WithBelief, value_of
from .heads import KNFastRCNNConvFCHead, KNMaskRCNNConvUpsampleHead
from .poolers import BeliefPooler
from .resnet import make_kn_stage

__all__ = ["KNCascadeROIHeads", "KNRes5ROIHeads", "KNStandardROIHeads"]


def _with_beliefs(names: List[str]) -> List[WithBelief]:
    return [WithBelief(name) for name in names]


@ROI_HEADS_REGISTRY.register()
class KNRes5ROIHeads(Res5ROIHeads):
    """detectron2's ``Res5ROIHeads`` with Kalman Normalization in res5.

    The prior of res5 starts from the belief about the backbone's output, which
    :class:`~kn_detectron.modeling.KNResNet` hands on; RoIAlign leaves a belief as it is.
    """

    @configurable
    def __init__(self, *, in_features: List[str], **kwargs):
        """
        Args:
            in_features: the name of the feature that regions are pooled from.
            kwargs: as in ``Res5ROIHeads``, with a ``res5`` of
                :class:`~kn_detectron.modeling.KNBottleneckBlock`.
        """
        super().__init__(in_features=_with_beliefs(in_features), **kwargs)

    @classmethod
    def _build_res5_block(cls, cfg: CfgNode) -> Tuple[nn.Module, int]:
        if cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE[-1]:
            raise InputError(
                "MODEL.RESNETS.DEFORM_ON_PER_STAGE asks for deformable convolutions in res5, which "
                "KNRes5ROIHeads does not have: set its last value to False"
            )
        if cfg.MODEL.RESNETS.DEPTH < 50:
            raise InputError(
                f"MODEL.RESNETS.DEPTH is {cfg.MODEL.RESNETS.DEPTH}, but KNRes5ROIHeads, like "
                "Res5ROIHeads, has bottleneck blocks: set 50, 101 or 152, or use an FPN"
            )
        blocks = make_kn_stage(cfg, 3, 3, ChainConfig.from_config(cfg), first_stride=2)
        return nn.Sequential(*blocks), blocks[-1].out_channels

    def _shared_roi_transform(self, features: List, boxes: List[Boxes]) -> Tensor:
        if isinstance(features[0], Tensor):
            if any(norm.needs_prior for norm in kalman_layers(self.res5).values()):
                raise InputError(
                    "The priors of res5 start from the belief about the backbone's feature, of which "
                    'there is none: set MODEL.BACKBONE.NAME "build_kn_resnet_backbone", or, if only '
                    f"the backbone is in evaluation mode, {TRAIN_ALL}"
                )
            return super()._shared_roi_transform(features, boxes)
        x = self.pooler([value_of(feature) for feature in features], boxes)
        belief = roi_align(features[0].belief, [len(b) for b in boxes])
        return self.res5(as_source(Feature(x, belief), self.res5[0].chain.transition)).value

    def pass_beliefs(self, features: Features) -> None:
        """Runs the chain of res5 on no region, for calibration."""
        self._shared_roi_transform([features[name] for name in self.in_features], [])


class _KNPooledHeads:
    """Gives the beliefs about the regions to KN heads of detectron2's ``StandardROIHeads``.

    Other box and mask heads get what detectron2 gives them.
    """

    @configurable
    def __init__(self, **kwargs):
        """
        Args:
            kwargs: as in detectron2's heads.
        """
        super().__init__(**kwargs)
        cascade = isinstance(self.box_head, nn.ModuleList)
        box_head = self.box_head[0] if cascade else self.box_head
        if isinstance(box_head, KNFastRCNNConvFCHead):
            self.box_pooler = BeliefPooler(self.box_pooler, box_head.chain)
            self.box_in_features = _with_beliefs(self.box_in_features)
        mask_head = getattr(self, "mask_head", None)
        if isinstance(mask_head, KNMaskRCNNConvUpsampleHead):
            self.mask_pooler = BeliefPooler(self.mask_pooler, mask_head.chain)
            self.mask_in_features = _with_beliefs(self.mask_in_features)

    def pass_beliefs(self, features: Features) -> None:
        """Runs the chains of the heads on no region, for calibration."""
        if isinstance(self.box_pooler, BeliefPooler):
            x = self.box_pooler([features[name] for name in self.box_in_features], [])
            cascade = isinstance(self.box_head, nn.ModuleList)
            for head in self.box_head if cascade else [self.box_head]:
                head(x)
        if self.mask_on and isinstance(self.mask_pooler, BeliefPooler):
            x = self.mask_pooler([features[name] for name in self.mask_in_features], [])
            self.mask_head.layers(x)


@ROI_HEADS_REGISTRY.register()
class KNStandardROIHeads(_KNPooledHeads, StandardROIHeads):
    """detectron2's ``StandardROIHeads`` for box and mask heads with Kalman Normalization.

    These heads are :class:`~kn_detectron.modeling.KNFastRCNNConvFCHead` and
    :class:`~kn_detectron.modeling.KNMaskRCNNConvUpsampleHead`. Their priors start from the beliefs
    that :class:`~kn_detectron.modeling.KNFPN` hands on.
    """


@ROI_HEADS_REGISTRY.register()
class KNCascadeROIHeads(_KNPooledHeads, CascadeROIHeads):
    """detectron2's ``CascadeROIHeads`` for the heads of :class:`KNStandardROIHeads`.

    In each stage the priors start from the beliefs that the FPN hands on.
    """

    def _run_stage(self, features: List, proposals: List, stage: int):
        if not isinstance(self.box_pooler, BeliefPooler):
            return super()._run_stage(features, proposals, stage)
        # As in detectron2, each stage gives what is below its share of the gradient. A belief has
        # the same share, since it is a function of the same weights.
        features = [_with_gradient_scale(f, 1.0 / self.num_cascade_stages) for f in features]
        x = self.box_pooler(features, [p.proposal_boxes for p in proposals])
        return self.box_predictor[stage](self.box_head[stage](x))


def _with_gradient_scale(feature: Union[Tensor, Feature], scale: float) -> Union[Tensor, Feature]:
    value = _ScaleGradient.apply(value_of(feature), scale)
    if isinstance(feature, Tensor):
        return value
    return Feature(value, Belief(*(_ScaleGradient.apply(part, scale) for part in feature.belief)))
