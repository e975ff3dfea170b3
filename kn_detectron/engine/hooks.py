"""What happens around a training step."""

import contextlib
import functools
import itertools
import logging
import random

import numpy as np
import torch
import torch.distributed as dist
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from ..checkpoint import calibrate
from ..checkpoint.calibration import predicted_priors
from ..layers import KN_STATE, KalmanNorm2d, kalman_layers, set_gain_scale
from ..layers.calibration import can_be_calibrated

__all__ = [
    "AverageRunningStatistics",
    "GainAnneal",
    "KalmanStatistics",
    "PreciseStatistics",
    "SeedStep",
    "average_running_statistics",
    "broadcast_filters",
    "unwrapped",
]


_logger = logging.getLogger(__name__)


def unwrapped(model):
    """The model inside of DistributedDataParallel, or the model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


class SeedStep(HookBase):
    """Seeds every random number generator before each step, from seed, rank and iteration.

    So a step samples the same anchors and regions whether or not the run was interrupted before it,
    and random numbers that an evaluation draws in between change nothing. The seed is the trainer's
    attribute ``seed``.
    """

    def before_step(self):
        """Seeds the step."""
        entropy = [self.trainer.seed, comm.get_rank(), self.trainer.iter]
        seeds = np.random.SeedSequence(entropy).generate_state(3)
        random.seed(int(seeds[0]))
        np.random.seed(seeds[1])
        torch.manual_seed(int(seeds[2]))


class GainAnneal(HookBase):
    """Lowers the gain of all Kalman layers over the schedule.

    The scale of the gains is 1 until ``start``, falls linearly, and is 0 from ``end`` on, as
    fractions of the trainer's ``max_iter``. When both are equal it is 1 throughout, also where
    the weights come from a checkpoint that was annealed.

    At gain 0 a layer has only its prior, and a network can learn around a prior that is far from
    the features. So before the first step in which the gain is lowered, the priors are calibrated
    to the running statistics, with which inference normalises (ours; see
    :func:`~kn_detectron.checkpoint.calibrate`). Layers of the paper variant, of GKN, without a
    process model, and in modules of other projects cannot be calibrated and keep their priors. If
    ``start`` is 0, the running statistics are those that were loaded, and the loading has
    calibrated to them.
    """

    def __init__(self, start, end):
        """
        Args:
            start, end (float): fractions of the schedule, start <= end.
        """
        self._start = start
        self._end = end
        self._scale = None

    def scale(self, iteration):
        """The scale in force during a step, in [0, 1]."""
        done = iteration / self.trainer.max_iter
        if self._start == self._end:
            return 1.0
        return min(1.0, max(0.0, (self._end - done) / (self._end - self._start)))

    def before_step(self):
        """Sets the scale of the step, and calibrates if it is the first one below 1."""
        scale = self.scale(self.trainer.iter)
        if self._start > 0 and scale < 1.0 and self._former_scale() == 1.0:
            self._calibrate()
        if scale != self._scale:
            set_gain_scale(unwrapped(self.trainer.model), scale)
            self._scale = scale

    def _former_scale(self):
        """The scale of the step before, which may be in a checkpoint of another schedule."""
        if self._scale is not None:
            return self._scale
        layers = kalman_layers(unwrapped(self.trainer.model)).values()
        return max((layer.gain_scale.item() for layer in layers), default=1.0)

    def _calibrate(self):
        average_running_statistics(self.trainer.model)  # or the ranks' weights would diverge
        model = unwrapped(self.trainer.model)
        layers = kalman_layers(model)
        names = [
            name for name, layer in layers.items() if layer.training and can_be_calibrated(layer)
        ]
        reached = predicted_priors(model) if names else ()
        calibrated = calibrate(model, [name for name in names if name in reached])
        broadcast_filters(model)
        _logger.info(
            "From here on the gain falls: calibrated the priors of %d layers to their running "
            "statistics.",
            len(calibrated),
        )


@torch.no_grad()
def broadcast_filters(model):
    """Gives all ranks the gains and process models of the first one.

    Each rank calibrates its priors for itself, and where GPUs differ, so does the last bit of a
    prediction.

    Args:
        model (nn.Module): every rank has to call this with its own.
    """
    if comm.get_world_size() == 1:
        return
    for layer in kalman_layers(model).values():
        for name, parameter in layer.named_parameters(recurse=False):
            if name in KN_STATE:
                dist.broadcast(parameter.detach(), src=0)


@torch.no_grad()
def average_running_statistics(model):
    """Makes the running statistics of all norm layers the same on all ranks: their averages.

    Every rank has taken part in every step with the same momentum, so all ranks have the same
    weight. The averaged variance is the variance within the batches of a rank, just as BatchNorm's
    is the variance within a batch.

    Args:
        model (nn.Module): every rank has to call this with its own.
    """
    world_size = comm.get_world_size()
    if world_size == 1:
        return
    statistics = [
        statistic
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
        for statistic in (module.running_mean, module.running_var)
    ]
    if not statistics:
        return
    flat = torch.cat([statistic.double().flatten() for statistic in statistics])
    dist.all_reduce(flat)
    flat /= world_size
    for statistic, part in zip(statistics, flat.split([s.numel() for s in statistics])):
        statistic.copy_(part.view_as(statistic))


class AverageRunningStatistics(HookBase):
    """Averages the running statistics over ranks where they are about to be used.

    Evaluation divides the images among the ranks, and only the main rank saves its state. Without
    this hook an AP mixes the statistics of all ranks and belongs to no checkpoint. Place it after
    PreciseBN and before the hooks that save and evaluate.
    """

    def __init__(self, periods):
        """
        Args:
            periods (Iterable[int]): the periods of the hooks that save and evaluate; 0 is never.
                The statistics are also averaged after the last step.
        """
        self._periods = [period for period in periods if period > 0]

    def after_step(self):
        """Averages if a period ends here."""
        done = self.trainer.iter + 1
        if done == self.trainer.max_iter or any(done % period == 0 for period in self._periods):
            average_running_statistics(self.trainer.model)


@contextlib.contextmanager
def _predictions_kept(model):
    """Leaves layers at gain 0 the posterior that they predict, which is the same for all batches."""
    posteriors = {}

    def keep(layer, args, output):
        posteriors[layer] = layer.running_mean.clone(), layer.running_var.clone()

    with contextlib.ExitStack() as added:
        for layer in kalman_layers(model).values():
            if isinstance(layer, KalmanNorm2d) and layer.training and not layer.measures:
                added.enter_context(layer.register_forward_hook(keep))
        yield
    for layer, (mean, var) in posteriors.items():
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(var)


class PreciseStatistics(hooks.PreciseBN):
    """detectron2's PreciseBN on batches that depend on nothing but the seed and the iteration.

    detectron2's PreciseBN reads on in a stream of images that a resumed run would begin anew. And it
    takes all variances for unbiased ones and makes them biased, also those that are predicted alone.
    """

    def update_stats(self):
        """Replaces the running statistics by those over the next batches of the training."""
        if not self._disabled:
            self._data_loader.seed = self.trainer.seed
            self._data_loader.start_iter = self.trainer.iter + 1
            self._data_iter = None
        with _predictions_kept(self._model):
            super().update_stats()


class KalmanStatistics(HookBase):
    """Puts the gain and the innovations of every Kalman layer into the event storage.

    The gain is ``kn/gain/<layer>``. The innovations are ``kn/innovation_mean/<layer>``, in standard
    deviations of the prior, and ``kn/innovation_logvar/<layer>``, both as averages of absolute
    values over the channels. ``kn/gain``, ``kn/innovation_mean`` and ``kn/innovation_logvar`` are
    averages over the layers. Heads of chains have neither gain nor innovation.

    For this the layers are measured a second time, in the logged steps only, and at gain 0 their
    convolutions run once more. Only the main process needs this hook. Its place is in front of the
    writers, which leave out what is stored behind them.
    """

    def __init__(self, period=20):
        """
        Args:
            period (int): iterations between two entries; the period of the writers is best.
        """
        self._period = period
        self._is_listening = False
        self._innovations = {}

    def before_train(self):
        """Warns if the writers come first."""
        earlier = itertools.takewhile(lambda hook: hook is not self, self.trainer._hooks)
        if any(isinstance(hook, hooks.PeriodicWriter) for hook in earlier):
            _logger.warning(
                "KalmanStatistics stands behind a PeriodicWriter, which will write nothing of it: "
                "register it in front, as in build_hooks of a trainer."
            )

    def before_step(self):
        """Starts to listen to the layers in a step that is logged."""
        done = self.trainer.iter + 1
        if done % self._period != 0 and done != self.trainer.max_iter:
            return
        self._is_listening = True
        for name, layer in self._layers().items():
            layer.observer = functools.partial(self._listen, name)

    def _layers(self):
        return kalman_layers(unwrapped(self.trainer.model))

    def _listen(self, name, *innovation):
        averages = torch.stack([part.abs().mean() for part in innovation])
        self._innovations.setdefault(name, []).append(averages)

    def _stop_listening(self):
        self._is_listening = False
        for layer in self._layers().values():
            layer.observer = None

    def after_step(self):
        """Stores what was heard."""
        if not self._is_listening:
            return
        self._stop_listening()
        gains = {name: layer.gain.detach() for name, layer in self._layers().items()}
        self._put(["gain"], {name: gain[None] for name, gain in gains.items()})
        self._put(
            ["innovation_mean", "innovation_logvar"],
            {name: torch.stack(heard).mean(0) for name, heard in self._innovations.items()},
        )
        self._innovations.clear()

    def _put(self, kinds, values):
        if not values:
            return
        table = torch.stack(list(values.values())).double()
        rows = torch.cat([table, table.mean(0, keepdim=True)]).tolist()  # one wait for the GPU
        for suffix, row in zip([f"/{name}" for name in values] + [""], rows):
            for kind, value in zip(kinds, row):
                self.trainer.storage.put_scalar(f"kn/{kind}{suffix}", value, smoothing_hint=False)

    def after_train(self):
        """Stops listening if a step failed."""
        self._stop_listening()
