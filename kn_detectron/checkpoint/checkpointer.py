"""detectron2's checkpointer, with writes that cannot be half done and loads that must fit."""

import logging
import os

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from ..errors import InputError
from ..layers import KN_STATE
from .calibration import calibrate, can_be_calibrated
from .files import atomic_write, check_pickle, read_torch_file, remove_partial_files
from .matching import check_tensors, essential_names, match

__all__ = ["KNCheckpointer"]

_logger = logging.getLogger(__name__)


class KNCheckpointer(DetectionCheckpointer):
    """Saves and loads as ``DetectionCheckpointer`` does, but trusts neither disk nor file.

    A checkpoint appears under its name when it is complete, and ``last_checkpoint`` names it only
    then, so that a killed run goes on from the last whole one.

    A checkpoint to start from must have the whole ResNet. When it is of BatchNorm, what Kalman
    Normalization adds is fitted to it (:func:`~kn_detectron.checkpoint.calibrate`); what has another shape, like the
    predictors of another number of classes, is left as initialised with a warning. To go on from a
    checkpoint or to evaluate it, everything must match. A file that does not give that leaves the
    model as it was and raises :class:`~kn_detectron.InputError`.

    Attributes:
        saved_iteration (int or None): iteration of the checkpoint that was saved last, if given.
    """

    def __init__(self, model, save_dir="", *, save_to_disk=None, **checkpointables):
        """
        Args:
            model (nn.Module): the model, possibly in DistributedDataParallel.
            save_dir (str): local folder of the checkpoints.
            save_to_disk (bool or None): whether to write; None is on the main process only.
            checkpointables: further objects with a state to save and load.
        """
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.saved_iteration = None
        self._source = None
        self._strict = False
        self._wanted = ()

    def remove_partial_files(self):
        """Removes what killed writes left in the folder; only for the one who writes there."""
        if self.save_dir and self.save_to_disk:
            remove_partial_files(self.save_dir)

    def save(self, name, **kwargs):
        """Writes the model and all checkpointables to ``<save_dir>/<name>.pth``.

        Args:
            name (str): file name without suffix.
            kwargs: further data for the file.

        Raises:
            InputError: the folder cannot be written to, or the disk is full.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data.update((key, obj.state_dict()) for key, obj in self.checkpointables.items())
        data.update(kwargs)
        basename = f"{name}.pth"
        path = os.path.join(self.save_dir, basename)
        _logger.info("Saving checkpoint to %s", path)
        try:
            with atomic_write(path) as file:
                torch.save(data, file)
            self.tag_last_checkpoint(basename)
        except (OSError, RuntimeError) as error:
            # torch, which cannot finish its archive, hides the file's error behind its own.
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            raise InputError(
                f"{path} cannot be written ({cause.strerror}): make room or make OUTPUT_DIR "
                "writable, then run the same command with --resume."
            ) from error
        self.saved_iteration = kwargs.get("iteration")

    def tag_last_checkpoint(self, last_filename_basename):
        """Makes a checkpoint the one to resume from."""
        with atomic_write(os.path.join(self.save_dir, "last_checkpoint")) as file:
            file.write(last_filename_basename.encode())

    def load(self, path, checkpointables=None, *, strict=None):
        """Loads a checkpoint.

        Args:
            path (str): local file or URL; nothing is loaded if empty.
            checkpointables (list[str] or None): which of the checkpointables to load, all if None.
            strict (bool or None): whether everything must match; None is if checkpointables is.

        Returns:
            dict: what else is in the checkpoint.

        Raises:
            InputError: the checkpoint cannot be had or read, or does not fit.
        """
        if not path:
            _logger.info("MODEL.WEIGHTS is empty: the model starts from scratch.")
            return {}
        self._source = path
        self._strict = checkpointables is None if strict is None else strict
        self._wanted = tuple(self.checkpointables if checkpointables is None else checkpointables)
        self._parsed_url_during_load = None  # newer versions leave it set when a load fails
        return super().load(self._local_file(path), checkpointables)

    def load_for_evaluation(self, path, *, resume=False):
        """Loads the model's state for evaluation: everything must match.

        Args:
            path (str): MODEL.WEIGHTS.
            resume (bool): whether the last checkpoint of the folder, if there is one, goes first.

        Raises:
            InputError: there is nothing to load, or see :meth:`load`.
        """
        if resume and self.has_checkpoint():
            path = self.get_checkpoint_file()
        if not path:
            raise InputError(
                "There are no weights to evaluate: set MODEL.WEIGHTS to a checkpoint, or give "
                "--resume with the OUTPUT_DIR of a training run."
            )
        self.load(path, checkpointables=[], strict=True)

    def _local_file(self, path):
        if "://" in path:
            try:
                local = self.path_manager.get_local_path(path)
            except Exception as error:  # each of iopath's handlers raises what its library does
                reason = " ".join(str(error).split()) or type(error).__name__
                raise InputError(
                    f"MODEL.WEIGHTS {path} cannot be downloaded ({reason}): give a local file "
                    'instead, or MODEL.WEIGHTS "" to train from scratch.'
                ) from error
            if os.path.isfile(local):
                return local
        elif os.path.isfile(path):
            return path
        tag = os.path.join(self.save_dir, "last_checkpoint")
        if self.has_checkpoint() and path == self.get_checkpoint_file():
            raise InputError(
                f"{path} does not exist although {tag} names it as the last checkpoint: put it "
                f"back, or put the name of another checkpoint into {tag}."
            )
        raise InputError(
            f"MODEL.WEIGHTS {path} does not exist: give the path of a checkpoint, or "
            'MODEL.WEIGHTS "" to train from scratch.'
        )

    def _load_file(self, filename):
        if filename.endswith((".pkl", ".pyth")):
            if filename.endswith(".pkl"):
                check_pickle(filename)
            return super()._load_file(filename)
        content = read_torch_file(filename)
        return content if "model" in content else {"model": content}

    def _load_model(self, checkpoint):
        lacking = [key for key in self._wanted if key not in checkpoint]
        if lacking:
            raise InputError(
                f"{self._source} has weights but no state of a training run ({lacking[0]} is "
                "missing): to start from it, give it as MODEL.WEIGHTS without --resume."
            )
        state = checkpoint["model"]
        check_tensors(state, self._source)
        self._convert_ndarray_to_tensor(state)
        consume_prefix_in_state_dict_if_present(state, "module.")
        model_state = self.model.state_dict()
        if checkpoint.get("matching_heuristics", False):
            state = self._align(model_state, state, checkpoint.get("__author__") == "Caffe2")
        found = match(model_state, state)
        self._check(found)
        for name, _, _ in found.misshapen:
            state.pop(name, None)
        incompatible = super()._load_model({"model": state})
        self._report(found)
        if any(name.rpartition(".")[2] in KN_STATE for name in found.missing):
            self._calibrate()
        return incompatible

    def _calibrate(self):
        """Fits the priors to a checkpoint that knows the statistics but nothing of priors."""
        if can_be_calibrated(self.model):
            changes = calibrate(self.model)
            _logger.info(
                "The priors of %d Kalman layers were set to the running statistics of the "
                "checkpoint.",
                len(changes),
            )
        else:
            _logger.warning(
                "The priors of the Kalman layers do not fit the weights of %s, which were not "
                "trained with them: MODEL.KN.GAIN should be near 1 at first. (Those of "
                'MODEL.RESNETS.NORM "KN" with MODEL.KN.VARIANT "network" would be fitted.)',
                self._source,
            )

    def _align(self, model_state, state, from_caffe2):
        try:
            return align_and_update_state_dicts(model_state, state, c2_conversion=from_caffe2)
        except ValueError as error:
            raise InputError(
                f"{self._source} does not fit the model ({error}): give weights of the same "
                "architecture in MODEL.WEIGHTS."
            ) from error

    def _check(self, found):
        if self._strict and (found.missing or found.misshapen or found.unused):
            raise InputError(
                f"{self._source} is not a checkpoint of this model ({found}): use the config that "
                "it was trained with, or give it as MODEL.WEIGHTS of a new training."
            )
        essential = found.only(essential_names(self.model))
        if essential.missing or essential.misshapen or not found.matched:
            shown = essential if essential.missing or essential.misshapen else found
            raise InputError(
                f"{self._source} is of another architecture than the model's backbone ({shown}): "
                "give weights of the same architecture in MODEL.WEIGHTS, set MODEL.BACKBONE and "
                'MODEL.RESNETS to theirs, or MODEL.WEIGHTS "" to train from scratch.'
            )

    def _report(self, found):
        of_kn = sum(name.rpartition(".")[2] in KN_STATE for name in found.missing)
        _logger.info(
            "Loaded %d tensors from %s; %d of the model keep their initial values, %d of them of "
            "Kalman Normalization; %d of the file are not used.",
            len(found.matched),
            self._source,
            len(found.missing) + len(found.misshapen),
            of_kn,
            len(found.unused),
        )
        if found.misshapen:
            _logger.warning(
                "%d tensors of %s have another shape than in the model, as with another number of "
                "classes, and keep their initial values: %s.",
                len(found.misshapen),
                self._source,
                ", ".join(name for name, _, _ in found.misshapen),
            )
