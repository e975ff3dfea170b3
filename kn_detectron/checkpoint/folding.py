"""Folding: a trained KN model as one that detectron2 runs without this package.

With moving statistics a KN layer computes in evaluation what BatchNorm does, an affine map::

    y = weight (x - running_mean) / sqrt(running_var + eps) + bias

which is the map of detectron2's FrozenBatchNorm2d, with the same names of tensors. Its eps is 1e-5,
which no config changes. The eps of a layer that has another goes into its scale::

    weight sqrt(running_var + 1e-5) / sqrt(running_var + eps)

Gains, process models and beliefs serve training only.
"""

import os
import re

import detectron2.layers
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model

from ..config import check_config, without_kn_config
from ..errors import InputError
from ..files import atomic_write, explained_write_errors
from ..layers import KN_STATE, GroupKalmanNorm2d, KalmanNetwork, KalmanNorm2d
from ..modeling.stock_names import STOCK_NAMES
from .checkpointer import KNCheckpointer
from .conventions import CHECKPOINT_KEY, Conventions
from .matching import leaf, match

__all__ = ["fold", "fold_into", "fold_network", "fold_weights", "folded_files", "stock_config"]

_NETWORKS = ("build_kn_network_backbone", "build_kn_network_fpn_backbone")

# Where nothing passes it a prior, GKN is GroupNorm with detectron2's number of groups.
_STOCK_NORMS = {"KN": "FrozenBN", "GKN": "GN", "GN32": "GN"}


def stock_config(cfg):
    """The config of the folded model, in detectron2's own keys and names.

    Args:
        cfg (CfgNode): of a model with norm "KN" in the backbone, the heads or both.

    Returns:
        CfgNode: every NORM "KN" is "FrozenBN", the KN backbones and heads are detectron2's, and
        what :func:`~kn_detectron.add_kn_config` adds is gone. Keys of your own or of another project,
        such as PointRend, stay. The towers of :class:`~kn_detectron.modeling.KNRetinaNet` have
        statistics for each level, as detectron2 has with "BN" only.

    Raises:
        InputError: the config is wrong, or the model cannot be folded: GKN and
            MODEL.KN.EVAL_STATISTICS "batch" take statistics of the images at hand, which no
            constant can replace, detectron2 has no networks of other libraries, and before 0.6
            no statistics for each level.
    """
    if "KN" not in cfg.MODEL:
        raise InputError(
            "The config has no MODEL.KN, so that its model runs without this package already: "
            "give the config of a KN model."
        )
    check_config(cfg)
    if cfg.MODEL.BACKBONE.NAME in _NETWORKS:
        raise InputError(
            f"MODEL.BACKBONE.NAME is {cfg.MODEL.BACKBONE.NAME}, and detectron2 has no such network, so "
            "its models run with this package only: keep using it for inference."
        )
    if {cfg.MODEL.BACKBONE.NAME, cfg.MODEL.ROI_HEADS.NAME} & set(STOCK_NAMES):
        if cfg.MODEL.RESNETS.NORM == "GKN":
            raise InputError(
                'MODEL.RESNETS.NORM is "GKN", which cannot be folded since it takes its statistics '
                'from each image: fold models with MODEL.RESNETS.NORM "KN".'
            )
        if cfg.MODEL.KN.EVAL_STATISTICS == "batch":
            raise InputError(
                'MODEL.KN.EVAL_STATISTICS is "batch", which cannot be folded since its statistics '
                "are those of the images at hand: add MODEL.KN.EVAL_STATISTICS moving to fold the "
                "moving averages, and evaluate with it first, since it gives other detections."
            )
    stock = without_kn_config(cfg)
    _rename(stock)
    if cfg.MODEL.META_ARCHITECTURE == "KNRetinaNet" and cfg.MODEL.RETINANET.NORM == "KN":
        if not hasattr(detectron2.layers, "CycleBatchNormList"):
            raise InputError(
                'MODEL.RETINANET.NORM is "KN", with statistics for each level of the pyramid, which '
                "this detectron2 has no norm for: fold with detectron2 0.6 or newer, or keep using "
                "this package for inference."
            )
        stock.MODEL.RETINANET.NORM = "BN"
    return stock


def _rename(node, prefix=""):
    """Puts detectron2's names and norms in the place of ours, in ``node`` and below it."""
    for key, value in node.items():
        if isinstance(value, CfgNode):
            _rename(value, f"{prefix}{key}.")
        elif key == "NORM":
            node[key] = _stock_norm(value, prefix + key)
        elif key in ("NAME", "META_ARCHITECTURE"):
            node[key] = STOCK_NAMES.get(value, value)


def _changes(cfg, default):
    """The tree of the keys of ``cfg`` that ``default`` lacks, or has another value of."""
    changes = CfgNode()
    for key, value in cfg.items():
        if isinstance(value, CfgNode) and key in default:
            value = _changes(value, default[key])
            if value:
                changes[key] = value
        elif key not in default or value != default[key]:
            changes[key] = value
    return changes


def _stock_norm(norm, key):
    stock = _STOCK_NORMS.get(norm, norm)
    if re.fullmatch(r"GN\d+", stock):
        raise InputError(
            f'{key} is "{norm}", but detectron2 by itself has only "GN", with 32 groups, so that '
            "such a model runs with this package only: keep using it for inference."
        )
    return stock


def fold(cfg, model):
    """Folds a KN model.

    Args:
        cfg (CfgNode): its config.
        model (nn.Module): built from it, trained. It stays as it is.

    Returns:
        (CfgNode, nn.Module): :func:`stock_config` of ``cfg``, and a model built from that, on
        MODEL.DEVICE, in evaluation mode. It gives the detections that ``model`` gives in
        evaluation mode with moving statistics.

    Raises:
        InputError: the model cannot be folded (see :func:`stock_config`; a layer without running
            statistics cannot either, nor GroupNorm with another eps), or is of another config.
    """
    stock_cfg = stock_config(cfg)
    return stock_cfg, fold_into(model, build_model(stock_cfg))


def fold_into(model, stock):
    """Folds a KN model into detectron2's own, as where a lazy config builds both.

    Args:
        model (nn.Module): the KN model, trained. It stays as it is.
        stock (nn.Module): the same model with BatchNorm, frozen or not, in place of KN. In the
            towers of RetinaNet that is detectron2's "BN", which has statistics for each level.

    Returns:
        nn.Module: ``stock``, which now gives the detections of ``model``, in evaluation mode.

    Raises:
        InputError: a layer cannot be folded (GKN, statistics of the batch, no running statistics,
            GroupNorm with another eps), or ``stock`` is another model.
    """
    _check_statistics(model)
    # A plain dict: with the version number of BatchNorm's state an older FrozenBatchNorm2d would
    # take the state for one of its own first versions, and subtract eps from the variances.
    state = {
        name: value for name, value in model.state_dict().items() if leaf(name) not in KN_STATE
    }
    found = match(stock.state_dict(), state)
    if found.missing or found.misshapen or found.unused:
        raise InputError(
            f"The model is not one of the config ({found}): give the config that it was built from."
        )
    _carry_eps(model, stock, state)
    stock.load_state_dict(state, strict=False)
    return stock.eval()


def _carry_eps(model, stock, state):
    """Puts the difference between a norm's eps and that of the stock model into its scale."""
    for name, layer in stock.named_modules():
        eps = getattr(model.get_submodule(name), "eps", None)
        if eps == getattr(layer, "eps", None):
            continue
        if f"{name}.running_var" not in state:
            raise InputError(
                f"{name} has eps {eps:g}, where detectron2 has {layer.eps:g}, and measures each "
                "image, so that no constant makes up for it: such a model runs with this package "
                "only."
            )
        if f"{name}.weight" not in state:  # it shares its scale with others
            state[f"{name}.running_var"] = state[f"{name}.running_var"] + (eps - layer.eps)
            continue
        var = state[f"{name}.running_var"].double()
        scale = ((var + layer.eps) / (var + eps)).sqrt()
        weight = state[f"{name}.weight"]
        state[f"{name}.weight"] = (weight * scale).to(weight.dtype)


def _check_statistics(model):
    for name, layer in model.named_modules():
        of_batch = getattr(layer, "eval_statistics", None) == "batch"
        # Without a prior GKN is GroupNorm, which stays.
        of_image = isinstance(layer, GroupKalmanNorm2d) and not layer.is_head
        if of_batch or of_image:
            raise InputError(
                f"{name} takes its statistics from the images at hand, which no constant can "
                'replace: fold models with KN and eval_statistics="moving".'
            )
        if isinstance(layer, KalmanNorm2d) and not layer.track_running_stats:
            raise InputError(
                f"{name} has no running statistics to fold: train it with track_running_stats=True."
            )


def fold_network(network):
    """Folds a network that :func:`~kn_detectron.layers.convert_kalman_norm` converted.

    Args:
        network (KalmanNetwork): trained. It stays as it is.

    Returns:
        nn.Module: of the class that it had before, with its BatchNorm, in evaluation mode. It
        computes what ``network`` computes in evaluation mode with moving statistics, as long as its
        norms stay in evaluation mode, and its ``state_dict`` is one of the original library's.

    Raises:
        InputError: it cannot be folded, since it has GKN, takes the statistics of the batch in
            evaluation, or has none.
    """
    if not isinstance(network, KalmanNetwork):
        raise InputError(
            f"{type(network).__name__} is no network that convert_kalman_norm made: give one (of "
            "DistributedDataParallel its .module), or fold a detector with fold(cfg, model)."
        )
    _check_statistics(network)
    return network.restored().eval()


def folded_files(output):
    """The paths of the weights and the config, for a name with or without one of their suffixes."""
    stem = re.sub(r"\.(pth|yaml)$", "", output)
    return f"{stem}.pth", f"{stem}.yaml"


def fold_weights(cfg, output):
    """Folds the KN model in MODEL.WEIGHTS into two files for detectron2 without this package.

    They are ``<output>.pth``, the weights, and ``<output>.yaml``, the config, which names the
    weights by their absolute path and holds only what differs from detectron2's defaults, and keys
    that detectron2 does not have. MODEL.DEVICE is not in it.

    Args:
        cfg (CfgNode): the config that the model was trained with, and MODEL.WEIGHTS.
        output (str): path of the two files, with or without one of their suffixes. The folder is
            created.

    Returns:
        (str, str): the paths of the weights and the config.

    Raises:
        InputError: the model cannot be folded, the checkpoint cannot be read or is of another
            config, or the files cannot be written. If the weights cannot, the config is not.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    stock_config(cfg)  # refuses before anything is read
    if not cfg.MODEL.WEIGHTS:
        raise InputError(
            "There are no weights to fold: set MODEL.WEIGHTS to the checkpoint of a trained model."
        )
    if os.path.isdir(output):
        raise InputError(
            f"{output} is a folder: give the path of the two files, such as "
            f"{os.path.join(output, 'folded')}."
        )
    weights, config = folded_files(os.path.abspath(output))
    if os.path.exists(weights) and os.path.realpath(weights) == os.path.realpath(cfg.MODEL.WEIGHTS):
        raise InputError(
            f"{weights} is MODEL.WEIGHTS itself, which folding would overwrite: give another name "
            "for the output."
        )
    model = build_model(cfg)
    KNCheckpointer(model).load_for_evaluation(cfg.MODEL.WEIGHTS)
    stock_cfg, stock = fold(cfg, model)

    stock_cfg.MODEL.WEIGHTS = weights
    default = get_cfg()
    stock_cfg.MODEL.DEVICE = default.MODEL.DEVICE  # where it runs does not belong to the model
    changes = _changes(stock_cfg, default)
    changes.VERSION = stock_cfg.VERSION
    content = {
        "model": stock.state_dict(),
        CHECKPOINT_KEY: Conventions.of_config(stock_cfg).to_dict(),
    }
    with explained_write_errors(output, "make room, or give another folder for the output."):
        os.makedirs(os.path.dirname(weights), exist_ok=True)
        with atomic_write(config) as config_file, atomic_write(weights) as weights_file:
            torch.save(content, weights_file)
            config_file.write(changes.dump().encode())
    return weights, config
