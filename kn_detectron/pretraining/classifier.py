"""The image classifier around a detector's ResNet."""

import torch
import torch.nn.functional as F
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.utils.events import get_event_storage
from torch import nn

from ..errors import InputError
from ..layers import KalmanNorm2d, set_norm_batch_size
from .config import micro_batch
from .norms import BatchRenorm2d, apply_weight_norm, replace_batch_norms

__all__ = ["ImageClassifier"]


@META_ARCH_REGISTRY.register()
class ImageClassifier(nn.Module):
    """A ResNet, the average over positions, and one linear layer.

    Its parameters are called as those of a detector's backbone and as detectron2's ResNet calls its
    own linear layer: ``backbone.stem.conv1.weight``, ``linear.weight``.

    Attributes:
        input_format (str): order of the channels that it expects, "BGR" or "RGB".
    """

    def __init__(self, cfg):
        """
        Args:
            cfg (CfgNode): of :func:`~kn_detectron.pretraining.classification_config`.

        Raises:
            InputError: the norm does not fit the widths.
        """
        super().__init__()
        self.input_format = cfg.INPUT.FORMAT
        self.backbone = _build_backbone(cfg)
        channels = self.backbone.output_shape()["res5"].channels
        self.linear = nn.Linear(channels, cfg.PRETRAINING.NUM_CLASSES)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)
        for name, values in (("mean", cfg.MODEL.PIXEL_MEAN), ("std", cfg.MODEL.PIXEL_STD)):
            values = torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)
            self.register_buffer(f"pixel_{name}", values, persistent=False)
        # Convolutions and norms are faster so, on CPUs by a third.
        self.to(torch.device(cfg.MODEL.DEVICE), memory_format=torch.channels_last)

    @property
    def device(self):
        """Where the model is, and where images are moved to."""
        return self.pixel_mean.device

    def logits(self, images):
        """Scores of the classes.

        Args:
            images (Tensor): bytes, shape (N, 3, H, W).

        Returns:
            Tensor: shape (N, classes).
        """
        images = images.to(self.device, non_blocking=True)
        features = self.backbone((images - self.pixel_mean) / self.pixel_std)["res5"]
        return self.linear(features.mean((2, 3)))

    def forward(self, batch):
        """
        Args:
            batch (dict): ``image``, bytes of shape (N, 3, H, W), and in training ``label``, shape
                (N,).

        Returns:
            dict or Tensor: the loss in training, the scores of shape (N, classes) otherwise.
        """
        logits = self.logits(batch["image"])
        if not self.training:
            return logits
        labels = batch["label"].to(self.device, non_blocking=True)
        top1 = (logits.detach().argmax(1) == labels).float().mean()
        get_event_storage().put_scalar("batch_top1", 100 * top1.item())
        return {"loss_cls": F.cross_entropy(logits, labels)}


def _build_backbone(cfg):
    try:
        backbone = build_backbone(cfg)
    except ValueError as error:  # of GroupNorm
        raise InputError(
            f"--norm {cfg.PRETRAINING.NORM} does not fit the backbone ({error}): give another one."
        ) from error
    norm, together = cfg.PRETRAINING.NORM, micro_batch(cfg)
    if norm == "BN" and together:
        # The head of a chain is BatchNorm, and can normalise parts of a batch on their own.
        replace_batch_norms(backbone, lambda channels: KalmanNorm2d(channels, gain=None))
    elif norm == "BRN":
        steps = cfg.SOLVER.MAX_ITER
        replace_batch_norms(backbone, lambda channels: BatchRenorm2d(channels, steps, together))
    elif norm == "WN":
        apply_weight_norm(backbone)
    set_norm_batch_size(backbone, together)
    return backbone
