"""Networks by name: the paper's, torchvision's, timm's."""

import difflib

import torchvision
from torch import nn

from ..errors import InputError
from .cifar_resnet import CifarResNet
from .inception import InceptionV2, SmallInception

__all__ = ["NETWORKS", "CifarResNet", "InceptionV2", "SmallInception", "build_network"]

# The paper's, by name; each takes the number of classes.
NETWORKS = {
    "cifar_resnet14": lambda num_classes: CifarResNet(2, num_classes),
    "cifar_resnet32": lambda num_classes: CifarResNet(5, num_classes),
    "cifar_resnet110": lambda num_classes: CifarResNet(18, num_classes),
    "cifar_resnet14_preactivation": lambda num_classes: CifarResNet(2, num_classes, True),
    "cifar_resnet32_preactivation": lambda num_classes: CifarResNet(5, num_classes, True),
    "cifar_resnet110_preactivation": lambda num_classes: CifarResNet(18, num_classes, True),
    "small_inception": SmallInception,
    "inception_v2": InceptionV2,
}

# The networks of torchvision with auxiliary classifiers, for which there is no loss here.
_WITH_SIDES = ("googlenet", "inception_v3")


def build_network(name: str, num_classes: int) -> nn.Module:
    """A network by name, with fresh weights.

    Args:
        name: one of :data:`NETWORKS`, the name of a classification network of torchvision, or
            ``timm/<name>``.
        num_classes: number of outputs of the last layer.

    Returns:
        nn.Module: takes images (N, 3, H, W) and returns scores (N, num_classes).

    Raises:
        InputError: there is no network of that name, or timm is not installed.
    """
    if name in NETWORKS:
        return NETWORKS[name](num_classes)
    library, _, timms = name.partition("/")
    if library == "timm":
        return _build_timm(timms, num_classes)
    if name not in torchvision.models.list_models(torchvision.models):
        raise InputError(
            f"There is no network {name!r}: give one of {', '.join(NETWORKS)}, the name of a "
            "classification network in torchvision.models, or timm/<name>."
        )
    options = {"aux_logits": False, "init_weights": True} if name in _WITH_SIDES else {}
    return torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)


def _build_timm(name: str, num_classes: int) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise InputError(
            f"timm/{name} needs timm, which is not installed: install it with pip install timm."
        ) from error
    if not timm.is_model(name):
        similar = difflib.get_close_matches(name, timm.list_models())
        hint = f", such as {', '.join(similar)}" if similar else ""
        raise InputError(f"timm has no network {name!r}: give one of timm.list_models(){hint}.")
    return timm.create_model(name, num_classes=num_classes)
