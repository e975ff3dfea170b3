"""C4 heads whose res5 goes on with the chain of the backbone."""

from typing import Dict, List, Tuple

from detectron2.config import CfgNode
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import Res5ROIHeads
from detectron2.structures import Boxes
from torch import Tensor, nn

from ..errors import InputError
from ..layers import Belief
from ..layers.belief import roi_align
from .resnet import ChainConfig, Feature, belief_keys, make_kn_stage

__all__ = ["KNRes5ROIHeads"]


@ROI_HEADS_REGISTRY.register()
class KNRes5ROIHeads(Res5ROIHeads):
    """detectron2's ``Res5ROIHeads`` with Kalman Normalization in res5.

    The prior of res5 starts from the belief about the backbone's output, which
    :class:`~kn_detectron.modeling.KNResNet` puts beside it; RoIAlign leaves a belief as it is.
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
        values = [f.value if isinstance(f, Feature) else f for f in features]
        x = self.pooler(values, boxes)
        if not isinstance(features[0], Feature):
            return self.res5(x)
        belief = roi_align(features[0].belief, [len(b) for b in boxes])
        return self.res5(Feature(x, belief)).value

    def _with_beliefs(self, features: Dict[str, Tensor]) -> Dict:
        """The features that the heads use, each paired with its belief if it has one."""
        paired = {}
        for name in self.in_features:
            mean, var = belief_keys(name)
            paired[name] = features[name]
            if mean in features:
                paired[name] = Feature(features[name], Belief(features[mean], features[var]))
        return paired

    def forward(self, images, features: Dict[str, Tensor], proposals, targets=None):
        """See detectron2's ``ROIHeads.forward``; ``features`` may hold beliefs."""
        return super().forward(images, self._with_beliefs(features), proposals, targets)

    def forward_with_given_boxes(self, features: Dict[str, Tensor], instances):
        """See detectron2's ``Res5ROIHeads``; ``features`` may hold beliefs."""
        return super().forward_with_given_boxes(self._with_beliefs(features), instances)
