"""Top-1 and top-5 with moving and with online statistics."""

import contextlib
import logging

import torch
from detectron2.modeling import Backbone
from detectron2.utils import comm
from tabulate import tabulate
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers.convert.chain import Chain
from ..layers.modes import in_mode
from .config import micro_batch
from .data import IGNORED, build_eval_loader

__all__ = ["evaluate", "online_statistics"]

_logger = logging.getLogger(__name__)


@contextlib.contextmanager
def online_statistics(backbone):
    """Context in which a backbone in evaluation normalises as in training, and tracks nothing.

    This is the paper's Option B: BatchNorm uses the statistics of the batch, and Kalman
    Normalization filters them.

    Args:
        backbone (nn.Module): in evaluation.
    """
    norms = [m for m in backbone.modules() if isinstance(m, _BatchNorm)]
    tracking = [norm for norm in norms if norm.track_running_stats]
    for norm in tracking:
        norm.track_running_stats = False
    if isinstance(backbone, Backbone):
        backbone.train()  # the blocks of a ResNet pass beliefs by their mode, and drop nothing
    else:
        # Any other module may drop features by its mode.
        for norm in norms:
            norm.training = True
    chains = [m for m in backbone.modules() if isinstance(m, Chain) and not m.in_evaluation]
    for chain in chains:
        chain.in_evaluation = True
    try:
        yield
    finally:
        backbone.eval()
        for chain in chains:
            chain.in_evaluation = False
        for norm in tracking:
            norm.track_running_stats = True


@torch.no_grad()
def evaluate(cfg, model):
    """Evaluates a classifier on the validation images and logs a table.

    Args:
        cfg (CfgNode): of :func:`~kn_detectron.pretraining.classification_config`.
        model (ImageClassifier): in any mode; each module keeps its own.

    Returns:
        dict: ``{"moving": {"top1", "top5"}, "online": {...}}`` in percent. For norms without
        statistics of the past both are the same. With fewer than 5 classes top-5 is 100.

    Raises:
        InputError: an image cannot be used.
    """
    differ = any(isinstance(module, _BatchNorm) for module in model.backbone.modules())
    modes = {"moving": contextlib.nullcontext}
    if differ:
        modes["online"] = lambda: online_statistics(model.backbone)
    # Per mode, the number of images whose label comes first, and is among the first five.
    right = torch.zeros(len(modes), 2, dtype=torch.int64)
    images = 0
    with in_mode(model, training=False):
        for batch in build_eval_loader(cfg):
            label = batch["label"]
            images += int((label != IGNORED).sum())
            for row, context in enumerate(modes.values()):
                with context():
                    logits = model(batch)
                best = logits.topk(min(5, logits.shape[1])).indices.cpu()
                hits = best == label[:, None]
                right[row] += torch.stack([hits[:, 0].sum(), hits.any(1).sum()])
    gathered = comm.all_gather((right, images))
    right, images = (sum(part) for part in zip(*gathered))
    percent = (100 * right.double() / images).tolist()
    results = {name: dict(zip(("top1", "top5"), row)) for name, row in zip(modes, percent)}
    results.setdefault("online", dict(results["moving"]))
    if comm.is_main_process():
        _logger.info("%s", _table(cfg, results, images))
    return results


def _table(cfg, results, images):
    together = micro_batch(cfg)
    rows = [
        (f"{name} ({option})", scores["top1"], scores["top5"])
        for option, (name, scores) in zip(("Option A", "Option B"), results.items())
    ]
    return (
        f"{cfg.PRETRAINING.NORM}"
        + (f" in groups of {together}" if together else "")
        + f" on {images} validation images:\n"
        + tabulate(rows, ["statistics", "top-1 [%]", "top-5 [%]"], "github", floatfmt=".2f")
    )
