"""From any network with BatchNorm or GroupNorm to one with Kalman Normalization."""

import copy
import itertools
import logging
import re
from typing import Dict, Iterable, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

from ...errors import InputError
from ..introspection import forward_of, has_children, has_hooks
from ..kalman_norm import GroupKalmanNorm2d, KalmanNorm2d, kalman_layers
from ..transition import ClosedFormTransition, Transition
from .about import End
from .chain import Chain
from .network import KalmanNetwork, Program
from .tracing import behind_all_norms, is_frozen_norm, is_norm, is_of_tracing, trace
from .walk import Walk

__all__ = ["convert_kalman_norm"]

logger = logging.getLogger(__name__)


def convert_kalman_norm(
    network: nn.Module,
    *,
    image_mean: Sequence[float] = (0.0, 0.0, 0.0),
    image_std: Sequence[float] = (1.0, 1.0, 1.0),
    gain: float = 0.1,
    learn_gain: bool = True,
    variant: str = "network",
    process_model: bool = True,
    prior_gradient: bool = True,
    eval_statistics: str = "moving",
    transition: Transition = ClosedFormTransition(),
    return_beliefs: bool = False,
) -> KalmanNetwork:
    """Replaces the BatchNorm2d of a network by KN and its GroupNorm by GKN, with priors (ours).

    torch.fx traces the network. Beside each operation that makes a feature goes an operation that
    makes the belief about this feature. The rules in :mod:`~kn_detectron.layers.convert.rules` know
    convolutions, activations, sums, products, concatenations, pooling and more. If there is no rule,
    as for attention, the chain ends. The next norm is then the head of a new chain, which is
    BatchNorm (GroupNorm) and measures at gain 0 too. One warning lists these places.

    Statistics, scale and shift are taken over. Where these are frozen, gain and process model are
    too. If the statistics are not the initial ones, the priors of KN are calibrated to them at once
    (network variant only), and so they are when weights of the original are loaded later.

    Like :meth:`torch.nn.SyncBatchNorm.convert_sync_batchnorm` it works in place: the result shares
    its modules with ``network``, and the norms among them are replaced. Use the result and not
    ``network``. Modules that hold others can be exchanged before the conversion only, except behind
    the last norm. Weight decay would pull the gains to 0.5 and undo a calibration:
    :func:`~kn_detectron.engine.exempt_filters_from_decay` prevents it.

    Args:
        network: has BatchNorm2d, SyncBatchNorm or GroupNorm, and a forward function that torch.fx
            can trace and whose first input is the image, shape (N, C, H, W). Frozen BatchNorm
            stays, and the chain goes through it. Arguments of forward that have a default keep it.
        image_mean, image_std: mean and standard deviation per channel of the images that the
            network gets. The defaults fit images that are normalised with their mean and standard
            deviation.
        gain, learn_gain, variant, process_model, prior_gradient, eval_statistics: see
            :class:`~kn_detectron.layers.KalmanNorm2d`. In the variant ``"paper"`` the first norm is
            the head of the chain.
        transition: how priors are predicted. The paper does it by
            :class:`~kn_detectron.layers.MonteCarloTransition`.
        return_beliefs: whether forward returns its output and the beliefs about it, in the same
            form: a Belief for a feature, or None if nothing is known about it or no beliefs are
            computed, as in evaluation with moving statistics.

    Returns:
        KalmanNetwork: its ``state_dict`` has the entries of ``network`` and those of KN.

    Raises:
        InputError: the network has no norm that could be converted, three-dimensional layers,
            Kalman layers, compiled parts, statistics that are not finite, or hooks that would be
            lost; or it cannot be traced, or takes images with another number of channels.
    """
    _check(network)
    if gain is None:
        raise InputError(
            "gain is None, which would make every norm the head of a chain: give a float from 0.0 "
            "to 1.0."
        )
    channels = len(image_std) if variant == "network" else None
    graphs = {"training": trace(network, True), "online": trace(network, False)}
    whole = set() if return_beliefs else behind_all_norms(network, graphs.values())
    if whole:
        graphs = {mode: trace(network, mode == "training", whole) for mode in graphs}
    plain = _returning_no_beliefs(graphs["online"], return_beliefs)
    walks = {mode: Walk(network, graph, channels) for mode, graph in graphs.items()}
    ends = _heads(walks.values())
    for walk in walks.values():
        walk.finish(set(ends), return_beliefs)

    options = dict(
        learn_gain=learn_gain,
        variant=variant,
        process_model=process_model,
        prior_gradient=prior_gradient,
    )
    norms = {
        call.node.target: network.get_submodule(call.node.target)
        for walk in walks.values()
        for call in walk.norms
    }
    _check_statistics(norms)
    grouped = any(isinstance(norm, nn.GroupNorm) for norm in norms.values())
    untracked = not all(getattr(norm, "track_running_stats", True) for norm in norms.values())
    in_evaluation = grouped or untracked or eval_statistics == "batch"
    chain = Chain(image_mean, image_std, transition, variant, in_evaluation)
    like = next((_like(norm, network) for norm in norms.values()), torch.empty(0))
    chain.to(like.device, like.dtype)
    beliefs = walks["training"].beliefs_alone()
    walks["training"].join_convolutions()
    graphs = {**graphs, "moving": plain, "beliefs": beliefs}
    programs = {mode: Program.of_graph(graph) for mode, graph in graphs.items()}
    layers = {
        name: _layer(
            norm, _like(norm, network), None if name in ends else gain, eval_statistics, options
        )
        for name, norm in norms.items()
    }
    converted = KalmanNetwork(network, chain, programs)
    for name, layer in layers.items():
        converted.put_norm(name, layer)
    left = {name: end for walk in walks.values() for name, end in walk.left.items()}
    _warn({**ends, **left}, len({*norms, *left}), network)
    _warn_of_vectors(network)
    converted.fit_priors(kalman_layers(converted))
    return converted


def _returning_no_beliefs(graph: fx.Graph, return_beliefs: bool) -> fx.Graph:
    """A copy of a graph, for norms that need no priors. It returns None for each belief."""
    graph = copy.deepcopy(graph)
    if return_beliefs:
        output = next(iter(reversed(graph.nodes)))
        nothing = fx.node.map_arg(output.args[0], lambda _: None)
        output.args = ((output.args[0], nothing),)
    return graph


_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def _check(network: nn.Module) -> None:
    name = type(network).__name__
    if any(isinstance(m, (KalmanNorm2d, GroupKalmanNorm2d)) for m in network.modules()):
        raise InputError(
            f"{name} has Kalman layers already: convert the network that it was made from."
        )
    if isinstance(network, _WRAPPERS) or hasattr(network, "_orig_mod"):
        raise InputError(
            f"{name} is the wrapper of a network: convert the network, and then wrap it."
        )
    if "forward" in vars(network):
        raise InputError(
            f"The forward function of this {name} was replaced, which the conversion to KN would "
            "not see: convert it before that, or write a class with that forward function."
        )
    if not isinstance(network, fx.GraphModule) and type(network).train is not nn.Module.train:
        logger.warning(
            "%s has a train() of its own, which the converted network does not have: if it keeps "
            "norms in evaluation mode, call eval() on them after each train().",
            name,
        )
    devices = {str(t.device) for t in itertools.chain(network.parameters(), network.buffers())}
    if len(devices) > 1:
        raise InputError(
            f"{name} is on several devices ({', '.join(sorted(devices))}), which beliefs do not "
            "follow: move it to one device, and convert it there."
        )
    for path, module in network.named_modules():
        if is_norm(module) and parametrize.is_parametrized(module):
            raise InputError(
                f"{name} has a parametrization at {path}, which a Kalman layer in its place would "
                "lose: remove it with torch.nn.utils.parametrize.remove_parametrizations."
            )
        if is_norm(module) and not _is_plain(module):
            logger.warning(
                "%s is a %s with a forward function of its own, which the Kalman layer in its "
                "place does not call.",
                path,
                type(module).__name__,
            )
        if isinstance(module, (nn.BatchNorm3d, nn.Conv3d, nn.ConvTranspose3d)):
            raise InputError(
                f"{name} has a {type(module).__name__}, {path}: only networks of images, with "
                "features of shape (N, C, H, W), can be converted to KN."
            )
        if module is not network and _is_compiled(module):
            raise InputError(
                f"{name} has a compiled part, {path}, into which the conversion to KN does not see: "
                "convert the network, and then compile it."
            )
        replaced = is_norm(module) or has_children(module)
        if has_hooks(module) and replaced and module is not network:
            raise InputError(
                f"{name} has hooks at {path}, which would not be called after a conversion to KN: "
                "remove them, and take features with torchvision's create_feature_extractor."
            )
    if not any(is_norm(module) for module in network.modules()):
        if any(is_frozen_norm(module) for module in network.modules()):
            raise InputError(
                f"All norms of {name} are frozen BatchNorms, which stay as they are: build it with "
                "BatchNorm2d, load the same weights, and convert that."
            )
        raise InputError(
            f"{name} has neither BatchNorm2d nor GroupNorm: there is nothing to convert to KN."
        )


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def _check_statistics(norms: Dict[str, nn.Module]) -> None:
    for path, norm in norms.items():
        for name in ("running_mean", "running_var"):
            values = getattr(norm, name, None)
            if values is not None and not values.is_meta and not values.isfinite().all():
                raise InputError(
                    f"{path}.{name} has values that are not finite, to which no prior can be "
                    "calibrated: load sound weights, or call reset_running_stats() of this norm."
                )


def _is_plain(norm: nn.Module) -> bool:
    """Whether a norm computes no more than torch's, or more in a way that the conversion knows."""
    forward = forward_of(norm)
    of_torch = forward in (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward, nn.GroupNorm.forward)
    # timm's GroupNorm, and its norms with an activation.
    return of_torch or forward.__module__ in ("timm.layers.norm", "timm.layers.norm_act")


def _heads(walks: Iterable[Walk]) -> Dict[str, End]:
    """The norms that have no prior in at least one call, and why."""
    calls = [call for walk in walks for call in walk.norms]
    return {call.node.target: call.end for call in calls if call.end is not None}


def _like(norm: nn.Module, network: nn.Module) -> Tensor:
    """A tensor of the device and dtype of a norm."""
    floating = (t for t in itertools.chain(norm.parameters(), norm.buffers(), network.parameters()))
    return next(t for t in floating if t.is_floating_point())


def _layer(
    norm: nn.Module, like: Tensor, gain: Optional[float], eval_statistics: str, options: dict
):
    """The Kalman layer that takes the place of a norm, on the device and in the dtype of ``like``."""
    if isinstance(norm, nn.GroupNorm):
        layer = GroupKalmanNorm2d(
            norm.num_groups, norm.num_channels, norm.eps, norm.affine, gain=gain, **options
        )
    else:
        layer = KalmanNorm2d(
            norm.num_features,
            norm.eps,
            norm.momentum,
            norm.affine,
            norm.track_running_stats,
            gain=gain,
            eval_statistics=eval_statistics,
            **options,
        )
    return layer.to(like.device, like.dtype)


def _warn(ends: Dict[str, End], norms: int, network: nn.Module) -> None:
    """Warns where chains end, with one line for each kind of place."""
    places: Dict[str, List[str]] = {}
    without_prior = 0
    for end in ends.values():
        if not end.why:
            continue
        without_prior += 1
        where, what = _place(end.node, network)
        where_seen = places.setdefault(f"{what}: {end.why}", [])
        if where not in where_seen:
            where_seen.append(where)
    if not places:
        return
    lines = [
        f"{what} (at {where[0]}" + (f" and {len(where) - 1} more)" if where[1:] else ")")
        for what, where in places.items()
    ]
    logger.warning(
        "%d of the %d norms have no prior and work as BatchNorm (GroupNorm for GKN), which measures "
        "whatever the gain is, because the chain of beliefs ends in front of them:\n  %s",
        without_prior,
        norms,
        "\n  ".join(lines),
    )


def _warn_of_vectors(network: nn.Module) -> None:
    """Warns of BatchNorm that is not for feature maps, which stays."""
    paths = [path for path, m in network.named_modules() if isinstance(m, nn.BatchNorm1d)]
    if paths:
        logger.warning(
            "%d BatchNorm1d stay as they are (%s%s), and measure in training whatever the gain is: "
            "to keep their statistics, call eval() on them after each train().",
            len(paths),
            paths[0],
            " and others" if paths[1:] else "",
        )


def _place(node: fx.Node, network: nn.Module) -> Tuple[str, str]:
    """The name of the module that a node is in, and what the node is, with its line of code."""
    if node.op == "call_module":
        return node.target, type(network.get_submodule(node.target)).__name__
    name = node.target if isinstance(node.target, str) else node.target.__name__
    stack = node.meta.get("nn_module_stack", {})
    path, module = next(reversed(stack.values()), ("", type(network)))
    lines = re.findall(r'File "([^"]+)", line (\d+)', node.stack_trace or "")
    lines = [f", {file}:{line}" for file, line in lines if not is_of_tracing(file)]
    line = lines[-1] if lines else ""
    return path or "its forward", f"{name} in {module.__name__}{line}"
