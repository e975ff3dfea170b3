"""The configs of the other norms, on one image and four."""

import json
import math

import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from kn_detectron import add_kn_config
from kn_detectron.engine import Trainer

from .commands import config, small
from .results import TWELVE, losses


@pytest.fixture
def few_images(tmp_path):
    """The name of a dataset: the first four validation images."""
    metadata = MetadataCatalog.get("coco_2017_val")
    with open(metadata.json_file) as file:
        content = json.load(file)
    content["images"] = content["images"][:4]
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
    (tmp_path / "few.json").write_text(json.dumps(content))
    register_coco_instances("few", {}, str(tmp_path / "few.json"), metadata.image_root)
    yield "few"
    DatasetCatalog.remove("few")
    MetadataCatalog.remove("few")


@pytest.mark.parametrize("norm", ["BN", "GN", "GKN", "KN_paper"])
def test_other_norms_train_and_evaluate(norm, few_images, runs):
    cfg = get_cfg()
    add_kn_config(cfg)
    cfg.merge_from_file(config(norm))
    one_step = ["SOLVER.MAX_ITER", 1, "SOLVER.IMS_PER_BATCH", 1, "DATASETS.TEST", (few_images,)]
    cfg.merge_from_list(small(*one_step, "OUTPUT_DIR", runs / norm))
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    results = trainer.train()
    assert set(results) == {"bbox", "segm"}
    assert all(set(TWELVE) <= set(numbers) for numbers in results.values())
    assert all(math.isfinite(value) for value in losses(runs / norm, step=0).values())
