"""Two processes check a dataset once, and use the same annotations."""

import json
import logging
import os

import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils import comm

from kn_detectron.data import check_datasets_once
from kn_detectron.errors import InputError

from ..ranks import spawn_two, two_ranks
from .annotations.conftest import TinyDataset, sound_content


class _Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def _on_rank(rank, folder):
    handler = _Lines()
    logging.getLogger("kn_detectron").addHandler(handler)
    cfg = get_cfg()
    cfg.OUTPUT_DIR = os.path.join(folder, "run")
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("train",), ("val",)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    images = os.path.join(folder, "images")
    for name in ("train", "val"):
        register_coco_instances(name, {}, os.path.join(folder, f"{name}.json"), images)
    with two_ranks(rank, folder):
        check_datasets_once(cfg)
        lines = comm.all_gather(handler.lines)
        assert len(lines[0]) == 4 and not lines[1], lines
        used = [MetadataCatalog.get(name).json_file for name in ("train", "val")]
        assert comm.all_gather(used) == [used, used]
        assert all(path.startswith(cfg.OUTPUT_DIR) for path in used)
        crowds = [a["iscrowd"] for d in DatasetCatalog.get("val") for a in d["annotations"]]
        assert crowds == [0, 0, 0, 1, 0]
        check_datasets_once(cfg)  # nothing is left to do
        assert comm.all_gather(handler.lines) == lines

        comm.synchronize()
        if rank == 0:
            _write(folder, "val", area=..., bbox=[float("nan")] * 4, segmentation=...)
        comm.synchronize()
        with pytest.raises(InputError, match="bbox .*nan.* entry 0 of annotations"):
            check_datasets_once(cfg)
    with open(os.path.join(folder, f"passed{rank}"), "w"):
        pass


def _write(folder, name, **values):
    content = sound_content()
    entry = content["annotations"][0]
    entry.update(values)
    content["annotations"][0] = {k: v for k, v in entry.items() if v is not ...}
    with open(os.path.join(folder, f"{name}.json"), "w", encoding="utf-8") as file:
        json.dump(content, file)


def test_two_processes(tmp_path):
    TinyDataset(tmp_path)
    DatasetCatalog.pop("tiny")
    MetadataCatalog.pop("tiny")
    for name in ("train", "val"):
        _write(str(tmp_path), name, iscrowd=...)
    spawn_two(_on_rank, str(tmp_path))
    assert (tmp_path / "passed0").exists() and (tmp_path / "passed1").exists()
