"""Pooling regions from the levels of a pyramid together with the beliefs about them."""

from typing import List, Union

import torch
from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels
from detectron2.structures import Boxes
from torch import Tensor, nn

from ..errors import InputError
from ..layers import Belief
from ..layers.belief import mixture
from .chain import TRAIN_ALL, ChainConfig
from .features import Feature, value_of

__all__ = ["BeliefPooler"]


class BeliefPooler(ROIPooler):
    """detectron2's ROIPooler, for features with beliefs.

    A region has the belief of the level and of the image that it is pooled from. GKN normalises
    each region by itself and gets exactly this belief. KN normalises all regions together and needs
    one belief about the pixels of all of them: the mixture of the levels' beliefs. All levels have
    the same weight in it, whatever the regions are (ours). If the numbers of regions were the
    weights, priors would differ from step to step and from GPU to GPU, and at gain 0 the running
    statistics would depend on the regions of the last step. Most regions come from fine levels. The
    process model has to learn this.

    Args:
        pooler: detectron2's, which this one replaces.
        chain: the chain of the head that gets the regions.
    """

    def __init__(self, pooler: ROIPooler, chain: ChainConfig):
        nn.Module.__init__(self)
        self.__dict__.update(pooler.__dict__)
        self.chain = chain

    def forward(
        self, features: List[Union[Tensor, Feature]], boxes: List[Boxes]
    ) -> Union[Tensor, Feature]:
        """
        Args:
            features: the levels, from the finest on, each (N, C, H, W) with a belief of (1, C) or
                (N, C), or all without one.
            boxes: the regions of each image, R in all.

        Returns:
            The pooled regions, shape (R, C, size, size). With beliefs they are a Feature, ready for
            a convolution, with a belief of shape (1, C) for KN, and (R, C) for GKN.

        Raises:
            InputError: if there are no beliefs although the head needs them.
        """
        x = super().forward([value_of(feature) for feature in features], boxes)
        if any(isinstance(feature, Tensor) for feature in features):
            if self.training or self.chain.predicts_in_evaluation:
                raise InputError(
                    "The priors of the box and mask heads start from the beliefs about the "
                    "backbone's features, of which there are none: set MODEL.BACKBONE.NAME "
                    '"build_kn_resnet_fpn_backbone", and MODEL.FPN.NORM to the norm of '
                    'MODEL.RESNETS.NORM or to "", or, if only the backbone is in evaluation mode, '
                    f"{TRAIN_ALL}"
                )
            return x
        beliefs = [feature.belief for feature in features]
        belief = mixture(beliefs) if self.chain.norm == "KN" else self._by_region(beliefs, boxes)
        return Feature(x, self.chain.transition.source(belief, x))

    def _by_region(self, beliefs: List[Belief], boxes: List[Boxes]) -> Belief:
        if not boxes:  # calibration runs without images
            return Belief(*(moment[:0] for moment in beliefs[0]))
        level = assign_boxes_to_levels(
            boxes, self.min_level, self.max_level, self.canonical_box_size, self.canonical_level
        )
        image = torch.cat([level.new_full((len(b),), i) for i, b in enumerate(boxes)])

        def of_regions(moments: List[Tensor]) -> Tensor:
            by_level = torch.stack([v.expand(len(boxes), -1) for v in moments])
            return by_level[level, image]

        return Belief(*(of_regions(moments) for moments in zip(*beliefs)))
