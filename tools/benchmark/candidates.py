"""The candidates: layers, networks and predictions, each ready to be run many times."""

import contextlib
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Callable, List

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d, get_norm
from detectron2.modeling import build_backbone, build_model
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from kn_detectron.engine.config_file import read_config
from kn_detectron.layers import (
    Belief,
    ClosedFormTransition,
    GroupKalmanNorm2d,
    KalmanNorm2d,
    Transition,
    build_transition,
)
from kn_detectron.model_zoo import get_config
from kn_detectron.modeling import Feature

from .presets import Group

__all__ = ["Candidate", "NotRun", "build", "network_config"]


class NotRun(Exception):
    """A candidate cannot be run. The message is the reason."""


@dataclass
class Candidate:
    """One line of a group, ready to run.

    Attributes:
        forward: computes the result.
        backward: computes the gradients from the result; None if there are none.
        constants: tensors that exist before and after a run: parameters, buffers, inputs.
        finish: the rest of a training step: the optimiser.
        parameters: number of learned values.
        scale: what the loss is multiplied by. It drops where gradients overflowed.
    """

    forward: Callable[[], object]
    backward: Callable[[object], object] = None
    constants: List[Tensor] = ()
    finish: Callable[[], None] = lambda: None
    parameters: int = 0
    scale: Callable[[], float] = lambda: 1.0

    def run(self) -> None:
        """Runs all of it once."""
        result = self.forward()
        if self.backward is not None:
            self.backward(result)
        self.finish()


def _constants(module: nn.Module) -> List[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _autocasts_on_cpu() -> bool:
    try:
        return torch.is_autocast_enabled("cpu")
    except TypeError:  # torch before 2.4, where this is about GPUs and takes no argument
        return torch.is_autocast_cpu_enabled()


@contextlib.contextmanager
def _autocast(group: Group, device: torch.device):
    half = group.dtype != "float32"
    with torch.autocast(
        device.type, dtype=getattr(torch, group.dtype) if half else None, enabled=half
    ):
        # Old versions of torch warn and go on in float32.
        if half and device.type == "cpu" and not _autocasts_on_cpu():
            raise NotRun(f"autocast to {group.dtype} does not work on a CPU with this torch")
        yield


def _memory_format(group: Group) -> torch.memory_format:
    return {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}[
        group.memory_format
    ]


def _check_sync_bn(norm: str, device: torch.device) -> None:
    if norm != "SyncBN":
        return
    if device.type == "cpu":
        raise NotRun("SyncBatchNorm needs GPUs and a process group")
    if comm.get_world_size() < 2:
        raise NotRun("in one process SyncBatchNorm is BatchNorm: give --num-gpus 2 or more")


def _norm_layer(norm: str, channels: int) -> nn.Module:
    if norm in ("GN", "GKN") and channels % 32:
        raise NotRun(f"32 groups do not divide {channels} channels")
    if norm == "KN-paper-MC":
        raise NotRun("as a layer it is KN-paper: only the prediction differs")
    if norm == "KN":
        return KalmanNorm2d(channels)
    if norm == "KN-gain0":
        return KalmanNorm2d(channels, gain=0.0, learn_gain=False)
    if norm == "KN-paper":
        return KalmanNorm2d(channels, variant="paper")
    if norm == "GKN":
        return GroupKalmanNorm2d(32, channels)
    if norm == "FrozenBN":
        return FrozenBatchNorm2d(channels)
    if norm == "FrozenBN-affine":
        return nn.BatchNorm2d(channels).eval()
    if norm in ("BN", "SyncBN", "GN"):
        return get_norm(norm, channels)
    raise ValueError(f"there is no layer {norm!r}")


def _build_layer(group: Group, norm: str, device: torch.device) -> Candidate:
    """A norm in training on features that need a gradient, with a prior where it takes one."""
    _check_sync_bn(norm, device)
    channels = group.shape[1]
    layer = _norm_layer(norm, channels).to(device)
    random, dtype = torch.Generator(device).manual_seed(0), getattr(torch, group.dtype)
    x, dy = (
        torch.randn(group.shape, generator=random, device=device)
        .to(dtype)
        .contiguous(memory_format=_memory_format(group))
        for _ in range(2)
    )
    x = x.mul_(2).add_(1).requires_grad_()
    inputs, leaves = {}, [x, *layer.parameters()]
    if getattr(layer, "needs_prior", False):
        prior = Belief(*(f(1, channels, device=device) for f in (torch.zeros, torch.ones)))
        leaves += [v.requires_grad_() for v in prior]
        inputs["prior"] = prior

    def forward():
        with _autocast(group, device):
            y = layer(x, **inputs)
        return y[0] if inputs else y

    def backward(y):
        nonlocal dy
        dy = dy.to(y.dtype)  # under autocast GroupNorm returns float32
        return torch.autograd.grad(y, leaves, dy, allow_unused=True)

    return Candidate(forward, backward, [*_constants(layer), *leaves, dy], parameters=_count(layer))


_CONFIGS = {
    "BN": ("BN", ("MODEL.RESNETS.NORM", "BN")),
    "FrozenBN": ("BN", ()),
    "SyncBN": ("BN", ("MODEL.RESNETS.NORM", "SyncBN")),
    "GN": ("GN", ()),
    "KN": ("KN", ()),
    "KN-gain0": ("KN", ("MODEL.KN.GAIN", 0.0, "MODEL.KN.LEARN_GAIN", False)),
    "KN-paper": ("KN_paper", ("MODEL.KN.PREDICTION", "closed_form")),
    "KN-paper-MC": ("KN_paper", ()),
    "GKN": ("GKN", ()),
}


def network_config(norm: str, device: torch.device, group: Group) -> CfgNode:
    """The config of a norm, or the config in a file.

    The configs of the norms are the shipped ones for COCO, made alike except for the norm.

    Raises:
        NotRun: if there is no network with this norm.
        InputError: if something in the file is wrong.
    """
    # Weights are random, and with this learning rate every step is the same.
    fixed = ["MODEL.DEVICE", str(device), "MODEL.WEIGHTS", "", "SOLVER.BASE_LR", "0.0"]
    if norm.endswith(".yaml"):
        cfg = read_config(SimpleNamespace(config_file=norm, opts=fixed))
    elif norm in _CONFIGS:
        name, options = _CONFIGS[norm]
        file = f"mask_rcnn_R50_C4_{name}.yaml"
        if group.slim:
            file = f"quick_schedules/mask_rcnn_R50_C4_{name}_instant_test.yaml"
        cfg = get_config(file)
        cfg.merge_from_list(
            [
                *fixed,
                # GroupNorm's config has False, with which the convolutions have other work to do.
                *("MODEL.RESNETS.STRIDE_IN_1X1", True),
                # So that frozen statistics do not overflow with random weights.
                *("MODEL.PIXEL_STD", [57.375, 57.120, 58.395]),
                *options,
            ]
        )
    else:
        raise NotRun("only one layer is measured with it, not a network")
    if group.regions is not None:
        cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = group.regions
    return cfg


def _images(group: Group, device: torch.device) -> Tensor:
    images = torch.randn(group.shape, generator=torch.Generator().manual_seed(0))
    return images.to(device).contiguous(memory_format=_memory_format(group))


def _backbone(group: Group, norm: str, device: torch.device) -> nn.Module:
    _check_sync_bn(norm, device)
    torch.manual_seed(0)
    backbone = build_backbone(network_config(norm, device, group))
    return backbone.to(device).to(memory_format=_memory_format(group))


def _build_backbone(group: Group, norm: str, device: torch.device) -> Candidate:
    backbone = _backbone(group, norm, device).train()
    images = _images(group, device)
    function = torch.compile(backbone, fullgraph=True) if group.what == "compiled" else backbone
    parameters = [p for p in backbone.parameters() if p.requires_grad]

    def forward():
        with _autocast(group, device):
            return function(images)["res4"]

    def backward(y):
        return torch.autograd.grad(y, parameters, torch.ones_like(y), allow_unused=True)

    constants = [*_constants(backbone), images]
    return Candidate(forward, backward, constants, parameters=_count(backbone))


def _build_evaluation(group: Group, norm: str, device: torch.device) -> Candidate:
    backbone = _backbone(group, norm, device).eval()
    images = _images(group, device)

    def forward():
        with torch.no_grad(), _autocast(group, device):
            return backbone(images)

    return Candidate(forward, parameters=_count(backbone))


def _detector_inputs(shape) -> List[dict]:
    """Images of noise with rectangles as objects, in the form of detectron2's loaders."""
    count, channels, height, width = shape
    objects, random = 8, np.random.default_rng(0)
    inputs = []
    for _ in range(count):
        size = random.uniform(0.1, 0.5, (objects, 2)) * (width, height)
        corner = random.uniform(0, 1, (objects, 2)) * ((width, height) - size)
        boxes = np.concatenate([corner, corner + size], axis=1)
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.from_numpy(boxes).float())
        instances.gt_classes = torch.zeros(objects, dtype=torch.long)  # which every config has
        instances.gt_masks = PolygonMasks(
            [[np.array([x0, y0, x1, y0, x1, y1, x0, y1])] for x0, y0, x1, y1 in boxes]
        )
        image = torch.from_numpy(random.integers(0, 256, (channels, height, width), np.uint8))
        inputs.append(dict(image=image, instances=instances, height=height, width=width))
    return inputs


def _detector(group: Group, norm: str, device: torch.device):
    _check_sync_bn(norm, device)
    cfg = network_config(norm, device, group)
    torch.manual_seed(0)
    model = build_model(cfg).to(memory_format=_memory_format(group)).train()
    if hasattr(model, "proposal_generator"):  # not a RetinaNet
        # The anchors become the proposals: all norms have the same number of regions and masks.
        head = model.proposal_generator.rpn_head
        nn.init.zeros_(head.objectness_logits.weight)
        nn.init.zeros_(head.anchor_deltas.weight)
    return cfg, model


def _build_step(group: Group, norm: str, device: torch.device) -> Candidate:
    if norm == "KN-prediction":
        return _predict(replace(group, shape=(0, *group.shape[1:])), "KN", device)
    cfg, model = _detector(group, norm, device)
    optimizer = build_optimizer(cfg, model)
    inputs = _detector_inputs(group.shape)
    scaler = None
    if group.dtype == "float16":
        if device.type == "cpu":
            raise NotRun("float16 needs gradient scaling, which detectron2 has for GPUs only")
        # With the usual scale, and with 2^10 too, the first gradients may overflow, and steps that
        # are timed be skipped.
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**7)

    def forward():
        torch.manual_seed(0)
        with EventStorage(), _autocast(group, device):
            return sum(model(inputs).values())

    def backward(loss):
        (loss if scaler is None else scaler.scale(loss)).backward()

    def finish():
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad(set_to_none=True)

    candidate = Candidate(forward, backward, _constants(model), finish, _count(model))
    return candidate if scaler is None else replace(candidate, scale=scaler.get_scale)


# The side of an image whose features in res4 have more than one pixel, as live statistics need.
_TINY = 32


def _needs_an_image(transition: Transition, device: torch.device) -> bool:
    return device.type == "cuda" and isinstance(transition, ClosedFormTransition)


def _predict(group: Group, norm: str, device: torch.device) -> Candidate:
    """All predictions of a training step: the network runs on next to nothing.

    On a CPU this is an empty batch. Its features are empty but have a height and a width, which a
    sampled prediction needs. The little work on empty features is measured too.

    On a GPU layers with empty features leave their filter to torch's operators, dozens of launches
    where a real step has one of Triton's each way. There a prediction in closed form, which does
    not depend on the size of the image, runs on one image of 32 x 32 and one region. The launches
    of the convolutions and the norms on them are measured too, so the result is an upper bound. A
    sampled prediction runs on the empty batch, with the height and the width that it depends on.
    """
    if norm not in ("KN", "KN-paper", "KN-paper-MC", "GKN"):
        raise NotRun("it predicts nothing")
    _, model = _detector(group, norm, device)
    transition, count = model.backbone.chain.transition, 0
    if _needs_an_image(transition, device):
        group, count = replace(group, shape=(1, 3, _TINY, _TINY)), 1
    images = _images(group, device)
    parameters = [
        *(p for p in model.backbone.parameters() if p.requires_grad),
        *model.roi_heads.res5.parameters(),
    ]

    def forward():
        features = model.backbone(images)
        (name,) = map(str, model.roi_heads.in_features)
        belief = features.beliefs[name]
        regions = features[name].new_zeros(count, belief.mean.shape[1], 14, 14)
        result = model.roi_heads.res5(Feature(regions, transition.source(belief, regions)))
        return [features[name], result.value, *transition.moments(result.belief)]

    def backward(results):
        ones = [torch.ones_like(v) for v in results]
        return torch.autograd.grad(results, parameters, ones, allow_unused=True)

    return Candidate(forward, backward, _constants(model))


def _build_prediction(group: Group, name: str, device: torch.device) -> Candidate:
    norm, _, size = name.partition("@")
    return _predict(replace(group, shape=(0, 3, int(size), int(size))), norm, device)


def _build_curve(group: Group, name: str, device: torch.device) -> Candidate:
    """One prediction, through ReLU and convolution, or one layer on the same features."""
    if name in ("KN", "BN"):
        return _build_layer(group, name, device)
    channels = group.shape[1]
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, channels, group.kernel, padding=group.kernel // 2, bias=False)
    conv = conv.to(device)
    transition = build_transition(name.lower().replace(" ", "_"))
    x = torch.empty(group.shape, device=device)
    belief = Belief(*(f(1, channels, device=device) for f in (torch.zeros, torch.ones)))
    leaves = [conv.weight, *(v.requires_grad_() for v in belief)]

    def forward():
        return transition.conv(transition.activation(belief, x, "relu"), conv)

    def backward(prior):
        return torch.autograd.grad(list(prior), leaves, [torch.ones_like(v) for v in prior])

    return Candidate(forward, backward, [*leaves, x])


_BUILDERS = {
    "layer": _build_layer,
    "backbone": _build_backbone,
    "compiled": _build_backbone,
    "evaluation": _build_evaluation,
    "step": _build_step,
    "prediction": _build_prediction,
    "size": _build_curve,
    "channels": _build_curve,
}


def build(group: Group, name: str, device: torch.device) -> Candidate:
    """Builds a candidate of a group.

    Raises:
        NotRun: if it cannot be run, on this device or at all.
    """
    if device.type == "cuda" and not torch.cuda.is_available():
        raise NotRun("torch finds no GPU")
    if name == "KN-prediction" and group.what != "step":
        raise NotRun("it is measured beside a step")
    return _BUILDERS[group.what](group, name, device)
