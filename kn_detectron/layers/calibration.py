"""Calibration of one layer: the process model that makes its prior equal its running statistics.

The prior comes from whoever runs the chain. This is :class:`~kn_detectron.layers.KalmanNetwork`,
or :mod:`kn_detectron.checkpoint.calibration` for detectors.
"""

import contextlib
import logging
import math
from typing import Callable, Dict

import torch
from torch import nn

from .belief import Belief
from .kalman_norm import KalmanNorm2d

__all__ = ["can_be_calibrated", "fit_prior", "is_fresh", "on_priors"]

_logger = logging.getLogger(__name__)

# If a channel does not vary in the prediction or in the checkpoint, its exact b or r is infinite.
_LARGEST_OFFSET = 1e3
_LARGEST_LOG_SCALE = 50.0
# Of a channel that does not vary, what is this small beside eps changes nothing.
_NEGLIGIBLE = 1e-6


def can_be_calibrated(layer: nn.Module) -> bool:
    """Whether the process model of a layer can make its prior equal to its running statistics."""
    return (
        isinstance(layer, KalmanNorm2d)
        and not layer.is_head
        and layer.variant == "network"
        and layer.has_process_model
        and layer.track_running_stats
    )


def is_fresh(layer: KalmanNorm2d) -> bool:
    """Whether the running statistics of a layer are those of a new one, 0 and 1, or on "meta"."""
    if layer.running_mean.is_meta:  # it has no values yet
        return True
    return bool((layer.running_mean == 0).all() and (layer.running_var == 1).all())


@torch.no_grad()
def fit_prior(layer: KalmanNorm2d, prior: Belief) -> float:
    """Sets b and r of a layer so that its processed prior equals its running statistics.

    A channel that is dead in the prediction and in the statistics gets r = 0, and b = 0 if its means
    agree: eps alone decides what comes of it. The quotient of two numbers near 0, such as 1e5, would
    make no difference now, and a loss of NaN as soon as the filter has moved. b is at most 1000
    standard deviations of the prediction: where a channel that hardly varies needs more, its prior
    stays off by the rest.

    Args:
        layer: a layer for which :func:`can_be_calibrated` is true.
        prior: the belief predicted for it, shape (1, C).

    Returns:
        float: the largest change that the process model makes, of a mean in standard deviations or
        of a log variance.
    """
    mean, var = (v[0] for v in prior)
    # In the dtype of the prior: the smallest number of half precision is larger than many variances.
    running_mean, running_var = (v.to(var.dtype) for v in (layer.running_mean, layer.running_var))
    tiny = torch.finfo(var.dtype).tiny
    difference = running_mean - mean
    offset = difference / var.clamp_min(tiny).sqrt()
    log_scale = running_var.clamp_min(tiny).log() - var.clamp_min(tiny).log()
    dead = torch.maximum(running_var, var) <= _NEGLIGIBLE * layer.eps
    log_scale.masked_fill_(dead, 0.0)
    dead &= difference.abs() <= _NEGLIGIBLE * math.sqrt(layer.eps)
    offset.masked_fill_(dead, 0.0)
    layer.mean_offset.copy_(offset.clamp(-_LARGEST_OFFSET, _LARGEST_OFFSET))
    layer.log_var_scale.copy_(log_scale.clamp(-_LARGEST_LOG_SCALE, _LARGEST_LOG_SCALE))
    return max(layer.mean_offset.abs().max().item(), layer.log_var_scale.abs().max().item())


@contextlib.contextmanager
def on_priors(layers: Dict[str, nn.Module], action: Callable):
    """Calls ``action(name, prior)`` whenever one of the layers is given its prior.

    A warning names a layer that is called again with another prior, as where levels share it.
    """
    first: Dict[str, Belief] = {}

    def hook_of(name):
        def hook(layer, args, kwargs):
            prior = kwargs["prior"]
            before = first.setdefault(name, prior)
            again = before is not prior and can_be_calibrated(layer)
            if again and not all(map(torch.allclose, before, prior)):
                _logger.warning(
                    "%s is called more than once, with different priors, and its process model can "
                    "only fit the last: at gain 0 it does not compute what the BatchNorm computed. "
                    "Give each call a norm of its own.",
                    name,
                )
            action(name, prior)

        return hook

    with contextlib.ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(hook_of(name), with_kwargs=True))
        yield
