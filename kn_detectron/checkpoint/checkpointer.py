"""detectron2's checkpointer, with atomic writes and with loads that check that everything fits."""

import contextlib
import logging
import os

import torch
from detectron2.checkpoint import DetectionCheckpointer

from ..errors import InputError, one_line
from ..files import (
    atomic_write,
    explained_write_errors,
    fetch,
    remove_partial_files,
    unreadable_type,
)
from ..layers import KalmanNorm2d, kalman_layers
from ..layers.calibration import is_fresh
from .conventions import CHECKPOINT_KEY, Conventions, differences
from .loading import load_weights
from .sources import read_weights

__all__ = ["KNCheckpointer"]

_logger = logging.getLogger(__name__)


class KNCheckpointer(DetectionCheckpointer):
    """Saves and loads as ``DetectionCheckpointer`` does, but trusts neither disk nor file.

    A checkpoint appears under its name when it is complete, and only then ``last_checkpoint`` names
    it. So a run that was killed goes on from the last complete one.

    A checkpoint to start from may be of any kind that :func:`~kn_detectron.checkpoint.read_weights`
    knows, and must have the whole ResNet. If it has BatchNorm, the priors are calibrated to it
    (:func:`~kn_detectron.checkpoint.calibrate`). Tensors of another shape, such as the predictors
    of another number of classes, keep their initial values, with a warning. A warning also says
    where the config has other pixels or strides than the weights presuppose.

    To resume or evaluate a checkpoint, everything must match. A file that does not fit leaves the
    model as it was and raises :class:`~kn_detectron.InputError`.

    Attributes:
        saved_iteration (int or None): the iteration of the checkpoint that was saved last, if the
            caller named one.
    """

    def __init__(self, model, save_dir="", *, save_to_disk=None, **checkpointables):
        """
        Args:
            model (nn.Module): the model, possibly in DistributedDataParallel.
            save_dir (str): local folder of the checkpoints.
            save_to_disk (bool or None): whether to write; None writes on the main process only.
            checkpointables: further objects with a state to save and load.
        """
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.saved_iteration = None
        self._source = None
        self._weights = None
        self._strict = False
        self._wanted = ()

    def remove_partial_files(self):
        """Removes what killed writes left in the folder. Only the process that writes there may."""
        if self.save_dir and self.save_to_disk:
            remove_partial_files(self.save_dir)

    def save(self, name, **kwargs):
        """Writes the model and all checkpointables to ``<save_dir>/<name>.pth``.

        Args:
            name (str): file name without suffix.
            kwargs: further data for the file.

        Raises:
            InputError: the folder cannot be written to, the disk is full, or a state holds more than
                tensors and plain containers, so that the file could not be loaded again.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data.update((key, obj.state_dict()) for key, obj in self.checkpointables.items())
        data.update(kwargs)
        conventions = Conventions.of_model(self.model)
        if conventions.known:
            data[CHECKPOINT_KEY] = conventions.to_dict()
        basename = f"{name}.pth"
        path = os.path.join(self.save_dir, basename)
        _logger.info("Saving checkpoint to %s", path)
        advice = "make room or make OUTPUT_DIR writable, then run the same command with --resume."
        with explained_write_errors(path, advice):
            os.makedirs(self.save_dir, exist_ok=True)
            with atomic_write(path) as file:
                torch.save(data, file)
                file.flush()
                _check_that_it_can_be_read(file.name)
            self.tag_last_checkpoint(basename)
        self.saved_iteration = kwargs.get("iteration")

    def tag_last_checkpoint(self, last_filename_basename):
        """Makes a checkpoint the one to resume from."""
        with atomic_write(self._tag_file()) as file:
            file.write(last_filename_basename.encode())

    def forget_last_checkpoint(self):
        """Makes no checkpoint the one to resume from. The files stay."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._tag_file())

    def _tag_file(self):
        return os.path.join(self.save_dir, "last_checkpoint")

    def load(self, path, checkpointables=None, *, strict=None):
        """Loads a checkpoint.

        Args:
            path (str): local file or URL; nothing is loaded if empty.
            checkpointables (list[str] or None): which of the checkpointables to load; None loads
            all.
            strict (bool or None): whether everything must match. None means strict if
                checkpointables are loaded too, as when a run is resumed.

        Returns:
            dict: what else is in the checkpoint.

        Raises:
            InputError: the checkpoint is not there, cannot be read, or does not fit.
        """
        if not path:
            _logger.info("MODEL.WEIGHTS is empty: the model starts from scratch.")
            if _only_predicts_from_scratch(self.model):
                _logger.warning(
                    "At gain 0 a deep network does not start from scratch: give MODEL.WEIGHTS of a "
                    "trained network, or MODEL.KN.GAIN 0.1 MODEL.KN.LEARN_GAIN True."
                )
            return {}
        self._source = path
        self._wanted = tuple(self.checkpointables if checkpointables is None else checkpointables)
        self._strict = bool(self._wanted) if strict is None else strict
        if self._reads_queries():
            self._parsed_url_during_load = None  # it stays set when a load fails
        return super().load(self._local_file(path), checkpointables)

    def load_for_evaluation(self, path, *, resume=False):
        """Loads the model's state for evaluation: everything must match.

        Args:
            path (str): MODEL.WEIGHTS.
            resume (bool): whether the last checkpoint of the folder, if there is one, goes first.

        Raises:
            InputError: there is nothing to load, the checkpoint cannot be read, or it does not fit.
        """
        if resume and self.has_checkpoint():
            path = self.get_checkpoint_file()
        if not path:
            raise InputError(
                "There are no weights to evaluate: set MODEL.WEIGHTS to a checkpoint, or give "
                "--resume with the OUTPUT_DIR of a training run."
            )
        self.load(path, checkpointables=[], strict=True)

    def _reads_queries(self):
        """Whether this version of detectron2 takes what follows a question mark for a query."""
        return hasattr(self, "_parsed_url_during_load")

    def get_checkpoint_file(self):
        """The last checkpoint of the folder.

        Returns:
            str: its path; empty if there is no checkpoint yet.

        Raises:
            InputError: the file "last_checkpoint" names none, or one that is not there.
        """
        tag, path = self._tag_file(), super().get_checkpoint_file()
        if not path:
            return path
        if not os.path.basename(path):  # a disk that was full may leave it empty
            raise InputError(
                f"{tag} is empty, but must name the last checkpoint: put the name of one beside it "
                "into it."
            )
        if not os.path.isfile(path):
            raise InputError(
                f"{path} does not exist although {tag} names it as the last checkpoint: put it "
                f"back, or put the name of another checkpoint into {tag}."
            )
        return path

    def _local_file(self, path):
        try:
            local = fetch(path)
            if "?" in local and self._reads_queries():
                raise InputError(
                    f"{local} has a question mark in its path, behind which this detectron2 reads no "
                    "further: give a copy without one"
                )
            return local
        except InputError as error:
            otherwise = "" if self._strict else ', or MODEL.WEIGHTS "" to train from scratch'
            raise InputError(f"MODEL.WEIGHTS {one_line(error)}{otherwise}.") from error

    def _load_file(self, filename):
        self._weights = read_weights(filename, own=self.model.state_dict())
        return {**self._weights.rest, "model": self._weights.state}

    def _load_model(self, checkpoint):
        weights, self._weights = self._weights, None  # it is large, and of no use after this
        del checkpoint["model"]
        lacking = [key for key in self._wanted if key not in checkpoint]
        if lacking:
            raise InputError(
                f"{self._source} has weights but no state of a training run ({lacking[0]} is "
                "missing): to start from it, give it as MODEL.WEIGHTS without --resume."
            )
        load_weights(self.model, weights, self._source, strict=self._strict)
        clauses = differences(weights.conventions, Conventions.of_model(self.model))
        if clauses:
            _logger.warning(
                "%s was trained with %s: set these keys to what it was trained with, or its "
                "features will not be what they were.",
                self._source,
                ", ".join(clauses),
            )
        # Nothing is returned, since detectron2 would report it once more.


def _only_predicts_from_scratch(model):
    layers = [layer for layer in kalman_layers(model).values() if not layer.is_head]
    return bool(layers) and all(
        isinstance(layer, KalmanNorm2d)
        and layer.gain == 0
        and layer.track_running_stats
        and is_fresh(layer)
        for layer in layers
    )


def _check_that_it_can_be_read(path):
    """Now, and not when a run that was interrupted needs the checkpoint."""
    unreadable = unreadable_type(path)
    if unreadable:
        raise InputError(
            f"The state of a hook or checkpointable holds a {unreadable}, which is not read from "
            "checkpoints, since it could run code: return tensors, numbers, strings, lists and dicts "
            "from its state_dict()."
        )
