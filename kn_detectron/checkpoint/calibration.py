"""Calibration: makes the priors of a chain equal to the running statistics of its layers.

A network that was trained with BatchNorm knows the mean and variance of every feature: they are its
running statistics. The network variant's process model has two numbers per channel, just enough to
correct each prior to them. Since those priors depend on parameters only, one pass over the weights
does it, without data.
"""

import dataclasses
from typing import Dict

import torch
from torch import nn

from ..errors import InputError
from ..layers import Belief, ClosedFormTransition, KalmanNorm2d, kalman_layers
from ..modeling import Feature, KNRes5ROIHeads, KNResNet
from ..modeling.resnet import belief_keys

__all__ = ["calibrate", "can_be_calibrated"]

# Where nothing varies, in the prediction or in the checkpoint, the exact corrections are infinite.
_LARGEST_OFFSET = 1e6
_LARGEST_LOG_SCALE = 50.0


def can_be_calibrated(model: nn.Module) -> bool:
    """Whether the model has Kalman layers, all with moving statistics and a process model for them."""
    layers = kalman_layers(model).values()
    return bool(layers) and all(_is_fit(layer) for layer in layers)


def _is_fit(layer: nn.Module) -> bool:
    return (
        isinstance(layer, KalmanNorm2d)
        and layer.variant == "network"
        and layer.has_process_model
        and layer.track_running_stats
    )


@torch.no_grad()
def calibrate(model: nn.Module) -> Dict[str, float]:
    """Sets b and r of every KN layer of a detector or backbone so that its prior is its statistics.

    For a prediction (m, v) and running statistics (mu, var) the process model becomes (ours)::

        b = (mu - m) / sqrt(v)        r = log(var / v)

    so that (m + b sqrt(v), v exp(r)) = (mu, var). With the gain near 0 the model then computes in
    training what the frozen BatchNorm model computes, at any batch size; and when a filter changes,
    its prior follows.

    Args:
        model: holds :class:`~kn_detectron.modeling.KNResNet`, and maybe C4 heads, of the network
            variant with a process model. Predictions are made in closed form, also where the model
            samples them.

    Returns:
        dict: by layer, the largest change of log variance or mean (in deviations) that was made.

    Raises:
        InputError: if a layer has no process model that could be set.
    """
    layers = kalman_layers(model)
    for name, layer in layers.items():
        if not _is_fit(layer):
            raise InputError(
                f"{name} cannot be calibrated, for which it takes moving statistics and a process "
                'model that can express them: set MODEL.RESNETS.NORM "KN", MODEL.KN.VARIANT '
                '"network" and MODEL.KN.PROCESS_MODEL True'
            )
    changes = {}

    def fit(name):
        def hook(module, args, kwargs):
            changes[name] = _fit(module, kwargs["prior"])

        return hook

    handles = [
        layer.register_forward_pre_hook(fit(name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    modes = [(module, module.training) for module in model.modules()]
    chains = [(module, module.chain) for module in model.modules() if hasattr(module, "chain")]
    try:
        model.train()
        for module, chain in chains:  # sampled priors would put their noise into b and r
            module.chain = dataclasses.replace(chain, transition=ClosedFormTransition())
        _pass_beliefs(model)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
        for module, chain in chains:
            module.chain = chain
    return changes


def _pass_beliefs(model: nn.Module) -> None:
    """Runs the chains on batches of no images, which carry beliefs and change no statistic."""
    beliefs = {}
    for module in model.modules():
        if isinstance(module, KNResNet):
            weight = module.stem.conv1.weight
            beliefs.update(module(weight.new_zeros(0, weight.shape[1], 64, 64)))
    for module in model.modules():
        if isinstance(module, KNRes5ROIHeads):
            mean, var = (beliefs[key] for key in belief_keys(module.in_features[0]))
            regions = mean.new_zeros(0, mean.shape[1], 14, 14)
            module.res5(Feature(regions, Belief(mean, var)))


def _fit(layer: KalmanNorm2d, prior: Belief) -> float:
    mean, var = (v[0].to(layer.running_var.dtype) for v in prior)
    tiny = torch.finfo(var.dtype).tiny
    offset = (layer.running_mean - mean) / var.clamp_min(tiny).sqrt()
    log_scale = layer.running_var.clamp_min(tiny).log() - var.clamp_min(tiny).log()
    layer.mean_offset.copy_(offset.clamp(-_LARGEST_OFFSET, _LARGEST_OFFSET))
    layer.log_var_scale.copy_(log_scale.clamp(-_LARGEST_LOG_SCALE, _LARGEST_LOG_SCALE))
    return max(layer.mean_offset.abs().max().item(), layer.log_var_scale.abs().max().item())
