import shutil

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from kn_detectron.data import ShapesSpec, generate_shapes, register_coco_folder
from kn_detectron.errors import InputError


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("folder") / "shapes"
    generate_shapes(root, ShapesSpec(num_train=6, num_val=4, size=64))
    return root


@pytest.fixture
def folder(shapes, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(shapes, root)
    yield root
    for name in list(DatasetCatalog.list()):
        if name.startswith(str(tmp_path)):
            DatasetCatalog.pop(name)
            MetadataCatalog.pop(name)


def test_a_folder_becomes_two_datasets(folder):
    names = register_coco_folder(str(folder))
    assert [len(DatasetCatalog.get(name)) for name in names] == [6, 4]
    assert MetadataCatalog.get(names[1]).evaluator_type == "coco"
    assert register_coco_folder(str(folder)) == names  # again


def test_cocos_own_names_of_files_and_folders(folder):
    for split in ("train", "val"):
        (folder / split).rename(folder / f"{split}2017")
        path = folder / "annotations" / f"instances_{split}.json"
        path.rename(path.with_name(f"instances_{split}2017.json"))
    train, _ = register_coco_folder(str(folder))
    assert train.endswith("train2017") and len(DatasetCatalog.get(train)) == 6


def test_faults_are_sentences(folder):
    (folder / "annotations" / "instances_val.json").rename(folder / "val.json")
    with pytest.raises(InputError, match="has no file annotations/instances_val"):
        register_coco_folder(str(folder))
    (folder / "val.json").rename(folder / "annotations" / "instances_val.json")
    val = folder / "annotations/instances_val.json"
    shutil.copy(val, folder / "annotations/instances_val2.json")
    assert register_coco_folder(str(folder))[1].endswith("val")  # the file with the exact name
    val.rename(folder / "annotations/instances_val3.json")
    with pytest.raises(InputError, match="has 2 files annotations/instances_val"):
        register_coco_folder(str(folder))
    with pytest.raises(InputError, match="nowhere is not a folder.*_train.json.*_val.json"):
        register_coco_folder(str(folder / "nowhere"))
    with pytest.raises(
        InputError, match="give one with annotations/instances_val.json with its val/"
    ):
        register_coco_folder(str(folder / "nowhere"), ["val"])
