import json
import shutil

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from kn_detectron.data import CATEGORIES, ShapesSpec, generate_shapes, register_coco_folder
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


def change(folder, split, change):
    path = folder / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def objects(content):
    return [a for a in content["annotations"] if not a["iscrowd"]]


def test_a_folder_becomes_two_datasets(folder):
    data = register_coco_folder(str(folder))
    assert data.classes == CATEGORIES
    assert data.has_masks
    assert [len(DatasetCatalog.get(name)) for name in (data.train, data.val)] == [6, 4]
    assert MetadataCatalog.get(data.val).evaluator_type == "coco"
    assert register_coco_folder(str(folder)) == data  # again


def test_cocos_own_names_of_files_and_folders(folder):
    for split in ("train", "val"):
        (folder / split).rename(folder / f"{split}2017")
        path = folder / "annotations" / f"instances_{split}.json"
        path.rename(path.with_name(f"instances_{split}2017.json"))
    data = register_coco_folder(str(folder))
    assert data.train.endswith("train2017") and len(DatasetCatalog.get(data.train)) == 6


def test_what_kind_of_masks_there_are(folder):
    def only(kind):
        def edit(content):
            kept = [a for a in content["annotations"] if isinstance(a["segmentation"], kind)]
            content["annotations"] = kept

        for split in ("train", "val"):
            change(folder, split, edit)

    only((list, dict))
    change(folder, "train", lambda c: objects(c)[0].update(segmentation={"size": 1, "counts": ""}))
    assert register_coco_folder(str(folder)).has_encoded_masks
    only(list)  # and crowds are encoded always
    assert not register_coco_folder(str(folder)).has_encoded_masks
    change(folder, "train", lambda c: objects(c)[0].pop("segmentation"))
    assert not register_coco_folder(str(folder)).has_masks


def test_faults_are_sentences(folder):
    (folder / "annotations" / "instances_val.json").rename(folder / "val.json")
    with pytest.raises(InputError, match="has no file annotations/instances_val"):
        register_coco_folder(str(folder))
    (folder / "val.json").rename(folder / "annotations" / "instances_val.json")
    shutil.copy(
        folder / "annotations/instances_val.json", folder / "annotations/instances_val2.json"
    )
    with pytest.raises(InputError, match="has 2 files annotations/instances_val"):
        register_coco_folder(str(folder))
    (folder / "annotations" / "instances_val2.json").unlink()
    change(folder, "val", lambda c: c["categories"][1].update(name="cube"))
    with pytest.raises(InputError, match="categories of train and val .* differ .*2 'cube'"):
        register_coco_folder(str(folder))
    (folder / "train" / "000002.png").unlink()
    with pytest.raises(InputError, match="lacks 1 of the 6 images"):
        register_coco_folder(str(folder))
