import copy
import json

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

from kn_detectron import InputError
from kn_detectron.engine import pictures
from kn_detectron.engine.pictures import (
    BrightVisualizer,
    draw_curves,
    draw_gains,
    draw_predictions,
    read_metrics,
)
from kn_detectron.layers import set_gain_scale

from ..models import build_backbone, resnet_cfg
from . import tiny
from .loop import TwoNorms


def write_metrics(folder, entries):
    (folder / "metrics.json").write_text("".join(json.dumps(e) + "\n" for e in entries))


def test_read_metrics_takes_the_last_word_on_an_iteration(tmp_path):
    write_metrics(
        tmp_path,
        [
            {"iteration": 19, "total_loss": 3.0},
            {"iteration": 39, "total_loss": 2.0},
            {"iteration": 39, "total_loss": 1.5},  # resumed from 20
            {"iteration": 39, "bbox/AP": 10.0},
        ],
    )
    assert read_metrics(str(tmp_path)) == [
        {"iteration": 19, "total_loss": 3.0},
        {"iteration": 39, "total_loss": 1.5, "bbox/AP": 10.0},
    ]


def test_read_metrics_goes_on_behind_a_line_that_was_cut_short(tmp_path):
    cut = '{"iteration": 19, "total_lo'
    (tmp_path / "metrics.json").write_text(cut + '{"iteration": 39}\n{"iteration": 59}\n' + cut)
    assert read_metrics(str(tmp_path)) == [{"iteration": 59}]


def drawn(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def test_an_object_has_one_bright_colour_in_truth_and_predictions():
    """Whatever the order of the objects, and unlike detectron2's random colours."""
    image = np.zeros((60, 90, 3), np.uint8)
    boxes = torch.tensor([[60.0, 10.0, 85.0, 50.0], [5.0, 10.0, 30.0, 50.0]])
    metadata = MetadataCatalog.get("__unused")
    record = {
        "annotations": [
            {"bbox": box.tolist(), "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0} for box in boxes
        ]
    }
    drawings = [BrightVisualizer(image, metadata).draw_dataset_dict(record)]
    for order in ([0, 1], [1, 0]):
        found = Instances(
            (60, 90),
            pred_boxes=Boxes(boxes[order]),
            scores=torch.ones(2),
            pred_classes=torch.zeros(2, dtype=torch.long),
        )
        drawings.append(BrightVisualizer(image, metadata).draw_instance_predictions(found))
    edges = []
    for drawing in drawings:
        picture = drawing.get_image().astype(int)
        edges.append((picture[45, 3:8].max(0), picture[45, 82:88].max(0)))
        # detectron2 draws boxes half transparent, here on black.
        for edge, bright in zip(edges[-1], ((255, 59, 48), (52, 199, 89))):
            np.testing.assert_allclose(edge, np.array(bright) / 2, atol=2)
    for other in edges[1:]:
        np.testing.assert_array_equal(other, edges[0])
    found = found[found.scores > 1]  # none
    BrightVisualizer(image, metadata).draw_instance_predictions(found)


class Detector(torch.nn.Module):
    """Finds two objects in every image."""

    def forward(self, inputs):
        corners = torch.tensor([[10.0, 10.0, 20.0, 20.0], [30.0, 30.0, 40.0, 40.0]])
        found = Instances((64, 64), pred_boxes=Boxes(corners), scores=torch.tensor([0.2, 0.6]))
        found.pred_classes = torch.tensor([0, 0])
        return [{"instances": found}]


def test_draw_predictions_draws_so_many_images_and_what_is_certain_enough(datasets, tmp_path):
    def picture(count, min_score):
        path = str(tmp_path / "predictions.png")
        draw_predictions(tiny.config(tmp_path), {"model": Detector()}, path, count, min_score)
        return drawn(path)

    both, certain, of_two = picture(1, 0.1), picture(1, 0.5), picture(2, 0.5)
    changed = (both != certain).any(2)
    assert changed.any() and not changed[:, : changed.shape[1] // 2].any()  # the ground truth
    assert len(of_two) > 1.5 * len(certain)


def test_draw_predictions_leaves_out_images_without_objects(datasets, tmp_path, monkeypatch):
    first, second = copy.deepcopy(DatasetCatalog.get("shapes_val"))
    first["annotations"] = []
    monkeypatch.setattr(pictures, "DatasetCatalog", {"shapes_val": [first, second]})
    detector, seen = Detector(), []
    detector.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]["file_name"]))
    draw_predictions(tiny.config(tmp_path), {"model": detector}, str(tmp_path / "a.png"), 1)
    assert seen == [second["file_name"]]


def test_draw_predictions_needs_an_object(datasets, tmp_path, monkeypatch):
    records = [dict(record, annotations=[]) for record in DatasetCatalog.get("shapes_val")]
    monkeypatch.setattr(pictures, "DatasetCatalog", {"shapes_val": records})
    with pytest.raises(InputError, match="No image of the dataset shapes_val has objects: "):
        draw_predictions(tiny.config(tmp_path), {"model": Detector()}, str(tmp_path / "a.png"))


@pytest.mark.parametrize("evaluated", [True, False])
def test_draw_curves(tmp_path, evaluated):
    entries = [{"iteration": i, "total_loss": 3.0 / (i + 1), "loss_cls": 0.1} for i in range(5)]
    if evaluated:
        entries[-1].update({"bbox/AP": 30.0, "segm/AP": 25.0})
    write_metrics(tmp_path, entries)
    draw_curves(str(tmp_path), str(tmp_path / "curves.png"))
    picture = drawn(tmp_path / "curves.png")
    right = picture[:, picture.shape[1] // 2 :]
    colourful = (right.max(2).astype(int) - right.min(2) > 50).sum()
    assert (colourful > 50) == evaluated  # points of APs, or an empty plot


def test_predictions_need_a_dataset(tmp_path):
    with pytest.raises(InputError, match="DATASETS.TEST is empty: name the dataset"):
        draw_predictions(get_cfg(), {}, str(tmp_path / "picture.png"))


def test_draw_gains_shows_every_layer(tmp_path):
    backbone = build_backbone(resnet_cfg("KN"))
    write_metrics(tmp_path, [{"iteration": 0, "kn/innovation_mean/stem.conv1.norm": 0.5}])
    draw_gains(str(tmp_path), backbone, str(tmp_path / "a.png"))
    backbone.stem.conv1.norm.gain_logit.data.fill_(2.0)
    draw_gains(str(tmp_path), backbone, str(tmp_path / "b.png"))
    a, b = drawn(tmp_path / "a.png"), drawn(tmp_path / "b.png")
    assert a.shape != b.shape or (a != b).any()


def test_draw_gains_draws_the_innovations_of_means_above_those_of_variances(tmp_path):
    rows = []
    for kind in ("mean", "logvar"):
        name = f"kn/innovation_{kind}/body"
        write_metrics(tmp_path, [{"iteration": 0, name: 0.5}])
        draw_gains(str(tmp_path), TwoNorms(), str(tmp_path / "gains.png"))
        orange = (drawn(tmp_path / "gains.png") == (255, 127, 14)).all(2)
        rows.append(np.flatnonzero(orange.any(1)))
    of_means, of_variances = rows
    assert of_means.max() < of_variances.min()


def test_draw_gains_draws_the_gain_in_effect(tmp_path):
    write_metrics(tmp_path, [{"iteration": 0}])
    drawings = []
    for gain, scale in ((0.4, 0.0), (0.0, 1.0), (0.4, 1.0)):
        learned = dict(MODEL__KN__GAIN=gain, MODEL__KN__LEARN_GAIN=gain > 0)
        backbone = build_backbone(resnet_cfg("KN", **learned))
        set_gain_scale(backbone, scale)
        draw_gains(str(tmp_path), backbone, str(tmp_path / "gains.png"))
        drawings.append(drawn(tmp_path / "gains.png"))
    annealed, same, other = drawings
    assert annealed.shape == same.shape and (annealed == same).all()
    assert annealed.shape != other.shape or (annealed != other).any()
