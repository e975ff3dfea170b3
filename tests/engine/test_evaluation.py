"""The evaluator of a dataset, and that a dataset with a measure of its own is warned of."""

import json
import os

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances

from kn_detectron.engine import Trainer
from kn_detectron.engine.evaluation import build_coco_evaluator, write_results
from kn_detectron.engine.pictures import draw_predictions
from kn_detectron.layers import kalman_layers

from . import tiny


def test_numbers_of_numpy_and_torch_are_written(tmp_path):
    """Evaluators of one's own return them."""
    numbers = {"AP": np.float32(0.5), "APs": np.float32("nan"), "APl": torch.tensor(3.0)}
    results = {"own": {**numbers, "of classes": np.array([1.0, np.nan]), "count": np.int64(2)}}
    write_results(tiny.config(tmp_path), results)
    written = json.loads((tmp_path / "inference/results.json").read_text())
    want = {"AP": 0.5, "APs": None, "APl": 3.0, "of classes": [1.0, None], "count": 2}
    assert written == {"own": want}


@pytest.mark.parametrize("kind", ["coco", "pascal_voc"])
def test_another_measure_than_cocos_is_warned_of(datasets, tmp_path, kn_log, kind):
    metadata = MetadataCatalog.get("shapes_val")
    before = metadata.evaluator_type
    del metadata.evaluator_type
    metadata.evaluator_type = kind
    try:
        build_coco_evaluator(tiny.config(tmp_path), "shapes_val")
    finally:
        del metadata.evaluator_type
        metadata.evaluator_type = before
    warned = "shapes_val has the evaluator type 'pascal_voc', and is evaluated with COCO's AP"
    assert (warned in kn_log.text) == (kind != "coco")


def test_datasets_named_by_paths_with_one_end_have_folders_of_their_own(datasets, tmp_path):
    cfg = tiny.config(tmp_path)
    cfg.defrost()
    cfg.DATASETS.TEST = names = ["/a/data/val", "/b/data/val", "/c/other/val"]
    for name in names:
        MetadataCatalog.get(name).set(json_file=MetadataCatalog.get("shapes_val").json_file)
    try:
        folders = [build_coco_evaluator(cfg, name)._output_dir for name in names]
    finally:
        for name in names:
            MetadataCatalog.remove(name)
    assert [os.path.basename(f) for f in folders] == ["a_data_val", "b_data_val", "other_val"]


def test_panoptic_models_are_warned_of(datasets, tmp_path, kn_log):
    cfg = tiny.config(tmp_path)
    cfg.defrost()
    cfg.MODEL.META_ARCHITECTURE = "PanopticFPN"
    build_coco_evaluator(cfg, "shapes_val")
    assert "is evaluated with COCO's AP: override Trainer.build_evaluator" in kn_log.text


def test_keypoints_have_the_tolerances_of_the_config(datasets, tmp_path):
    cfg = tiny.config(tmp_path)
    cfg.defrost()
    cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.1, 0.2, 0.3]
    assert list(build_coco_evaluator(cfg, "shapes_val")._kpt_oks_sigmas) == [0.1, 0.2, 0.3]


@pytest.fixture
def medium_objects(tmp_path):
    """A dataset of one image with an object of medium size and its three keypoints."""
    person = {"id": 1, "name": "person", "keypoints": ["a", "b", "c"], "skeleton": []}
    of_image = {"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0}
    box = {"bbox": [10, 10, 40, 40], "area": 1600, "num_keypoints": 3}
    points = {"segmentation": [[10, 10, 50, 10, 50, 50, 10, 50]]}
    points["keypoints"] = [12, 12, 2, 30, 30, 2, 48, 48, 2]
    content = {
        "images": [{"id": 1, "file_name": "1.png", "width": 100, "height": 100}],
        "categories": [person],
        "annotations": [{**of_image, **box, **points}],
    }
    (tmp_path / "medium.json").write_text(json.dumps(content))
    MetadataCatalog.get("medium").set(
        json_file=str(tmp_path / "medium.json"),
        thing_classes=["person"],
        thing_dataset_id_to_contiguous_id={1: 0},
    )
    yield "medium"
    MetadataCatalog.remove("medium")


def test_nothing_found_has_cocos_numbers_where_there_are_objects(medium_objects, tmp_path, kn_log):
    """0 for the sizes that there are, and none for the others, as with useless detections."""
    cfg = tiny.config(tmp_path)
    cfg.defrost()
    cfg.MODEL.KEYPOINT_ON, cfg.TEST.KEYPOINT_OKS_SIGMAS = True, [0.1, 0.1, 0.1]
    numbers = {}
    for count in (0, 1):
        found = Instances(
            (100, 100),
            pred_boxes=Boxes(torch.tensor([[80.0, 80.0, 95.0, 95.0]])),
            scores=torch.tensor([0.9]),
            pred_classes=torch.tensor([0]),
            pred_masks=torch.zeros(1, 100, 100, dtype=torch.bool),
            pred_keypoints=torch.full((1, 3, 3), 90.0),
        )[:count]
        evaluator = build_coco_evaluator(cfg, medium_objects)
        evaluator.reset()
        evaluator.process([{"image_id": 1}], [{"instances": found}])
        numbers[count] = evaluator.evaluate()
    assert kn_log.text.count("The model finds nothing in any") == 3  # of boxes, masks and keypoints
    assert set(numbers[0]) == {"bbox", "segm", "keypoints"}
    for task, of_nothing in numbers[0].items():
        assert str(dict(of_nothing)) == str(dict(numbers[1][task]))
        assert of_nothing["AP"] == of_nothing["APm"] == 0.0 and np.isnan(of_nothing["APl"])


def test_recalls_are_cocos(tmp_path):
    """Counted by hand: 12 small objects are all found, and 2 of 4 medium ones, the best a medium one."""
    small = [(10.0 + 20 * i, 10.0, 8.0, 8.0) for i in range(12)]
    medium = [(10.0 + 60 * i, 100.0, 40.0, 40.0) for i in range(4)]
    boxes = small + medium
    annotations = [
        {"id": i + 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "bbox": b, "area": b[2] * b[3]}
        for i, b in enumerate(boxes)
    ]
    image = {"id": 1, "file_name": "1.png", "width": 300, "height": 200}
    categories = [{"id": 1, "name": "square"}]
    content = {"images": [image], "categories": categories, "annotations": annotations}
    (tmp_path / "squares.json").write_text(json.dumps(content))
    metadata = MetadataCatalog.get("squares")
    metadata.set(json_file=str(tmp_path / "squares.json"), thing_classes=["square"])
    metadata.thing_dataset_id_to_contiguous_id = {1: 0}
    x, y, width, height = torch.tensor(boxes[:14]).T
    found = Instances(
        (200, 300),
        pred_boxes=Boxes(torch.stack([x, y, x + width, y + height], 1)),
        scores=torch.tensor([0.5] * 12 + [0.9, 0.4]),
        pred_classes=torch.zeros(14, dtype=torch.long),
    )
    try:
        evaluator = build_coco_evaluator(tiny.config(tmp_path, "MODEL.MASK_ON", False), "squares")
        evaluator.reset()
        evaluator.process([{"image_id": 1}], [{"instances": found}])
        numbers = evaluator.evaluate()["bbox"]
    finally:
        MetadataCatalog.remove("squares")
    recalls = {"AR1": 1 / 16, "AR10": 10 / 16, "AR100": 14 / 16, "ARs": 12 / 12, "ARm": 2 / 4}
    for name, recall in recalls.items():
        assert numbers[name] == pytest.approx(100 * recall), name
    assert np.isnan(numbers["ARl"])
    # Up to the recall 14/16 the precision is 1: at 88 of COCO's 101 points.
    assert numbers["AP"] == pytest.approx(100 * 88 / 101)


def test_norms_in_evaluation_mode_stay_there_through_an_evaluation(datasets, tmp_path):
    """They keep their statistics while the rest is trained, and the rest goes on being trained."""
    cfg = tiny.config(tmp_path)
    torch.manual_seed(0)
    model = Trainer.build_model(cfg).train()
    for norm in kalman_layers(model).values():
        norm.eval()
    before = [module.training for module in model.modules()]
    Trainer.test(cfg, model)
    assert [module.training for module in model.modules()] == before
    draw_predictions(cfg, {"model": model}, str(tmp_path / "picture.png"), count=1)
    assert [module.training for module in model.modules()] == before and set(before) == {
        True,
        False,
    }
