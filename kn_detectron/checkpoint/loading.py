"""Loading weights into a model: they must fit the model, and the priors are fitted to them."""

import copy
import dataclasses
import logging

from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.layers import FrozenBatchNorm2d
from fvcore.common.checkpoint import get_missing_parameters_message

from ..errors import InputError
from ..files import renamed, without_wrappers
from ..layers import KN_STATE, KalmanNorm2d, kalman_layers
from ..layers.calibration import can_be_calibrated
from ..layers.gain import GAINS
from ..modeling import KNRetinaNetHead
from .calibration import calibrate, fit_process_noise, predicted_priors
from .matching import STATISTICS, essential_names, extra_layers, foreign_networks, leaf, match
from .report import table

__all__ = ["load_weights"]

_logger = logging.getLogger(__name__)

_PROCESS_MODELS = {"network": ("mean_offset", "log_var_scale"), "paper": ("process_noise",)}


def load_weights(model, weights, name, *, strict=False):
    """Loads weights into a model, reports what became of them, and fits the priors to them.

    Gains and process models of a checkpoint belong to its priors. They are taken if the model has
    priors of the same variant (network or paper) and kind (batch or group). Layers that get no
    process model are calibrated (:func:`~kn_detectron.checkpoint.calibrate`). A gain that is fixed,
    and the scale to which a schedule has annealed the gains, are settings and no weights: unless
    ``strict``, the model keeps its own.

    Args:
        model (nn.Module): detector or backbone.
        weights (Weights): of :func:`~kn_detectron.checkpoint.read_weights`.
        name (str): how to call the checkpoint.
        strict (bool): whether everything must match; otherwise the ResNet must, apart from
            what Kalman Normalization adds.

    Returns:
        Match: with the names of the model.

    Raises:
        InputError: the weights do not fit. The model is then as it was.
    """
    model_state = model.state_dict()
    state = _aligned(weights, model, name)
    # Old versions of detectron2 have these among the weights; here the config has the last word.
    for constant in ("pixel_mean", "pixel_std"):
        state.pop(constant, None)
    for prefix, module in model.named_modules():
        if isinstance(module, KNRetinaNetHead):
            module.adopt(state, f"{prefix}." if prefix else "")
    foreign = _pop_foreign_state(model, state)
    found = match(model_state, state)
    found.unused += foreign
    if strict:
        _check_all(model, found, name)
    else:
        _keep_settings_of_gains(model, state, name)
    _check_backbone(model, found, state, name)
    plan = _plan_priors(model, found)
    for misshapen, _, _ in found.misshapen:
        state.pop(misshapen, None)
    model.load_state_dict(state, strict=False)
    _report(found, weights, name)
    _warn_of_folded_statistics(found, name)
    _fit_priors(model, plan, name)
    return found


def _aligned(weights, model, name):
    """The checkpoint's tensors by the names of the model, in which modules may be wrapped."""
    model_state = model.state_dict()
    bare = {without_wrappers(key): value for key, value in model_state.items()}
    if len(bare) < len(model_state):  # what looks like a wrapper is none
        return _aligned_with(weights, model_state, name)
    # The wrapped module comes after its wrapper, and has the parameters.
    names = [module for module, _ in model.named_modules()] + list(model_state)
    wrapped = {without_wrappers(key): key for key in names}
    return renamed(_aligned_with(weights, bare, name), lambda key: wrapped.get(key, key))


def _aligned_with(weights, model_state, name):
    # Without prefixes on either side there is nothing to align.
    if not weights.matching_heuristics or "stem.conv1.weight" in model_state:
        return _without_versions_of_batch_norm(copy.copy(weights.state))
    try:
        return align_and_update_state_dicts(model_state, weights.state, c2_conversion=False)
    except ValueError as error:
        raise InputError(
            f"{name} does not fit the model ({error}): give weights of the same architecture in "
            "MODEL.WEIGHTS."
        ) from error


def _without_versions_of_batch_norm(state):
    # detectron2 0.4 takes version 2 of a BatchNorm for version 2 of its FrozenBatchNorm2d, which
    # had no eps, and subtracts it. Only the former counts batches.
    versions = getattr(state, "_metadata", {})
    if versions:
        state._metadata = {
            name: version
            for name, version in versions.items()
            if f"{name}.num_batches_tracked" not in state
        }
    return state


def _pop_foreign_state(model, state):
    """Removes gains and process models that belong to other priors than the model's."""
    names = []
    for prefix, layer in kalman_layers(model).items():
        own = {part for part in KN_STATE if f"{prefix}.{part}" in state}
        others = {p for v, parts in _PROCESS_MODELS.items() if v != layer.variant for p in parts}
        of_batches = any(f"{prefix}.{statistic}" in state for statistic in STATISTICS)
        if own & others or of_batches != isinstance(layer, KalmanNorm2d):
            names += [f"{prefix}.{part}" for part in sorted(own)]
    for name in names:
        del state[name]
    return names


def _keep_settings_of_gains(model, state, name):
    kept = 0
    for prefix, layer in kalman_layers(model).items():
        if f"{prefix}.gain_scale" in state:
            state[f"{prefix}.gain_scale"] = layer.gain_scale.clone()
        key = f"{prefix}.gain_logit"
        if key not in state:
            continue
        # A fixed gain of 0 or 1 is a sigmoid without a slope, from which nothing could be learned.
        if layer.learns_gain and 0.0 < state[key].sigmoid() < 1.0:
            continue
        if state[key].sigmoid() != layer.gain_logit.sigmoid():
            state[key] = layer.gain_logit.clone()
            kept += 1
    if kept:
        _logger.info(
            "The gains of %d Kalman layers are those of MODEL.KN.GAIN and not of %s, since they are "
            "fixed here or there.",
            kept,
            name,
        )


def _check_all(model, found, name):
    # Converted weights have no gains, which the config chooses. They have process models for all
    # layers, even for those that the config freezes.
    frozen = {n for n, module in model.named_modules() if isinstance(module, FrozenBatchNorm2d)}
    missing = [tensor for tensor in found.missing if leaf(tensor) not in GAINS]
    unused = [
        tensor
        for tensor in found.unused
        if leaf(tensor) not in KN_STATE or tensor.rpartition(".")[0] not in frozen
    ]
    found = dataclasses.replace(found, missing=missing, unused=unused)
    if found.missing or found.misshapen or found.unused:
        raise InputError(
            f"{name} is not a checkpoint of this model ({found}): use the config that it was "
            "trained with, or give it as MODEL.WEIGHTS of a new training."
        )


def _check_backbone(model, found, state, name):
    with_statistics = any(leaf(tensor) == "running_var" for tensor in state)
    essential = found.only(essential_names(model, with_statistics))
    unstated = [tensor for tensor in essential.missing if leaf(tensor) in STATISTICS]
    if unstated and not with_statistics and len(unstated) == len(essential.missing):
        raise InputError(
            f"{name} has no running statistics, as weights of a GroupNorm network or with folded "
            f"BatchNorm, but the model needs them ({len(unstated)} missing, the first "
            f"{unstated[0]}): give weights of a BatchNorm or KN network, or choose another norm "
            '(MODEL.RESNETS.NORM, --norm): "GKN" or "GN" for those of GroupNorm, "FrozenBN" for '
            "folded ones."
        )
    extra = extra_layers(found, state, model)
    if essential.missing or essential.misshapen or extra or not found.matched:
        shown = essential if essential.missing or essential.misshapen else found
        if extra and shown is found:
            shown = f"{len(extra)} filters that the model lacks, the first {extra[0]}"
        advice = (
            "set MODEL.KN.NETWORK to theirs, or, if it is a file of torchvision or timm, give it in "
            'MODEL.KN.NETWORK_WEIGHTS with MODEL.WEIGHTS "".'
            if foreign_networks(model)
            else "set MODEL.BACKBONE and MODEL.RESNETS to theirs (for another number of channels in the "
            'images INPUT.FORMAT, MODEL.PIXEL_MEAN and MODEL.PIXEL_STD too), or MODEL.WEIGHTS "" to '
            "train from scratch."
        )
        raise InputError(
            f"{name} is of another architecture than the backbone that it is for ({shown}): give "
            f"weights of the same architecture in MODEL.WEIGHTS, {advice}"
        )


def _report(found, weights, name):
    initialised = found.missing + [tensor for tensor, _, _ in found.misshapen]
    columns = {"loaded": found.matched, "initialised": initialised, "not used": found.unused}
    counts = ", ".join(f"{len(names)} {heading}" for heading, names in columns.items())
    _logger.info("%s (%s): %s.\n%s", name, weights.source, counts, table(columns))
    missing = [tensor for tensor in found.missing if leaf(tensor) not in KN_STATE]
    if missing:
        _logger.info("Not in %s. %s", name, get_missing_parameters_message(missing))
    if found.misshapen:
        _logger.warning(
            "%d tensors of %s have another shape than in the model, as with another number of "
            "classes, and keep their initial values: %s.",
            len(found.misshapen),
            name,
            ", ".join(tensor for tensor, _, _ in found.misshapen),
        )


def _warn_of_folded_statistics(found, name):
    loaded = _loaded_layers(found)
    folded = [
        tensor
        for tensor in found.missing
        if leaf(tensor) == "running_var" and tensor.rpartition(".")[0] in loaded
    ]
    if folded:
        _logger.warning(
            "%s has no running statistics for %d layers, the first %s: that is right if they were "
            "folded into scale and shift. For weights of a GroupNorm network it is wrong, until a "
            "training measures them where the norm is not frozen.",
            name,
            len(folded),
            folded[0],
        )


def _loaded_layers(found):
    """The names of the layers whose scale or filter is in the checkpoint."""
    return {tensor.rpartition(".")[0] for tensor in found.matched if leaf(tensor) == "weight"}


def _plan_priors(model, found):
    """Names the layers whose priors must be fitted, as their statistics, but not priors, are here.

    Layers that are not in the checkpoint, such as those of FPN and heads in ImageNet weights, start
    as they are, since their statistics are not those of any data. So do layers that get the scale
    of another norm, such as GroupNorm, and no statistics.

    Returns:
        tuple[list, list, list]: layers of the network variant that can be calibrated, layers of the
        paper variant, and layers whose priors will not fit the weights.
    """
    missing, unused, loaded = set(found.missing), set(found.unused), _loaded_layers(found)
    exact, rough, hopeless = [], [], []
    for prefix, layer in kalman_layers(model).items():
        # Layers without a scale of their own share one, which their parent has.
        if (prefix if layer.affine else prefix.rpartition(".")[0]) not in loaded:
            continue
        parts = {f"{prefix}.{part}" for part in _PROCESS_MODELS[layer.variant]}
        is_batch = isinstance(layer, KalmanNorm2d)
        if is_batch and f"{prefix}.running_var" in missing:
            continue
        if parts & unused:  # the gain came with a process model, and the model has none
            hopeless.append(prefix)
        elif can_be_calibrated(layer):
            if parts & missing:
                exact.append(prefix)
        elif (parts | {f"{prefix}.gain_logit"}) & missing:
            (rough if is_batch and layer.variant == "paper" else hopeless).append(prefix)
    if exact or rough:
        reached = predicted_priors(model)
        hopeless += [prefix for prefix in exact + rough if prefix not in reached]
        exact, rough = ([p for p in names if p in reached] for names in (exact, rough))
    return exact, rough, hopeless


def _fit_priors(model, plan, name):
    exact, rough, hopeless = plan
    if exact:
        calibrate(model, exact)
        _logger.info(
            "The priors of %d Kalman layers were set to the running statistics of the checkpoint.",
            len(exact),
        )
    if rough:
        raised = fit_process_noise(model, rough)
        _logger.warning(
            'The priors of %d Kalman layers of MODEL.KN.VARIANT "paper" cannot be set to the '
            "running statistics of %s: their process noise was set so that none is too narrow, and "
            "%d learned gains were raised to 0.9, near BatchNorm.",
            len(rough),
            name,
            raised,
        )
    if hopeless:
        _logger.warning(
            "The priors of %d Kalman layers do not fit the weights of %s, which were not trained "
            "with them, and cannot be calibrated: MODEL.KN.GAIN should be near 1 at first. (Those "
            'of MODEL.RESNETS.NORM "KN" with MODEL.KN.VARIANT "network" and '
            "MODEL.KN.PROCESS_MODEL True would be fitted.)",
            len(hopeless),
            name,
        )
