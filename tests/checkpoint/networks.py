"""Networks with BatchNorm whose weights and statistics come from training."""

import functools

import torch
from detectron2.utils.events import EventStorage

from ..models import build_rcnn, rcnn_cfg, rcnn_inputs


def scenes(n, seed=0, size=96):
    """Inputs of a detector: bright rectangles, as annotated, on smooth backgrounds."""
    inputs = rcnn_inputs(n, size, objects=2, seed=100 * seed)
    for i, record in enumerate(inputs):
        g = torch.Generator().manual_seed(100 * seed + i)
        image = torch.nn.functional.interpolate(
            torch.rand(1, 3, 6, 6, generator=g) * 150, size=size, mode="bilinear"
        )[0]
        for box in record["instances"].gt_boxes.tensor.round().long():
            x0, y0, x1, y1 = box.tolist()
            image[:, y0:y1, x0:x1] += torch.rand(3, 1, 1, generator=g) * 100
        image += torch.randn(image.shape, generator=g) * 5
        record["image"] = image.clamp(0, 255).to(torch.uint8)
    return inputs


@functools.lru_cache(maxsize=None)
def _trained_state():
    torch.manual_seed(0)
    model = build_rcnn(rcnn_cfg("BN")).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    with EventStorage():
        for step in range(30):
            losses = sum(model(scenes(4, seed=step)).values())
            optimizer.zero_grad()
            losses.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
        # The statistics of the trained weights, as PreciseBN would have them.
        norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
        with torch.no_grad():
            for step in range(12):
                model(scenes(4, seed=50 + step))
    return dict(model.state_dict())  # without versions of modules, which would be BatchNorm's


def trained_batch_norm(norm="BN", **options):
    """A trained Mask R-CNN C4 with BatchNorm, or with the same weights under another norm."""
    model = build_rcnn(rcnn_cfg(norm, **options))
    model.load_state_dict(_trained_state(), strict=norm == "BN")
    return model
