"""Images in ImageNet's layout."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from kn_detectron import InputError
from kn_detectron.data import first_sentence
from kn_detectron.pretraining import build_eval_loader, build_train_loader, open_folders
from kn_detectron.pretraining.data import IGNORED, training_transform

from .conftest import CLASSES, TRAIN, VAL, config, write_images


def _take(loader, count):
    batches = iter(loader)
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


def _same(one, other):
    return all(torch.equal(one[key], other[key]) for key in ("image", "label"))


def test_batches(folder):
    batch = _take(build_train_loader(config(folder)), 1)[0]
    assert batch["image"].shape == (8, 3, 64, 64) and batch["image"].dtype == torch.uint8
    assert batch["label"].shape == (8,) and batch["label"].dtype == torch.int64
    # The colour of an image tells its class; channels are in the order blue, green, red.
    assert torch.equal(batch["image"].float().mean((2, 3)).argmax(1), batch["label"])
    # Noise at this size is resized noise at that size: a crop, not the same one for all.
    assert len({tuple(image.flatten()[:50].tolist()) for image in batch["image"]}) == 8


def test_rgb(folder):
    cfg = config(folder)
    cfg.INPUT.FORMAT = "RGB"
    batch = _take(build_train_loader(cfg), 1)[0]
    assert torch.equal(batch["image"].float().mean((2, 3)).argmax(1), 2 - batch["label"])
    bgr = _take(build_train_loader(config(folder)), 1)[0]
    assert torch.equal(batch["image"], bgr["image"].flip(1))


def test_an_epoch_has_every_image_once_and_the_next_one_augments_anew(folder):
    batches = _take(build_train_loader(config(folder)), 6)
    for epoch in (batches[:3], batches[3:]):
        counts = torch.cat([b["label"] for b in epoch]).bincount()
        assert counts.tolist() == [TRAIN] * len(CLASSES)
    rows = {image.numpy().tobytes() for b in batches for image in b["image"]}
    assert len(rows) == 48


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batch_depends_on_seed_and_iteration_only(folder, num_workers):
    whole = _take(build_train_loader(config(folder)), 6)
    cfg = config(folder)
    cfg.DATALOADER.NUM_WORKERS = num_workers
    torch.manual_seed(99)
    loader = build_train_loader(cfg)
    loader.start_iter = 4
    assert all(_same(a, b) for a, b in zip(_take(loader, 2), whole[4:]))
    loader.seed += 1
    assert not _same(_take(loader, 1)[0], whole[4])


def test_validation_has_every_image_once_in_whole_batches_of_mixed_classes(folder):
    batches = list(build_eval_loader(config(folder)))
    assert [len(b["label"]) for b in batches] == [8, 8]
    labels = torch.cat([b["label"] for b in batches])
    counted = labels != IGNORED
    assert labels[counted].bincount().tolist() == [VAL] * len(CLASSES)
    assert set(batches[0]["label"].tolist()) == {0, 1, 2}
    images = torch.cat([b["image"] for b in batches])
    assert len({image.numpy().tobytes() for image in images[counted]}) == VAL * len(CLASSES)
    # What fills the last batch are images, not zeros.
    assert images[~counted].float().mean((1, 2, 3)).min() > 50


def test_validation_is_smaller_than_a_batch(folder):
    (batch,) = build_eval_loader(config(folder, batch_size=24, num_images=24))
    assert (batch["label"] != IGNORED).sum() == 15 and len(batch["label"]) == 24


@pytest.mark.parametrize("size, middle", [(64, 1.0), (160, 0.875)])
def test_validation_crop(tmp_path, size, middle):
    """The red value is the column: what is left of 200 of them tells the crop."""
    columns = np.tile(np.arange(200, dtype=np.uint8), (200, 1))
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.fromarray(columns).convert("RGB").save(tmp_path / split / "a" / "0.png")
    cfg = config(tmp_path, batch_size=1, num_images=1, image_size=size)
    (batch,) = build_eval_loader(cfg)
    row = batch["image"][0, 0, 0].float()
    assert row[-1] - row[0] == pytest.approx(200 * middle, abs=5)
    assert row[0] == pytest.approx(100 * (1 - middle), abs=3)


def test_images_are_turned_as_a_detector_sees_them(tmp_path):
    columns = np.tile(np.arange(200, dtype=np.uint8), (200, 1))
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        image = Image.fromarray(columns).convert("RGB")
        exif = image.getexif()
        exif[274] = 6  # to be turned by a quarter: columns become rows
        image.save(tmp_path / split / "a" / "0.jpg", exif=exif, quality=100)
    cfg = config(tmp_path, batch_size=1, num_images=1)
    (batch,) = build_eval_loader(cfg)
    pixels = batch["image"][0, 0].float()
    assert pixels[:, 0].diff().mean() > 2 and pixels[0].diff().abs().mean() < 1
    (batch,) = _take(build_train_loader(cfg), 1)
    pixels = batch["image"][0, 0].float()
    assert pixels[:, 0].diff().mean() > 0.5 and pixels[0].diff().abs().mean() < 0.5


def test_an_evaluation_does_not_list_the_training_images(tmp_path):
    data = write_images(tmp_path / "images")
    cfg = config(data)
    shutil.rmtree(data / "train")
    assert len(list(build_eval_loader(cfg))) == 2


@pytest.mark.parametrize("size, smallest", [(64, 0.5), (128, 0.08)])
def test_training_crop(size, smallest):
    position = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    image = Image.fromarray(np.stack([position, position.T, position], 2))
    transform = training_transform(size)
    areas, flips = [], []
    for _ in range(300):
        crop = np.asarray(transform(image)).astype(float)
        width, height = abs(crop[0, -1, 0] - crop[0, 0, 0]), crop[-1, 0, 1] - crop[0, 0, 1]
        areas.append(width * height / 256**2)
        flips.append(crop[0, 0, 0] > crop[0, -1, 0])
    assert min(areas) == pytest.approx(smallest, abs=0.06)
    assert max(areas) > 0.9
    assert 0.4 < np.mean(flips) < 0.6


def test_test_folder_stands_in_for_val(tmp_path):
    write_images(tmp_path)
    (tmp_path / "val").rename(tmp_path / "test")
    train, val = open_folders(str(tmp_path))
    assert (len(train), len(val)) == (TRAIN * 3, VAL * 3)


def _remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    "spoil, sentence",
    [
        (lambda f: _remove(f), "is not a folder: give one with train/"),
        (lambda f: _remove(f / "train"), "has no folder train: expected ImageNet's layout"),
        (lambda f: _remove(f / "val"), "has no folder val or test"),
        (lambda f: [_remove(f / "train" / c) for c in CLASSES], "train cannot be used"),
        (lambda f: [_remove(p) for p in (f / "train/red").iterdir()], "train cannot be used.*red"),
        (lambda f: _remove(f / "val/red"), "train has the class red and .*val does not"),
        (lambda f: (f / "train/red").rename(f / "train/rot"), "val has the class red and .*train"),
    ],
)
def test_bad_folders(tmp_path, spoil, sentence):
    folder = write_images(tmp_path / "images")
    spoil(folder)
    with pytest.raises(InputError, match=sentence) as error:
        open_folders(str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_broken_image_is_named(tmp_path, num_workers):
    folder = write_images(tmp_path / "images")
    for split in ("train", "val"):
        path = folder / split / "green" / "0.png"
        path.write_bytes(path.read_bytes()[:100])
    cfg = config(folder)
    cfg.DATALOADER.NUM_WORKERS = num_workers
    for split, loader in (("train", build_train_loader(cfg)), ("val", build_eval_loader(cfg))):
        with pytest.raises(InputError) as error:
            _take(loader, 3)
        sentence = first_sentence(error.value)
        assert f"{split}/green/0.png cannot be read" in sentence and "\n" not in sentence


def test_images_of_floats_are_refused(tmp_path):
    folder = write_images(tmp_path / "images")
    for path in (folder / "train").rglob("*.png"):
        path.unlink()
        Image.fromarray(np.random.rand(40, 40).astype(np.float32)).save(path.with_suffix(".tiff"))
    with pytest.raises(InputError, match="numbers of more than 8 bits.* convert them"):
        _take(build_train_loader(config(folder)), 1)


def test_other_pixel_formats_are_refused(folder):
    cfg = config(folder)
    cfg.INPUT.FORMAT = "L"
    with pytest.raises(InputError, match="INPUT.FORMAT is 'L'"):
        build_train_loader(cfg)


def test_batch_must_be_made_of_micro_batches(folder):
    with pytest.raises(InputError, match="in groups of 3: give a --batch-size .* multiple of 3"):
        build_train_loader(config(folder, norm_batch_size=3))
