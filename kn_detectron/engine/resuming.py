"""Resuming with a config that has changed.

The state of an optimizer and of a schedule holds settings beside what was learned, so loading it
brings the former settings back. Here the settings of the new config are put in force, and the log
says which of its keys no longer decide anything.
"""

import logging
from typing import Any, Dict, Iterator, List, Optional, Tuple

import yaml
from detectron2.config import CfgNode
from detectron2.solver.lr_scheduler import LRMultiplier
from torch.optim import Optimizer

from ..errors import InputError

__all__ = [
    "check_same_scaling",
    "describe_changes",
    "optimizer_settings",
    "plain",
    "report_changes",
    "set_optimizer_settings",
]

_logger = logging.getLogger(__name__)

# Keys that the checkpoint decides, with the reason.
_NOT_IN_FORCE = {
    "MODEL.KN.GAIN": "the gains are those of the checkpoint",
    "MODEL.WEIGHTS": "the weights are those of the checkpoint",
}
# Those that it decides as well if the scheduler is one of the trainer's own.
_OF_OPTIMIZER = tuple(
    f"SOLVER.{name}"
    for name in (
        "BASE_LR",
        "BIAS_LR_FACTOR",
        "MOMENTUM",
        "NESTEROV",
        "WEIGHT_DECAY",
        "WEIGHT_DECAY_BIAS",
        "WEIGHT_DECAY_NORM",
    )
)
# The trainer reports the seed itself, since the config may leave it to chance. A folder may move.
# The names are noted for predictors.
_UNREPORTED = ("SEED", "OUTPUT_DIR", "DATASETS.CLASS_NAMES")


def plain(cfg: CfgNode) -> Dict[str, Any]:
    """A config as plain containers, for a checkpoint."""
    return yaml.safe_load(cfg.dump())


def report_changes(before: Dict[str, Any], now: Dict[str, Any], iteration: int, scheduler) -> None:
    """Logs which keys of the config differ, with both values, and whether they are in force.

    Args:
        before: the config that the checkpoint was written with, by :func:`plain`.
        now: that of the resumed run.
        iteration: the first one of the resumed run.
        scheduler: of the resumed run, as in :func:`set_optimizer_settings`.
    """
    changed = dict(_changes(before, now))
    not_in_force = dict(_NOT_IN_FORCE)
    if not isinstance(scheduler, LRMultiplier):
        reason = f"a {type(scheduler).__name__} goes on with the settings of the checkpoint"
        not_in_force.update(dict.fromkeys(_OF_OPTIMIZER, reason))
    in_force = _texts(changed, (*not_in_force, *_UNREPORTED))
    if in_force:
        _logger.info(
            "From iteration %d on other settings are in force: %s.", iteration, ", ".join(in_force)
        )
    for key, reason in not_in_force.items():
        if key in changed:
            old, new = changed[key]
            _logger.warning(
                "%s %r is not in force in the resumed run, which began with %r: %s.",
                key,
                new,
                old,
                reason,
            )


def check_same_scaling(before: Dict[str, Any], now: Dict[str, Any]) -> None:
    """Checks that SOLVER.REFERENCE_WORLD_SIZE has scaled the schedule as before.

    detectron2 scales batch, learning rate and schedule with the number of processes. The iteration
    in the checkpoint counts steps of the former batch.

    Args:
        before: the config that the checkpoint was written with, by :func:`plain`.
        now: that of the resumed run.

    Raises:
        InputError: the number of processes is another one.
    """
    former, present = (c["SOLVER"].get("REFERENCE_WORLD_SIZE", 0) for c in (before, now))
    if former and present and former != present:
        raise InputError(
            f"SOLVER.REFERENCE_WORLD_SIZE has scaled this run to {former} processes, and now there "
            f"are {present}, so its iterations are of another length: resume with as many as "
            "before, or give the checkpoint as MODEL.WEIGHTS of a new run."
        )


def describe_changes(before: Optional[Dict[str, Any]], now: Dict[str, Any]) -> str:
    """What a sentence about a checkpoint that does not fit says of the config.

    Args:
        before: the config that the checkpoint was written with, or None if it has none.
        now: the present one.
    """
    changed = dict(_changes(before, now)) if before is not None else {}
    texts = _texts(changed, _UNREPORTED)
    return f"; other keys than before are {', '.join(texts)}" if texts else ""


def _texts(changed, left_out) -> List[str]:
    return [
        f"{key} {new!r} (before: {old!r})"
        for key, (old, new) in changed.items()
        if key not in left_out
    ]


def _changes(before, now, prefix: str = "") -> Iterator[Tuple[str, Tuple[Any, Any]]]:
    for key in {**before, **now}:
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _changes(old, new, f"{prefix}{key}.")
        elif old != new:
            yield prefix + key, (old, new)


def optimizer_settings(optimizer: Optimizer) -> List[Dict[str, Any]]:
    """The settings of each group of parameters: learning rate, momentum, weight decay, ..."""
    return [
        {name: value for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]


def set_optimizer_settings(optimizer: Optimizer, scheduler, settings: List[Dict[str, Any]]) -> None:
    """Puts the settings of a new optimizer in force in one whose state was loaded.

    A scheduler that is not detectron2's may compute each learning rate from the one before, and may
    change other settings too. Then everything stays as it was loaded.

    Args:
        optimizer: with loaded state; it keeps its momentum.
        scheduler: of the optimizer, at the iteration where the run goes on. If it is an
            ``LRMultiplier``, the learning rate becomes its multiplier there times the initial rate
            of the settings.
        settings: from :func:`optimizer_settings`, taken after the scheduler had been built.
    """
    if not isinstance(scheduler, LRMultiplier):
        return
    for group, setting in zip(optimizer.param_groups, settings):
        group.update(setting)
    scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    for group, lr in zip(optimizer.param_groups, scheduler.get_lr()):
        group["lr"] = lr
