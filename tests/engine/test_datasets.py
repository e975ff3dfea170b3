"""A trainer that is used without the command line checks its datasets as well."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.data import MetadataCatalog

from kn_detectron import InputError
from kn_detectron.engine import Trainer

from . import tiny


def _change(folder, split, change):
    path = folder / "shapes" / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _without_areas(content):
    for annotation in content["annotations"]:
        del annotation["area"]


@pytest.fixture
def own(datasets, tmp_path):
    """A copy of the images, registered."""
    shutil.copytree(datasets, tmp_path / "own")
    with tiny.shapes(tmp_path / "own"):
        yield tmp_path / "own"


def test_what_is_mended_reaches_training_and_evaluation(own, tmp_path):
    for split in ("train", "val"):
        _change(own, split, _without_areas)
    cfg = tiny.config(tmp_path / "run", "SOLVER.MAX_ITER", 1)
    trainer = Trainer(cfg)
    trainer.resume_or_load(False)
    trainer.train()
    results = json.loads((tmp_path / "run/inference/results.json").read_text())
    assert all(results[task]["AP"] is not None for task in ("bbox", "segm"))
    # Detections are compared with the same truth, in another process for example.
    sound = json.loads(Path(MetadataCatalog.get("shapes_val").json_file).read_text())
    assert all(annotation["area"] > 0 for annotation in sound["annotations"])


def test_nothing_is_built_before_the_datasets_are_checked(own, tmp_path, monkeypatch):
    _change(own, "val", lambda content: content["categories"].pop(0))
    monkeypatch.setattr(Trainer, "build_model", lambda cfg: pytest.fail("a model is built"))
    with pytest.raises(InputError, match="instances_val.json has the category_id 1"):
        Trainer(tiny.config(tmp_path / "run"))


def test_evaluation_alone_checks_what_it_reads(own, tmp_path):
    _change(own, "train", lambda content: content.clear())  # which nobody looks at
    _change(own, "val", _without_areas)
    cfg = tiny.config(tmp_path / "run")
    torch.manual_seed(0)
    results = Trainer.test(cfg, Trainer.build_model(cfg))
    assert set(results) == {"bbox", "segm"}
