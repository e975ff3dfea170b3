"""The trainer of the pre-training."""

import logging
import os

from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, get_event_storage

from ..checkpoint.conventions import Conventions
from ..data import first_sentence
from ..engine import Trainer
from ..engine.evaluation import write_results
from ..engine.hooks import unwrapped
from ..errors import InputError
from .config import micro_batch
from .data import build_train_loader
from .evaluation import evaluate
from .export import export_backbone

__all__ = ["ClassificationTrainer"]

_logger = logging.getLogger(__name__)


class ClassificationTrainer(Trainer):
    """:class:`~kn_detectron.engine.Trainer` on the images and the model of the pre-training.

    At the end OUTPUT_DIR/backbone.pth has the weights for MODEL.WEIGHTS of a detector, or the
    weights of the network that was trained in place of its ResNet.
    """

    def train(self):
        """See :meth:`~kn_detectron.engine.Trainer.train`; writes backbone.pth at the end."""
        results = super().train()
        if comm.is_main_process() and self.cfg.PRETRAINING.NORM != "WN":  # no detector has it
            path = os.path.join(self.cfg.OUTPUT_DIR, "backbone.pth")
            state = unwrapped(self.model).state_dict()
            export_backbone(state, path, Conventions.of_config(self.cfg))
            network = self.cfg.PRETRAINING.NETWORK
            whose = f"the weights of {network}" if network else "for MODEL.WEIGHTS of a detector"
            _logger.info("Wrote %s, %s.", path, whose)
        return results

    def build_hooks(self):
        """The hooks of :class:`~kn_detectron.engine.Trainer`, and in front of them the accuracy."""
        return [_StoreAccuracy(), *super().build_hooks()]

    def build_writers(self):
        """The writers of detectron2, and one for what they leave out."""
        epoch = self.cfg.PRETRAINING.NUM_IMAGES / self.cfg.SOLVER.IMS_PER_BATCH
        return [*super().build_writers(), _ProgressPrinter(epoch, self.max_iter)]

    @classmethod
    def build_model(cls, cfg):
        """Builds the classifier and says what it is."""
        pretraining = cfg.PRETRAINING
        what = f" {pretraining.NETWORK}" if pretraining.NETWORK else ""
        whose = "" if what else f" for a detector with {pretraining.DETECTOR_NORM}"
        _logger.info(
            "Pre-training%s with %s%s, on %d images of %d classes.",
            *(what, pretraining.NORM, whose),
            *(pretraining.NUM_IMAGES, pretraining.NUM_CLASSES),
        )
        if pretraining.NORM_BATCH_SIZE and not micro_batch(cfg):
            _logger.info(
                "%s treats every image on its own: --norm-batch-size changes nothing.",
                pretraining.NORM,
            )
        return super().build_model(cfg)

    @classmethod
    def check_datasets(cls, cfg, keys=()):
        """Checks nothing: the images come from the folder PRETRAINING.DATA, not from a dataset."""

    @classmethod
    def build_train_loader(cls, cfg):
        """Builds the loader of the training images."""
        return build_train_loader(cfg)

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        """Evaluates on the validation images and writes OUTPUT_DIR/inference/results.json.

        Returns:
            dict: see :func:`~kn_detectron.pretraining.evaluate`.
        """
        try:
            results = evaluate(cfg, unwrapped(model))
        except InputError as error:
            raise InputError(first_sentence(error)) from error
        if comm.is_main_process():
            write_results(cfg, results)
        return results


class _StoreAccuracy(HookBase):
    """Stores the top-1 of each batch in percent as ``batch_top1``."""

    def after_step(self):
        top1 = unwrapped(self.trainer.model).batch_top1
        self.trainer.storage.put_scalar("batch_top1", top1.item())


class _ProgressPrinter(EventWriter):
    """Logs the epoch and the accuracy after detectron2's line of losses."""

    def __init__(self, iterations_per_epoch, max_iter):
        self._iterations_per_epoch = iterations_per_epoch
        self._max_iter = max_iter

    def write(self):
        storage = get_event_storage()
        if storage.iter == self._max_iter or "batch_top1" not in storage.latest():
            return  # after the training, or no step was done
        _logger.info(
            " epoch: %.2f  top-1 of the last 20 batches: %.1f%%",
            (storage.iter + 1) / self._iterations_per_epoch,
            storage.history("batch_top1").avg(20),
        )
