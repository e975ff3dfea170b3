"""C4 heads whose res5 goes on with the chain of the backbone."""

from typing import Dict, List, Tuple

from detectron2.config import CfgNode
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import Res5ROIHeads
from detectron2.structures import Boxes
from torch import Tensor, nn

from ..errors import InputError
from ..layers.belief import roi_align
from .chain import ChainConfig, Feature
from .resnet import make_kn_stage

__all__ = ["KNRes5ROIHeads"]


@ROI_HEADS_REGISTRY.register()
class KNRes5ROIHeads(Res5ROIHeads):
    """detectron2's ``Res5ROIHeads`` with Kalman Normalization in res5.

    The prior of res5 starts from the belief about the backbone's output, which
    :class:`~kn_detectron.modeling.KNResNet` hands on; RoIAlign leaves a belief as it is.
    """

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
        # What is in the list is what _with_beliefs put into the dict.
        x = self.pooler([feature.value for feature in features], boxes)
        belief = features[0].belief
        if belief is not None:
            belief = roi_align(belief, [len(b) for b in boxes])
            belief = self.res5[0].chain.transition.start(belief, x)
        return self.res5(Feature(x, belief)).value

    def _with_beliefs(self, features: Dict[str, Tensor]) -> Dict[str, Feature]:
        """The features that the heads use, with their beliefs."""
        if isinstance(features[self.in_features[0]], Feature):  # forward calls the other entrance
            return features
        beliefs = getattr(features, "beliefs", {})
        return {name: Feature(features[name], beliefs.get(name)) for name in self.in_features}

    def forward(self, images, features: Dict[str, Tensor], proposals, targets=None):
        """See detectron2's ``ROIHeads.forward``; ``features`` may have beliefs."""
        return super().forward(images, self._with_beliefs(features), proposals, targets)

    def forward_with_given_boxes(self, features: Dict[str, Tensor], instances):
        """See detectron2's ``Res5ROIHeads``; ``features`` may have beliefs."""
        return super().forward_with_given_boxes(self._with_beliefs(features), instances)
