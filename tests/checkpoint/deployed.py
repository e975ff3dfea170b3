"""Trained Kalman models for the tests of folding and export."""

import torch
from detectron2.utils.events import EventStorage

from ..models import build_rcnn, fpn_rcnn_cfg, randomize, rcnn_cfg, rcnn_inputs

# Without a threshold a model that has learned next to nothing detects something too.
_ANYTHING = dict(MODEL__ROI_HEADS__SCORE_THRESH_TEST=0.0, MODEL__RPN__POST_NMS_TOPK_TEST=20)


def c4_cfg(**overrides):
    """Mask R-CNN C4, as :func:`~tests.models.rcnn_cfg`."""
    return rcnn_cfg("KN", **{**_ANYTHING, **overrides})


def fpn_cfg(**overrides):
    """Mask R-CNN R18-FPN, with KN in the backbone, the FPN and both heads."""
    return fpn_rcnn_cfg("KN", **{**_ANYTHING, **overrides})


def trained(cfg, steps=2):
    """A model after a few steps, in evaluation mode: no parameter and no statistic is at 0 or 1."""
    model = randomize(build_rcnn(cfg))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    with EventStorage():
        for step in range(steps):
            loss = sum(model(rcnn_inputs(seed=step)).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def pictures():
    """Images that were not trained on, of two sizes, as a detector gets them."""
    return rcnn_inputs(n=1, size=96, seed=10) + rcnn_inputs(n=2, size=120, seed=11)


def detect(model, inputs):
    """Per image boxes, scores, classes and mask probabilities, by the names of detectron2."""
    with torch.no_grad():
        results = model.inference(inputs, do_postprocess=False)
    return [
        {name: getattr(field, "tensor", field) for name, field in result.get_fields().items()}
        for result in results
    ]


def assert_same_detections(ours, theirs, tolerance=1e-5):
    """The same, and not nothing.

    Boxes are compared with the size of the images, which is what rounding goes with, and one by
    one: scores that are all but equal may come in another order.
    """
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs):
        assert set(one) == {"pred_boxes", "scores", "pred_classes", "pred_masks"} == set(other)
        assert len(one["scores"]) > 0
        places = [
            torch.cat([d["pred_boxes"], 1e3 * d["pred_classes"][:, None]], 1) for d in (one, other)
        ]
        order = torch.cdist(*places).argmin(1)
        assert order.sort().values.tolist() == list(range(len(other["scores"])))
        for name, value in one.items():
            scale = value.abs().max() if name == "pred_boxes" else 1
            difference = (other[name][order] - value).abs().max()
            assert difference <= tolerance * scale, (name, difference)
