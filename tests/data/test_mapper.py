import traceback

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, DatasetMapper
from PIL import Image

from kn_detectron.data import (
    CheckedMapper,
    TrainLoader,
    build_test_loader,
    build_train_loader,
    first_sentence,
)
from kn_detectron.errors import InputError


def _truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _empty(path):
    path.write_bytes(b"")


def _replace_by_text(path):
    path.write_text("<html>not found</html>")


def _remove(path):
    path.unlink()


def _replace_by_folder(path):
    path.unlink()
    path.mkdir()


@pytest.fixture
def record(tmp_path):
    """A function that writes a sound image and gives its path and its dataset dict."""

    def write(suffix):
        path = tmp_path / f"image{suffix}"
        pixels = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        return path, dict(file_name=str(path), width=80, height=60, image_id=1, annotations=[])

    return write


def _sentence(mapper, dataset_dict):
    with pytest.raises(InputError) as caught:
        mapper(dataset_dict)
    text = str(caught.value)
    assert first_sentence(caught.value) == text and "\n" not in text and text.endswith(".")
    assert dataset_dict["file_name"] in text
    return text


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize(
    "damage", [_truncate, _empty, _replace_by_text, _remove, _replace_by_folder]
)
def test_image_that_cannot_be_read(cfg, record, damage, suffix):
    path, dataset_dict = record(suffix)
    mapper = CheckedMapper(DatasetMapper(cfg, is_train=True))
    assert mapper(dataset_dict)["image"].shape[0] == 3
    damage(path)
    assert "cannot be read (" in _sentence(mapper, dataset_dict)


@pytest.mark.parametrize("share", [0.3, 0.9, 0.99])
def test_truncated_jpeg_is_never_decoded_in_silence(cfg, record, share):
    path, dataset_dict = record(".jpg")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    mapper = CheckedMapper(DatasetMapper(cfg, is_train=False))
    assert "truncated" in _sentence(mapper, dataset_dict)


def test_image_of_another_size(cfg, record):
    path, dataset_dict = record(".png")
    dataset_dict["width"] = 81
    mapper = CheckedMapper(DatasetMapper(cfg, is_train=False))
    assert "80 x 60 pixels, but its annotation says 81 x 60" in _sentence(mapper, dataset_dict)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_image_that_its_exif_orientation_turns(cfg, record, orientation):
    path, dataset_dict = record(".jpg")
    image = Image.open(path)
    exif = image.getexif()
    exif[274] = orientation
    image.save(path, exif=exif)
    sentence = _sentence(CheckedMapper(DatasetMapper(cfg, is_train=False)), dataset_dict)
    assert f"EXIF orientation {orientation} has it turned to 60 x 80" in sentence
    assert "stored as 80 x 60" in sentence


def test_masks_that_do_not_fit_the_format(cfg):
    cfg.INPUT.MASK_FORMAT = "polygon"
    mapper = CheckedMapper(DatasetMapper(cfg, is_train=True))
    with_rle = next(
        d
        for d in DatasetCatalog.get("shapes_train")
        if any(isinstance(a["segmentation"], dict) and not a["iscrowd"] for a in d["annotations"])
    )
    assert 'set INPUT.MASK_FORMAT to "bitmask"' in _sentence(mapper, with_rle)


def test_a_subclass_of_detectron2s_mapper_has_its_sentences(cfg, tmp_path):
    class Mapper(DatasetMapper):
        def __call__(self, dataset_dict):
            return super().__call__(dataset_dict)

    path = tmp_path / "thin.png"
    Image.new("RGB", (4000, 1)).save(path)
    dataset_dict = {"file_name": str(path), "width": 4000, "height": 1, "annotations": []}
    assert "with sides of" in _sentence(CheckedMapper(Mapper(cfg, is_train=True)), dataset_dict)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_sentence_of_a_mapper_of_ones_own(num_workers):
    loader = TrainLoader(
        [dict(width=2, height=1)], _refuse, batch_size=1, seed=0, num_workers=num_workers
    )
    with pytest.raises(InputError) as caught:
        next(iter(loader))
    assert str(caught.value) == first_sentence(caught.value) == "No: it is refused."


def _refuse(dataset_dict):
    raise InputError("No: it is refused.")


def test_a_mapper_that_leaves_an_image_out():
    mapper = CheckedMapper(lambda dataset_dict: None)
    sentence = _sentence(mapper, {"file_name": "photo.jpg"})
    assert "returned None for image photo.jpg" in sentence


def test_an_image_too_narrow_to_be_resized(cfg, tmp_path):
    path = tmp_path / "thin.png"
    Image.new("RGB", (4000, 1)).save(path)
    dataset_dict = {"file_name": str(path), "width": 4000, "height": 1, "annotations": []}
    sentence = _sentence(CheckedMapper(DatasetMapper(cfg, is_train=True)), dataset_dict)
    assert f"Image {path} of the dataset, with sides of 1 and 4000 pixels, cannot be" in sentence


def test_a_fault_of_the_mapper_is_passed_on(record):
    def mapper(dataset_dict):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        CheckedMapper(mapper)(record(".png")[1])


@pytest.mark.parametrize("file", [{}, {"file_name": "photo.npy"}])
def test_a_mapper_may_read_what_pillow_cannot(file):
    def mapper(dataset_dict):
        return dataset_dict["not there"]

    with pytest.raises(KeyError, match="not there"):
        CheckedMapper(mapper)(file)


def test_a_failure_to_read_is_passed_on_where_no_file_is_named():
    def mapper(dataset_dict):
        raise OSError("the store is not reached")

    with pytest.raises(OSError, match="the store is not reached"):
        CheckedMapper(mapper)({"image_id": 1})


def test_a_broken_image_is_named_for_a_mapper_of_ones_own_too(record):
    path, dataset_dict = record(".png")
    _truncate(path)

    def mapper(dataset_dict):
        with Image.open(dataset_dict["file_name"]) as image:
            return {"image": np.asarray(image)}

    assert "cannot be read (" in _sentence(CheckedMapper(mapper), dataset_dict)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("split", ["train", "val"])
def test_loaders_name_the_corrupt_image_whatever_the_workers(cfg, shapes, split, num_workers):
    cfg.DATALOADER.NUM_WORKERS = num_workers
    loader = build_train_loader(cfg) if split == "train" else build_test_loader(cfg, "shapes_val")
    path = shapes / split / "000002.png"
    sound = path.read_bytes()
    try:
        _truncate(path)
        with pytest.raises(InputError) as caught:
            for _ in zip(range(40), loader):
                pass
    finally:
        path.write_bytes(sound)
    # Lets the workers go now; the garbage collector would wait 5 seconds for each.
    traceback.clear_frames(caught.tb)
    sentence = first_sentence(caught.value)
    assert sentence.startswith(f"Image {path} of the dataset cannot be read (")
    assert sentence.endswith(".") and "Traceback" not in sentence and "\n" not in sentence
    if split == "train":
        assert str(caught.value) == sentence
