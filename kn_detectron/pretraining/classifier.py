"""Image classifiers around a detector's ResNet, or around another network."""

import torch
import torch.nn.functional as F
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from torch import nn

from ..errors import InputError
from ..layers import KalmanNorm2d, set_norm_batch_size
from ..modeling.network import convert_network
from ..networks import build_network
from .config import micro_batch
from .norms import BatchRenorm2d, apply_weight_norm, replace_batch_norms

__all__ = ["ImageClassifier", "NetworkClassifier"]


@META_ARCH_REGISTRY.register()
class ImageClassifier(nn.Module):
    """A ResNet, the average over positions, and one linear layer.

    Its parameters are called as those of a detector's backbone and as detectron2's ResNet calls its
    own linear layer: ``backbone.stem.conv1.weight``, ``linear.weight``.

    Attributes:
        input_format (str): order of the channels that it expects, "BGR" or "RGB".
        batch_top1 (Tensor or None): top-1 of the last batch of the training, in percent.
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
        self.batch_top1 = None
        self._build(cfg)
        for name, values in (("mean", cfg.MODEL.PIXEL_MEAN), ("std", cfg.MODEL.PIXEL_STD)):
            values = torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)
            self.register_buffer(f"pixel_{name}", values, persistent=False)
        self.to(torch.device(cfg.MODEL.DEVICE), memory_format=_memory_format(cfg))

    def _build(self, cfg):
        self.backbone = _build_backbone(cfg)
        channels = self.backbone.output_shape()["res5"].channels
        self.linear = nn.Linear(channels, cfg.PRETRAINING.NUM_CLASSES)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def _scores(self, x):
        return self.linear(self.backbone(x)["res5"].mean((2, 3)))

    @property
    def device(self):
        """Where the model is, and where images are moved to."""
        return self.pixel_mean.device

    def preprocess(self, images):
        """Images as the backbone gets them.

        Args:
            images (Tensor): bytes, shape (N, 3, H, W).

        Returns:
            Tensor: of the same shape, normalised.
        """
        return (images.to(self.device) - self.pixel_mean) / self.pixel_std

    def forward(self, batch):
        """
        Args:
            batch (dict): ``image``, bytes of shape (N, 3, H, W), and in training ``label``, shape
                (N,).

        Returns:
            dict or Tensor: the loss in training, the scores of shape (N, classes) otherwise.

        Raises:
            InputError: a norm gets one value per channel in training.
        """
        images = self.preprocess(batch["image"])
        if not self.training:
            return self._scores(images)
        try:
            logits = self._scores(images)
        except ValueError as error:  # of torch's batch_norm and of the head of a chain
            if "more than 1 value per channel" not in str(error):
                raise
            raise InputError(
                f"A norm gets one value per channel, which it cannot measure ({error}): give a "
                "larger --image-size, or more images per process by --batch-size or "
                "--norm-batch-size."
            ) from error
        labels = batch["label"].to(self.device)
        # A tensor, since reading it here would wait for a GPU before the backward pass is launched.
        self.batch_top1 = 100 * (logits.detach().argmax(1) == labels).float().mean()
        return {"loss_cls": F.cross_entropy(logits, labels)}


@META_ARCH_REGISTRY.register()
class NetworkClassifier(ImageClassifier):
    """A whole network of :func:`~kn_detectron.networks.build_network`.

    Its parameters are called as the network's own library calls them, with ``backbone.`` in front.
    """

    def _build(self, cfg):
        self.backbone = _build_network(cfg)

    def _scores(self, x):
        return self.backbone(x)


def _memory_format(cfg):
    """The faster memory format of the features.

    Convolutions and norms are faster in channels_last, on CPUs by a third. But where images have
    statistics of their own, a CPU normalises them one by one in channels_last, and all at once
    otherwise: a slim ResNet-50 with GKN, or with micro-batches, is 1.7 times faster contiguous.
    A GPU would copy the features to the other format and back in every pass.
    """
    batch_size = cfg.SOLVER.IMS_PER_BATCH
    in_parts = cfg.PRETRAINING.NORM == "GKN" or (micro_batch(cfg) or batch_size) < batch_size
    return torch.contiguous_format if in_parts else torch.channels_last


def _build_backbone(cfg):
    try:
        backbone = build_backbone(cfg)
    except ValueError as error:  # of GroupNorm
        raise InputError(
            f"--norm {cfg.PRETRAINING.NORM} does not fit the backbone ({error}): give another one."
        ) from error
    _replace_for_comparison(cfg, backbone)
    set_norm_batch_size(backbone, micro_batch(cfg))
    return backbone


def _replace_for_comparison(cfg, module):
    norm, together, steps = cfg.PRETRAINING.NORM, micro_batch(cfg), cfg.SOLVER.MAX_ITER
    if norm == "BN" and together:
        # The head of a chain is BatchNorm, and can normalise parts of a batch on their own.
        replace_batch_norms(
            module, lambda n: KalmanNorm2d(n.num_features, n.eps, n.momentum, gain=None)
        )
    elif norm == "BRN":
        replace_batch_norms(
            module, lambda n: BatchRenorm2d(n.num_features, steps, together, n.eps, n.momentum)
        )
    elif norm == "WN":
        apply_weight_norm(module)


def _build_network(cfg):
    name, norm, kn = cfg.PRETRAINING.NETWORK, cfg.PRETRAINING.NORM, cfg.MODEL.KN
    network = build_network(name, cfg.PRETRAINING.NUM_CLASSES)
    has_batch_norm = any(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    if not has_batch_norm and norm not in ("KN", "GKN"):  # for which the conversion has a sentence
        raise InputError(
            f"{name} has no BatchNorm2d, in whose place --norm puts what it names: give another "
            "network."
        )
    if norm in ("LN", "GKN") or norm.startswith("GN"):
        groups = {"LN": 1, "GN": 32, "GKN": kn.NUM_GROUPS}.get(norm) or int(norm[2:])
        try:
            replace_batch_norms(network, lambda n: nn.GroupNorm(groups, n.num_features, n.eps))
        except ValueError as error:
            raise InputError(
                f"--norm {norm} does not fit {name} ({error}): give another one, as GN1, or for GKN "
                "another MODEL.KN.NUM_GROUPS."
            ) from error
    if norm in ("KN", "GKN"):
        network = convert_network(network, cfg)
    _replace_for_comparison(cfg, network)
    set_norm_batch_size(network, micro_batch(cfg))
    return network
