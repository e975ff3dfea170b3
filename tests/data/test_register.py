import json
import os
import subprocess
import sys

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts

from kn_detectron.data import (
    CATEGORIES,
    ShapesSpec,
    prepare_dataset,
    register_shapes,
    register_shapes_lazily,
)
from kn_detectron.errors import InputError

from .conftest import SPEC
from .scoring import score_of_truth


def test_dataset_dicts_hold_what_the_files_hold(shapes):
    content = json.loads((shapes / "annotations" / "instances_train.json").read_text())
    dicts = DatasetCatalog.get("shapes_train")
    assert len(dicts) == SPEC.num_train
    assert sum(len(d["annotations"]) for d in dicts) == len(content["annotations"]) > 0
    assert {a["category_id"] for d in dicts for a in d["annotations"]} <= set(range(5))
    assert all(os.path.isfile(d["file_name"]) for d in dicts)
    usable = get_detection_dataset_dicts(["shapes_train"], filter_empty=True)
    assert all(any(not a["iscrowd"] for a in d["annotations"]) for d in usable)


def test_metadata_is_complete_before_anything_is_loaded(tmp_path, default_registration):
    register_shapes_lazily(tmp_path / "none")
    metadata = MetadataCatalog.get("shapes_val")
    assert not (tmp_path / "none").exists()
    assert metadata.thing_classes == list(CATEGORIES)
    assert metadata.json_file == str(tmp_path / "none" / "annotations" / "instances_val.json")
    assert metadata.image_root == str(tmp_path / "none" / "val")
    assert metadata.evaluator_type == "coco"


def test_first_use_generates_both_splits(tmp_path, default_registration):
    register_shapes_lazily(tmp_path / "shapes", ShapesSpec(num_train=3, num_val=2, size=32))
    assert len(DatasetCatalog.get("shapes_val")) == 2
    assert len(list((tmp_path / "shapes" / "train").iterdir())) == 3


def test_prepare_dataset_generates_what_is_generated(tmp_path, default_registration):
    register_shapes_lazily(tmp_path / "shapes", ShapesSpec(num_train=1, num_val=1, size=32))
    prepare_dataset("coco_2017_train")
    assert not (tmp_path / "shapes").exists()
    prepare_dataset("shapes_train")
    assert (tmp_path / "shapes" / "annotations" / "instances_train.json").is_file()


def test_registering_again_is_allowed_and_the_last_one_counts(shapes, tmp_path):
    register_shapes(shapes, SPEC)
    register_shapes(shapes)
    assert len(DatasetCatalog.get("shapes_val")) == SPEC.num_val
    register_shapes(tmp_path / "other", ShapesSpec(num_train=2, num_val=1, size=32))
    assert len(DatasetCatalog.get("shapes_val")) == 1
    assert MetadataCatalog.get("shapes_val").json_file.startswith(str(tmp_path / "other"))


def test_registering_a_folder_with_other_parameters_fails(shapes):
    with pytest.raises(InputError, match="other parameters"):
        register_shapes(shapes, ShapesSpec())


def test_import_registers_under_the_folder_of_detectron2s_datasets(shapes):
    """In a fresh process, as a training run would find it."""
    code = (
        "import kn_detectron.data\n"
        "from detectron2.data import DatasetCatalog, MetadataCatalog\n"
        "print(MetadataCatalog.get('shapes_train').json_file)\n"
        "print(len(DatasetCatalog.get('shapes_train')))"
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "DETECTRON2_DATASETS": str(shapes.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    json_file, count = result.stdout.splitlines()
    assert json_file == str(shapes / "annotations" / "instances_train.json")
    assert int(count) == SPEC.num_train


def test_import_leaves_names_alone_that_the_user_has_taken():
    code = (
        "import importlib\n"
        "import kn_detectron.data\n"  # which makes an old detectron2 importable
        "from detectron2.data import DatasetCatalog\n"
        "DatasetCatalog.pop('shapes_train')\n"
        "DatasetCatalog.register('shapes_train', lambda: [{'mine': 1}])\n"
        "importlib.reload(kn_detectron.data)\n"
        "print(DatasetCatalog.get('shapes_train'))"
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[{'mine': 1}]"


def test_ground_truth_as_prediction_gets_full_marks(shapes):
    assert score_of_truth("shapes_val") == pytest.approx((100, 100), abs=1e-3)
    assert all(0 < ap < 95 for ap in score_of_truth("shapes_val", shift=4))
