"""Calibration: makes the priors of a chain equal to the running statistics of its layers.

A network that was trained with BatchNorm knows the mean and variance of every feature: they are its
running statistics. The network variant's process model has two numbers per channel, just enough to
correct each prior to them. Since those priors depend on parameters only, one pass over the weights
does it, without data. The paper's process model, which only widens a prior, cannot do that.
"""

import contextlib
import dataclasses
import math
import os
from typing import Dict, Iterable, Optional

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..layers import Belief, ClosedFormTransition, KalmanNetwork, KalmanNorm2d, kalman_layers
from ..layers.calibration import can_be_calibrated, fit_prior, is_fresh, on_priors
from ..layers.gain import logit_of
from ..layers.mixin import INITIAL_PROCESS_NOISE
from ..layers.modes import in_mode
from ..modeling import (
    KNFPN,
    ChainConfig,
    Features,
    KNCascadeROIHeads,
    KNNetwork,
    KNRes5ROIHeads,
    KNResNet,
    KNRetinaNet,
    KNStandardROIHeads,
)

__all__ = ["calibrate", "fit_process_noise", "predicted_priors"]

# For the paper variant: the smallest R, with which layers start anyway, and a gain near BatchNorm.
_LEAST_NOISE = math.log1p(math.exp(INITIAL_PROCESS_NOISE))
_SAFE_GAIN = 0.9

# What gives heads the beliefs about the backbone's features.
_WITH_HEADS = (KNCascadeROIHeads, KNRes5ROIHeads, KNRetinaNet, KNStandardROIHeads)


@torch.no_grad()
def calibrate(model: nn.Module, names: Optional[Iterable[str]] = None) -> Dict[str, float]:
    """Sets b and r of the KN layers of a detector or backbone so that priors equal statistics.

    For a prediction (m, v) and running statistics (mu, var) the process model becomes (ours)::

        b = (mu - m) / sqrt(v)        r = log(var / v)

    so that (m + b sqrt(v), v exp(r)) = (mu, var). With a gain near 0 the model then computes in
    training what the model with frozen BatchNorm computes, at any batch size. When a filter
    changes, its prior follows.

    Args:
        model: holds a :class:`~kn_detectron.modeling.KNResNet`, and possibly an FPN and heads, of
            the network variant with a process model. Predictions are made in closed form, even if
            the model samples them.
        names: the layers to set. None sets all but new ones, whose running statistics, 0 and 1,
            nobody has measured. Other layers stay as they are.

    Returns:
        dict: for each layer the largest change of a log variance, or of a mean in standard
        deviations.

    Raises:
        InputError: if there is no KN layer, a layer has no process model that could be set, or no
            chain of this package leads to it. The model is then as it was.
    """
    layers = _chosen(model, names)
    if names is None and not layers:
        raise InputError(
            f"{type(model).__name__} has no KN layer that could be calibrated: convert it first, or "
            'build it with MODEL.RESNETS.NORM "KN"'
        )
    for name, layer in layers.items():
        if not can_be_calibrated(layer):
            raise InputError(
                f"{name} cannot be calibrated, for which it takes moving statistics and a process "
                'model that can express them: set MODEL.RESNETS.NORM "KN", MODEL.KN.VARIANT '
                '"network" and MODEL.KN.PROCESS_MODEL True'
            )
    if names is None:
        layers = {name: layer for name, layer in layers.items() if not is_fresh(layer)}
    if not layers:  # as when a gain is annealed that belongs to GKN alone
        return {}
    priors = _priors_of(layers, model)
    return {name: fit_prior(layer, priors[name]) for name, layer in layers.items()}


@torch.no_grad()
def fit_process_noise(model: nn.Module, names: Optional[Iterable[str]] = None) -> int:
    """Fits layers of the paper variant to BatchNorm weights, as far as they allow.

    Their prior is a prediction about un-normalised features, and R can only widen it. R becomes
    max(var - v, softplus(-5)), so that no prior is narrower than the running variance. Each
    prediction v is made from the running statistics of the layer below. The mean of the prior stays
    wrong, and so does a variance that is too large. Therefore a learned gain is raised to 0.9,
    where the measurement prevails. A fixed gain is a decision of the user and is left alone.

    This is far from exact. On the slim ResNet-50 of the tests, with two images of 96 pixels in
    training, the res4 features differ from those of the frozen network by 0.80 of their 2-norm.
    Live BatchNorm differs by 0.90, and the calibrated network variant by 0.23 at gain 0.02 and by
    6e-6 at gain 0. With the gain left at 0.1 the paper variant would differ by 1.03.

    Args:
        model: as for :func:`calibrate`, of the paper variant.
        names: the layers to set; None sets all.

    Returns:
        int: how many gains were raised.

    Raises:
        InputError: if a layer is not of the paper variant with moving statistics, or no chain of
            this package leads to it. The model is then as it was.
    """
    layers = _chosen(model, names)
    for name, layer in layers.items():
        if not _is_paper(layer):
            raise InputError(
                f"{name} is not a layer of the paper variant with moving statistics, whose process "
                'noise could be set: set MODEL.RESNETS.NORM "KN" and MODEL.KN.VARIANT "paper"'
            )
    with _passing_on_running_statistics(model):
        priors = _priors_of(layers, model)
    for name, layer in layers.items():
        _fit_noise(layer, priors[name])
    return sum(_raise_gain(layer) for layer in layers.values())


@torch.no_grad()
def predicted_priors(model: nn.Module) -> Dict[str, Belief]:
    """The prior of each layer that the chains of a KN model lead to. It changes nothing.

    These are the chains of this package's backbones, FPNs and heads, and of converted networks.
    Layers in modules of other projects, which hand over beliefs themselves, are not reached.

    Returns:
        dict: by the name of the layer, the prediction before its process model.

    Raises:
        InputError: heads continue a chain, and the backbone has none.
    """
    priors = {}
    with on_priors(kalman_layers(model), priors.__setitem__):
        _pass_beliefs(model)
    return priors


def _priors_of(layers: Dict[str, nn.Module], model: nn.Module) -> Dict[str, Belief]:
    priors = predicted_priors(model)
    unreached = [name for name in layers if name not in priors]
    if unreached:
        raise InputError(
            f"{len(unreached)} KN layers cannot be calibrated, the first {unreached[0]}, since no "
            "chain of this package's backbones and heads leads to them: name the others, and if "
            "two backbones lie beside one head, calibrate each detector by itself"
        )
    return priors


def _is_paper(layer: nn.Module) -> bool:
    return (
        isinstance(layer, KalmanNorm2d) and layer.variant == "paper" and layer.track_running_stats
    )


def _chosen(model: nn.Module, names: Optional[Iterable[str]]) -> Dict[str, nn.Module]:
    layers = kalman_layers(model)
    return layers if names is None else {name: layers[name] for name in names}


@contextlib.contextmanager
def _passing_on_running_statistics(model: nn.Module):
    """Makes the layers of the paper variant pass on their running statistics as their belief."""

    def replace(layer, args, output):
        return output[0], Belief(layer.running_mean[None], layer.running_var[None])

    with contextlib.ExitStack() as hooks:
        for layer in model.modules():
            if _is_paper(layer):
                hooks.enter_context(layer.register_forward_hook(replace))
        yield


def _pass_beliefs(model: nn.Module) -> None:
    """Runs the chains on empty batches, which carry beliefs and change no statistic."""
    parts = [m for m in model.modules() if isinstance(getattr(m, "chain", None), ChainConfig)]
    chains = [(module, module.chain) for module in parts]
    try:
        for module, chain in chains:  # sampled priors would be noisy
            module.chain = dataclasses.replace(chain, transition=ClosedFormTransition())
        with in_mode(model, training=True):
            _run_chains(model)
    finally:
        for module, chain in chains:
            module.chain = chain


class _KnownFeatures(Features):
    """Features among which one that is not there has no belief: the heads then say what to set."""

    def __missing__(self, name: str) -> Tensor:
        return torch.empty((0, 1, 1, 1))


def _run_chains(model: nn.Module) -> None:
    modules = dict(model.named_modules())
    # Also behind a wrapper, as torch.compile puts one around bottom_up.
    pyramids = {
        inner: module
        for module in modules.values()
        if isinstance(module, KNFPN)
        for inner in module.bottom_up.modules()
    }
    inside = {module.network for module in modules.values() if isinstance(module, KNNetwork)}
    features = {}
    for name, module in modules.items():
        if isinstance(module, KalmanNetwork) and module not in inside:
            module.pass_beliefs()
        if isinstance(module, (KNNetwork, KNResNet)):
            outputs = module.pass_beliefs()
            features[name] = pyramids[module].fuse(outputs) if module in pyramids else outputs
    for name, module in modules.items():
        if isinstance(module, _WITH_HEADS):
            below = _nearest(features, name)
            if below is not None:
                module.pass_beliefs(_KnownFeatures(below, below.beliefs))


def _nearest(features: Dict[str, Features], name: str) -> Optional[Features]:
    """The features of the backbone that shares most parents with a head. None: two share as many.

    A module may hold several detectors, such as a teacher and a student.
    """

    def parents_shared(backbone):
        return len(os.path.commonprefix([name.split("."), backbone.split(".")]))

    if not features:
        return Features()
    most = max(map(parents_shared, features))
    nearest = [f for backbone, f in features.items() if parents_shared(backbone) == most]
    return nearest[0] if len(nearest) == 1 else None


def _fit_noise(layer: KalmanNorm2d, prior: Belief) -> None:
    if not layer.has_process_model:
        return
    noise = (layer.running_var - prior.var[0].to(layer.running_var.dtype)).clamp_min(_LEAST_NOISE)
    # The inverse of softplus, in the form that does not overflow.
    layer.process_noise.copy_(noise + torch.log(-torch.expm1(-noise)))


def _raise_gain(layer: KalmanNorm2d) -> bool:
    if not layer.learns_gain or layer.gain_logit.sigmoid() >= _SAFE_GAIN:
        return False
    layer.gain_logit.fill_(logit_of(_SAFE_GAIN))
    return True
