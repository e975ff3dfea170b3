"""detectron2's trainer for Kalman Normalization, with an exact resume."""

import contextlib
import logging
import os
import weakref

from detectron2.data import MetadataCatalog
from detectron2.engine import (
    AMPTrainer,
    DefaultTrainer,
    SimpleTrainer,
    TrainerBase,
    create_ddp_model,
    hooks,
)
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger
from fvcore.nn.precise_bn import get_bn_modules

from ..checkpoint import KNCheckpointer
from ..config import check_config
from ..data import (
    build_test_loader,
    build_train_loader,
    check_datasets_once,
    first_sentence,
)
from ..errors import InputError, one_line
from ..files import atomic_write, is_full_disk
from ..layers.modes import in_mode
from .batches import AgreedBatches
from .evaluation import build_coco_evaluator, check_test_augmentation, write_results
from .hooks import (
    AverageRunningStatistics,
    GainAnneal,
    KalmanStatistics,
    PreciseStatistics,
    SeedStep,
    average_running_statistics,
    broadcast_filters,
)
from .optimizer import exempt_filters_from_decay
from .resuming import (
    check_same_scaling,
    describe_changes,
    optimizer_settings,
    plain,
    report_changes,
    set_optimizer_settings,
)
from .stopping import StopOnSignal, Stopped

__all__ = ["Trainer"]

_logger = logging.getLogger(__name__)

# How often detectron2's writers print and write.
_WRITE_PERIOD = 20


class Trainer(DefaultTrainer):
    """``DefaultTrainer`` with KN's loaders, checkpointer, evaluator and hooks.

    A run that was interrupted and resumed computes what an uninterrupted one computes, to the bit
    on a CPU. The checkpoint holds the optimizer, the schedule, the loss scaler and the seed; the
    order and augmentation of the images and all sampling within a step follow from the seed. If a
    run is resumed with another config, the new values are in force from there on, and the log says
    what has changed.

    Running statistics are averaged over the ranks before they are evaluated or saved. A signal
    stops the run when its step is saved; see :class:`StopOnSignal`. An image that cannot be used
    raises :class:`~kn_detectron.InputError` on all ranks, after the steps before it were saved.

    Attributes:
        seed (int): cfg.SEED, or a random one; a resumed run keeps the seed of its first part.
    """

    def __init__(self, cfg):
        """
        Args:
            cfg (CfgNode): detectron2's config with ``MODEL.KN``.
        """
        # Not DefaultTrainer's own: its checkpointer writes in place, and its data-parallel model
        # is for GPUs only.
        TrainerBase.__init__(self)
        check_config(cfg)
        check_test_augmentation(cfg)
        for name in ("detectron2", "kn_detectron"):
            if not logging.getLogger(name).isEnabledFor(logging.INFO):  # nobody has set up logging
                setup_logger(name=name)
        _check_reference_world_size(cfg)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        PathManager.mkdirs(cfg.OUTPUT_DIR)  # detectron2 0.4's writers take it for granted
        self.check_datasets(cfg)
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        self._stop = StopOnSignal()
        self._batches = AgreedBatches(_resumable(self.build_train_loader(cfg)), self._stop)
        on_gpu = next(model.parameters()).is_cuda
        model = create_ddp_model(
            model, broadcast_buffers=False, **({} if on_gpu else {"device_ids": None})
        )
        self._trainer = (AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer)(
            model, self._batches, optimizer
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = KNCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.seed = self._batches.loader.seed
        self.cfg = cfg
        self._last_eval_results = None
        self.register_hooks(self.build_hooks())

    @classmethod
    def build_optimizer(cls, cfg, model):
        """Builds detectron2's optimizer, which does not decay gains and process models.

        Returns:
            torch.optim.Optimizer
        """
        optimizer = super().build_optimizer(cfg, model)
        exempt_filters_from_decay(optimizer, model)
        return optimizer

    @classmethod
    def build_lr_scheduler(cls, cfg, optimizer):
        """Builds detectron2's scheduler, without a step at the very end.

        Such a step has no effect, and detectron2 0.4 refuses it. For later steps detectron2 warns.

        Returns:
            LRScheduler

        Raises:
            InputError: detectron2 has no such scheduler.
        """
        cfg = cfg.clone()
        cfg.defrost()
        cfg.SOLVER.STEPS = tuple(step for step in cfg.SOLVER.STEPS if step != cfg.SOLVER.MAX_ITER)
        try:
            return super().build_lr_scheduler(cfg, optimizer)
        except ValueError as error:
            if "Unknown LR scheduler" not in str(error):
                raise
            raise InputError(
                f"SOLVER.LR_SCHEDULER_NAME is {cfg.SOLVER.LR_SCHEDULER_NAME!r}, which detectron2 "
                "does not have: take WarmupMultiStepLR or WarmupCosineLR."
            ) from error

    def build_hooks(self):
        """Builds the hooks; their order matters and is explained where it does.

        Returns:
            list[HookBase]
        """
        cfg = self.cfg
        is_main = comm.is_main_process()
        # As with TEST.EVAL_PERIOD, 0 is never; the end of the run is saved anyway.
        period = cfg.SOLVER.CHECKPOINT_PERIOD
        period = period if period > 0 else self.max_iter + 1
        precise = cfg.TEST.PRECISE_BN.ENABLED and get_bn_modules(self.model)
        return [
            hook
            for hook in (
                hooks.IterationTimer(),
                SeedStep(),
                GainAnneal(*cfg.MODEL.KN.GAIN_ANNEAL),
                # Before the hooks that run the model, so that it hears the training step only.
                KalmanStatistics(_WRITE_PERIOD) if is_main else None,
                hooks.LRScheduler(),
                self._build_precise_statistics() if precise else None,
                AverageRunningStatistics([period, cfg.TEST.EVAL_PERIOD]),
                # From here on the state of the step is complete.
                hooks.PeriodicCheckpointer(self.checkpointer, period) if is_main else None,
                self._stop,
                hooks.EvalHook(cfg.TEST.EVAL_PERIOD, self._evaluate),
                # Last, since it writes what the others have stored.
                hooks.PeriodicWriter(self.build_writers(), _WRITE_PERIOD) if is_main else None,
            )
            if hook is not None
        ]

    def _build_precise_statistics(self):
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = 0  # it runs seldom
        loader = self.build_train_loader(cfg)
        precise_bn = cfg.TEST.PRECISE_BN
        return PreciseStatistics(cfg.TEST.EVAL_PERIOD, self.model, loader, precise_bn.NUM_ITER)

    def resume_or_load(self, resume=True):
        """Goes on from the last checkpoint of OUTPUT_DIR, or loads MODEL.WEIGHTS.

        Args:
            resume (bool): whether to go on; without a checkpoint MODEL.WEIGHTS is loaded.

        Raises:
            InputError: the checkpoint cannot be read or does not fit.
        """
        self.checkpointer.remove_partial_files()
        there = self.checkpointer.has_checkpoint()
        weights = self.cfg.MODEL.WEIGHTS
        if resume and not there:
            _logger.warning(
                "There is no checkpoint to resume from in %s: starting from %s.",
                self.cfg.OUTPUT_DIR,
                weights or "scratch",
            )
        if there and not resume:
            _logger.warning(
                "%s has a checkpoint that this run does not go on from (--resume would) and will "
                "replace.",
                self.cfg.OUTPUT_DIR,
            )
        self.checkpointer.resume_or_load(weights, resume=resume)
        broadcast_filters(self.model)
        if resume and there:
            self.start_iter = self.iter + 1

    def train(self):
        """Trains from ``start_iter`` to ``max_iter``.

        Returns:
            dict or None: the last evaluation's results on the main process.

        Raises:
            InputError: the loss diverged, or the data or the output folder cannot be used.
            Stopped: a signal ended the run.
        """
        if comm.is_main_process():
            # Not before: of a run that was refused the folder keeps the former config.
            if self.start_iter == 0:  # or --resume would go on from the run that was here before
                self.checkpointer.forget_last_checkpoint()
            with atomic_write(os.path.join(self.cfg.OUTPUT_DIR, "config.yaml")) as file:
                file.write(_with_class_names(self.cfg).dump().encode())
        self._batches.loader.seed = self.seed
        self._batches.loader.start_iter = self.start_iter
        if self.start_iter >= self.max_iter:
            self._finish()
        else:
            with _without_tracebacks_of_input_errors():
                super().train()
        return self._last_eval_results

    def _finish(self):
        """Does what remains of a run whose steps are all done: the evaluation."""
        _logger.warning(
            "Nothing is left to train: iteration %d of SOLVER.MAX_ITER %d is done. Evaluating.",
            self.start_iter,
            self.max_iter,
        )
        if os.path.basename(self.checkpointer.get_checkpoint_file()) != "model_final.pth":
            self.checkpointer.save("model_final", iteration=self.iter)
        self.iter = self.max_iter
        with EventStorage(self.max_iter) as self.storage:
            try:
                self.before_train()
            finally:
                self.after_train()

    def run_step(self):
        """Does one step; see ``DefaultTrainer``."""
        try:
            super().run_step()
        except (InputError, Stopped):
            # There is no batch, so the last complete step is the one before.
            self.iter -= 1
            if self.iter >= self.start_iter:
                self.save_checkpoint()
            raise
        except FloatingPointError as error:
            raise InputError(
                f"The training diverged in iteration {self.iter} ({one_line(error)}): "
                "start again with a lower SOLVER.BASE_LR, a longer SOLVER.WARMUP_ITERS, or "
                "SOLVER.CLIP_GRADIENTS.ENABLED True."
            ) from error

    def save_checkpoint(self):
        """Saves the state after iteration ``iter`` unless it is saved. All ranks must call it."""
        average_running_statistics(self.model)
        self._save()
        comm.synchronize()

    def _save(self):
        if self.checkpointer.saved_iteration != self.iter:
            self.checkpointer.save(f"model_{self.iter:07d}", iteration=self.iter)

    def _evaluate(self):
        if self.iter == self.max_iter - 1:
            # Only a last step that failed or was stopped comes here: detectron2's hook skips it
            # during the training, and takes it for a success afterwards.
            return None
        try:
            with self._stop.at_once():
                self._last_eval_results = self.test(self._evaluation_config(), self.model)
        except (InputError, Stopped):
            if self.iter < self.max_iter:  # after the last step all is saved
                self._save()
            raise
        return self._last_eval_results

    def _evaluation_config(self):
        """The config for evaluations during the training, without test-time augmentation, which
        takes many times longer and is left to the end."""
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.TEST.AUG.ENABLED = cfg.TEST.AUG.ENABLED and self.iter >= self.max_iter
        return cfg

    def state_dict(self):
        """What a checkpoint has to hold beside the model."""
        # detectron2 0.4's does not have the optimizer, newer ones do.
        state = TrainerBase.state_dict(self)
        state["_trainer"] = self._trainer.state_dict()
        state["seed"] = self.seed
        state["config"] = plain(self.cfg)
        return state

    def load_state_dict(self, state_dict):
        """Restores :meth:`state_dict`, with the settings of the config.

        Raises:
            InputError: the state is that of another optimizer, as with another config.
        """
        before = state_dict.get("config")  # older checkpoints have none
        if before is not None:
            check_same_scaling(before, plain(self.cfg))
        settings = optimizer_settings(self._trainer.optimizer)
        try:
            TrainerBase.load_state_dict(self, state_dict)
            self._trainer.load_state_dict(state_dict["_trainer"])
            self.seed = state_dict["seed"]
        except (KeyError, ValueError) as error:
            raise InputError(
                f"The checkpoint in {self.cfg.OUTPUT_DIR} is not of a run like this one "
                f"({one_line(error)}{describe_changes(before, plain(self.cfg))}): resume with the config "
                "and the detectron2 it was started with, or give the checkpoint as MODEL.WEIGHTS of a new "
                "run."
            ) from error
        if self.iter < self.max_iter:  # otherwise nothing is left to train, and no rate is defined
            set_optimizer_settings(self._trainer.optimizer, self.scheduler, settings)
        if before is not None:
            report_changes(before, plain(self.cfg), self.iter + 1, self.scheduler)
        if self.cfg.SEED not in (-1, self.seed):
            _logger.warning(
                "The resumed run has seed %d, and keeps it instead of SEED %d.",
                self.seed,
                self.cfg.SEED,
            )

    @classmethod
    def check_datasets(cls, cfg, keys=("TRAIN", "TEST")):
        """Checks the datasets of the config, unless :func:`load_config` has done so."""
        check_datasets_once(cfg, keys)

    @classmethod
    def build_train_loader(cls, cfg):
        """Builds the training loader, whose stream of batches can begin at any iteration.

        To use a mapper of your own, return
        ``kn_detectron.data.build_train_loader(cfg, mapper=mapper)``.

        Returns:
            TrainLoader
        """
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        """Builds the loader of a test dataset."""
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name, output_folder=None):
        """Builds the COCO evaluator of a test dataset.

        Args:
            cfg (CfgNode): detectron2's config.
            dataset_name (str): a registered dataset.
            output_folder (str or None): where its files go; None is OUTPUT_DIR/inference. As in
                detectron2's tools/train_net.py, test-time augmentation has a folder of its own.
        """
        return build_coco_evaluator(cfg, dataset_name, output_folder)

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        """Evaluates on DATASETS.TEST and writes OUTPUT_DIR/inference/results.json.

        With TEST.AUG.ENABLED it evaluates a second time with detectron2's test-time augmentation,
        whose results have the suffix "_TTA" and whose detections go to OUTPUT_DIR/inference_TTA.

        See ``DefaultTrainer.test`` for arguments and result.
        """
        check_test_augmentation(cfg)
        cls.check_datasets(cfg, ("TEST",))
        try:
            # detectron2 gives all modules the mode of the whole model afterwards, and would train
            # norms that were put into evaluation mode.
            with in_mode(model, training=False):
                results = super().test(cfg, model, evaluators)
                if cfg.TEST.AUG.ENABLED:
                    if comm.is_main_process():
                        write_results(cfg, results)  # what follows takes long
                    results.update(cls._test_with_augmentation(cfg, model, evaluators))
        except InputError as error:
            raise InputError(first_sentence(error)) from error
        if comm.is_main_process():
            write_results(cfg, results)
        return results

    @classmethod
    def _test_with_augmentation(cls, cfg, model, evaluators):
        _logger.info("Evaluating with test-time augmentation.")
        if evaluators is None:
            folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
            evaluators = [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
        results = super().test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return {f"{task}_TTA": numbers for task, numbers in results.items()}


def _resumable(loader):
    if not hasattr(loader, "start_iter"):
        raise InputError(
            f"build_train_loader returned a {type(loader).__name__}, which cannot go on where a run "
            "was interrupted: return kn_detectron.data.build_train_loader(cfg, mapper=...)."
        )
    return loader


def _with_class_names(cfg):
    """The config with the names of the classes, which predictors elsewhere do not know otherwise."""
    if cfg.DATASETS.CLASS_NAMES or not cfg.DATASETS.TRAIN:
        return cfg
    names = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes")
    if names:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.DATASETS.CLASS_NAMES = list(names)
    return cfg


def _check_reference_world_size(cfg):
    size = cfg.SOLVER.REFERENCE_WORLD_SIZE
    if size and (size < 0 or cfg.SOLVER.IMS_PER_BATCH % size):
        raise InputError(
            f"SOLVER.REFERENCE_WORLD_SIZE is {size}, but must be the number of GPUs that "
            f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} is for, which divides it, or 0."
        )


@contextlib.contextmanager
def _without_tracebacks_of_input_errors():
    """Keeps detectron2 from logging a traceback of an exception that is reported in a sentence."""

    def is_worth_it(record):
        error = record.exc_info[1] if record.exc_info else None
        return not (isinstance(error, expected) or is_full_disk(error))

    expected = (InputError, FloatingPointError)
    logger = logging.getLogger("detectron2.engine.train_loop")
    logger.addFilter(is_worth_it)
    try:
        yield
    finally:
        logger.removeFilter(is_worth_it)
