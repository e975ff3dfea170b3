"""The evaluator of a dataset, and that a dataset with a measure of its own is warned of."""

import pytest
from detectron2.data import MetadataCatalog

from kn_detectron.engine.evaluation import build_coco_evaluator

from . import tiny


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
