"""COCO's own annotations are what the checks are measured by."""

import pytest
from detectron2.data import MetadataCatalog

from kn_detectron.data import check_dataset
from kn_detectron.data.annotations import Uses

from ..engine.conftest import kn_log  # noqa: F401


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("name", ["coco_2017_train", "coco_2017_val"])
def test_they_pass_without_a_word(tmp_path, kn_log, name, masks):  # noqa: F811
    json_file = MetadataCatalog.get(name).json_file
    truth = check_dataset(name, tmp_path / "run", Uses(masks=masks), open_images=True)
    assert not kn_log.records and not (tmp_path / "run").exists()
    assert MetadataCatalog.get(name).json_file == json_file
    assert len(truth.classes) == 80 and truth.num_objects > 0
    assert truth.num_without_mask == 0 and not truth.has_encoded_masks
