"""What the optimizer of a KN model is to leave alone."""

from torch import nn
from torch.optim import Optimizer

from ..errors import InputError
from ..layers import KN_STATE, kalman_layers

__all__ = ["exempt_filters_from_decay"]


def exempt_filters_from_decay(optimizer: Optimizer, model: nn.Module) -> None:
    """Takes gains and process models out of the weight decay.

    Decay pulls the logit of a gain to 0, which is a gain of 0.5. It pulls a process model to that
    of a fresh layer, which undoes a calibration. detectron2 decays both as it decays norms, by
    SOLVER.WEIGHT_DECAY_NORM.

    Args:
        optimizer: of the model's parameters. It gets additional groups, without decay.
        model: holds the KN and GKN layers.

    Raises:
        InputError: a scheduler was built for the optimizer, which would not know the new groups.
    """
    if any("initial_lr" in group for group in optimizer.param_groups):
        raise InputError(
            "exempt_filters_from_decay adds groups that the scheduler of this optimizer would not "
            "know: call it before the scheduler is built, as in build_optimizer of a trainer."
        )
    filters = {
        id(getattr(layer, name))
        for layer in kalman_layers(model).values()
        for name in KN_STATE
        if isinstance(getattr(layer, name, None), nn.Parameter)
    }
    for group in list(optimizer.param_groups):
        exempt = [p for p in group["params"] if id(p) in filters]
        if not exempt or group["weight_decay"] == 0:
            continue
        rest = [p for p in group["params"] if id(p) not in filters]
        if not rest:
            group["weight_decay"] = 0.0
            continue
        added = {**group, "params": exempt, "weight_decay": 0.0}
        if "param_names" in group:  # of an optimizer that was made of named parameters
            named = list(zip(group["params"], group["param_names"]))
            added["params"] = [(name, p) for p, name in named if id(p) in filters]
            group["param_names"] = [name for p, name in named if id(p) not in filters]
            del added["param_names"]
        group["params"] = rest
        optimizer.add_param_group(added)
