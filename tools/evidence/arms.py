"""The arms of the comparisons: a detector and its weights, with several norms in the backbone.

``LITE0`` starts from one set of ImageNet weights for all norms. ``PARTS`` is KN at gain 0 with one of
its parts changed. ``R50`` is the paper's protocol: each norm has weights that were pre-trained with
it.
"""

from typing import Callable, Dict, List, NamedTuple, Optional, Tuple

from torch import nn

from kn_detectron.layers import kalman_layers

__all__ = [
    "ARMS",
    "LITE0",
    "PARTS",
    "R50",
    "Arm",
    "hold_process_model",
    "put_group_norm",
    "solver_options",
    "speed_up_process_model",
    "train_affine",
]

_FOLDER = "photos"


class Arm(NamedTuple):
    """One row of a table.

    Attributes:
        label: its name in the tables.
        config: a config of the model zoo.
        options: KEY, VALUE, ... for the config.
        change: what is done to a new model.
    """

    label: str
    config: str
    options: Tuple[str, ...] = ()
    change: Optional[Callable[[nn.Module], None]] = None


def train_affine(model: nn.Module) -> None:
    """Trains scale and shift of each BatchNorm, and freezes its statistics."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(True)
            module.register_forward_pre_hook(_use_running_statistics)


def _use_running_statistics(norm: nn.BatchNorm2d, _inputs) -> None:
    norm.eval()


def put_group_norm(model: nn.Module) -> None:
    """Replaces each BatchNorm by a GroupNorm with its scale and shift, as loading its weights into a
    network with GroupNorm would.

    Groups have 8 channels, since all widths of EfficientNet-Lite0 are multiples of 8. timm's networks
    with GroupNorm have groups of that size too.
    """
    for name, old in list(model.named_modules()):
        if isinstance(old, nn.BatchNorm2d):
            norm = nn.GroupNorm(old.num_features // 8, old.num_features, old.eps)
            norm.load_state_dict({"weight": old.weight, "bias": old.bias})
            parent, _, last = name.rpartition(".")
            # timm's BatchNorm is followed by the activation inside of the same module.
            setattr(model.get_submodule(parent), last, nn.Sequential(norm, old.drop, old.act))


def _process_model(model: nn.Module) -> List[nn.Parameter]:
    layers = kalman_layers(model).values()
    return [parameter for layer in layers for parameter in (layer.mean_offset, layer.log_var_scale)]


def hold_process_model(model: nn.Module) -> None:
    """Keeps b and r as they are calibrated to the weights, and does not train them."""
    for parameter in _process_model(model):
        parameter.requires_grad_(False)


def speed_up_process_model(model: nn.Module) -> None:
    """Multiplies the gradients of b and r by 10, which for SGD is ten times the learning rate."""
    for parameter in _process_model(model):
        parameter.register_hook(lambda gradient: 10.0 * gradient)


_BN = f"{_FOLDER}/mask_rcnn_lite0_FPN_BN.yaml"
_KN = f"{_FOLDER}/mask_rcnn_lite0_FPN_KN.yaml"
_LIVE = ("MODEL.RESNETS.NORM", "BN")
_ANNEALED = ("MODEL.KN.LEARN_GAIN", "True", "MODEL.KN.GAIN_ANNEAL", "[0.6, 0.9]")

LITE0: Dict[str, Arm] = {
    "BN_frozen": Arm("BN*, frozen", _BN),
    "BN_affine": Arm("BN*, scale and shift trained", _BN, change=train_affine),
    "BN": Arm("BN, live", _BN, _LIVE),
    "GN": Arm("GN with BN's scale and shift", _BN, _LIVE, put_group_norm),
    "KN": Arm("KN, gain 0.02 annealed", _KN, ("MODEL.KN.GAIN", "0.02", *_ANNEALED)),
    "KN_gain0": Arm("KN, gain 0", _KN),
}

# All others have KN_gain0 beside them.
PARTS: Dict[str, Arm] = {
    "KN_no_prior_gradient": Arm(
        "KN, gain 0, no gradient through the prior", _KN, ("MODEL.KN.PRIOR_GRADIENT", "False")
    ),
    "KN_held_process": Arm("KN, gain 0, b and r not trained", _KN, change=hold_process_model),
    "KN_fast_process": Arm(
        "KN, gain 0, ten times the learning rate for b and r", _KN, change=speed_up_process_model
    ),
}

_R50 = f"{_FOLDER}/mask_rcnn_slim_R50_C4"

R50: Dict[str, Arm] = {
    "R50_BN_frozen": Arm("BN*, frozen", f"{_R50}_BN.yaml"),
    "R50_BN_affine": Arm("BN*, scale and shift trained", f"{_R50}_BN.yaml", _LIVE, train_affine),
    "R50_BN": Arm("BN, live", f"{_R50}_BN.yaml", _LIVE),
    "R50_GN": Arm("GN, 8 groups", f"{_R50}_GN.yaml"),
    "R50_GKN": Arm("GKN, 8 groups", f"{_R50}_GKN.yaml"),
    # The gains are those in the weights, 0.13 on average.
    "R50_KN": Arm("KN, gain annealed", f"{_R50}_KN.yaml", ("MODEL.KN.GAIN", "0.1", *_ANNEALED)),
    "R50_KN_gain0": Arm("KN, gain 0", f"{_R50}_KN.yaml"),
    "R50_KN_from_BN": Arm(
        "KN, gain 0, from the weights of BN",
        f"{_R50}_KN.yaml",
        ("MODEL.WEIGHTS", "kn://slim_R50_BN.pth"),
    ),
}

ARMS = {**LITE0, **PARTS, **R50}


def solver_options(cfg, images: int) -> Tuple[str, ...]:
    """The schedule of a config for another number of images per step, with equal images seen.

    The learning rate is proportional to the number of images per step, and the lengths of the
    schedule are inversely proportional to it.

    Args:
        cfg: detectron2's config, whose schedule is for SOLVER.IMS_PER_BATCH images.
        images: images per step.

    Returns:
        tuple[str, ...]: KEY, VALUE, ...
    """
    solver = cfg.SOLVER
    factor = solver.IMS_PER_BATCH / images
    values = {
        "IMS_PER_BATCH": images,
        "BASE_LR": solver.BASE_LR / factor,
        "MAX_ITER": round(solver.MAX_ITER * factor),
        "STEPS": tuple(round(step * factor) for step in solver.STEPS),
        "WARMUP_ITERS": round(solver.WARMUP_ITERS * factor),
        "CHECKPOINT_PERIOD": round(solver.CHECKPOINT_PERIOD * factor),
    }
    return tuple(text for key, value in values.items() for text in (f"SOLVER.{key}", str(value)))
