"""Images of more than 8 bits per channel."""

import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper, detection_utils
from PIL import Image

from kn_detectron.data import CheckedMapper
from kn_detectron.errors import InputError

_GREY = np.random.default_rng(0).integers(0, 256, (48, 64), dtype=np.uint8)


def _save(path, pixels):
    Image.fromarray(pixels).save(path)
    return str(path)


def _sixteen_bits(folder, kind):
    deep = _GREY.astype(np.uint16) * 257
    if kind != "big-endian.tiff":
        return _save(folder / f"16.{kind}", deep)
    path = folder / "16.tiff"  # Pillow reads such files but writes none
    path.write_bytes(_big_endian_tiff(deep))
    return str(path)


@pytest.mark.parametrize("kind", ["png", "tiff", "big-endian.tiff"])
@pytest.mark.parametrize("format", ["BGR", "RGB", "YUV-BT.601"])
def test_16_bits_are_scaled_to_8(tmp_path, kind, format):
    expected = detection_utils.read_image(_save(tmp_path / "8.png", _GREY), format)
    assert expected[..., 0].std() > 0.2 * expected.max()
    found = detection_utils.read_image(_sixteen_bits(tmp_path, kind), format)
    assert (found == expected).all()


def _big_endian_tiff(pixels):
    """An uncompressed TIFF with one strip, by hand."""
    height, width = pixels.shape
    entries = [
        (256, 3, 1, width << 16),
        (257, 3, 1, height << 16),
        (258, 3, 1, 16 << 16),
        (259, 3, 1, 1 << 16),
        (262, 3, 1, 1 << 16),
        (273, 4, 1, 8 + 2 + 12 * 8 + 4),
        (278, 3, 1, height << 16),
        (279, 4, 1, pixels.nbytes),
    ]
    words = b"".join(
        tag.to_bytes(2, "big")
        + kind.to_bytes(2, "big")
        + count.to_bytes(4, "big")
        + value.to_bytes(4, "big")
        for tag, kind, count, value in entries
    )
    head = b"MM\0*" + (8).to_bytes(4, "big") + len(entries).to_bytes(2, "big")
    return head + words + bytes(4) + pixels.astype(">u2").tobytes()


def test_values_between_are_rounded(tmp_path):
    values = np.arange(0, 65536, 13, dtype=np.uint16).reshape(1, -1)
    found = detection_utils.read_image(_save(tmp_path / "a.png", values), "RGB")[..., 0]
    assert (found == np.round(values / 257)).all()


@pytest.mark.parametrize("format", [None, "F", "I"])
def test_what_may_be_labels_or_depths_is_not_scaled(tmp_path, format):
    values = np.arange(600, dtype=np.uint16).reshape(20, 30)
    found = detection_utils.read_image(_save(tmp_path / "a.png", values), format)
    assert (found == values).all()
    metres = np.array([[0.25, 3e5]], dtype=np.float32)
    assert (detection_utils.read_image(_save(tmp_path / "a.tiff", metres), "F") == metres).all()


def test_the_mapper_reads_labels_of_16_bits(cfg, tmp_path):
    """As detectron2's panoptic models have them."""
    labels = np.arange(200, dtype=np.uint16).reshape(10, 20)
    image = _save(tmp_path / "image.png", labels.astype(np.uint8))
    labels = _save(tmp_path / "labels.png", labels)
    mapper = DatasetMapper(cfg, is_train=True, augmentations=[])
    found = mapper(dict(file_name=image, sem_seg_file_name=labels, width=20, height=10))
    assert found["sem_seg"].flatten().tolist() == list(range(200))


@pytest.mark.parametrize("dtype, kind", [("f4", "floating point"), ("i4", "whole")])
def test_32_bits_are_refused_by_name(cfg, tmp_path, dtype, kind):
    path = _save(tmp_path / "deep.tiff", _GREY.astype(dtype))
    mapper = CheckedMapper(DatasetMapper(cfg, is_train=True))
    with pytest.raises(InputError, match=f"{path} .*{kind} numbers of 32 bits.* convert") as caught:
        mapper(dict(file_name=path, width=64, height=48, image_id=1, annotations=[]))
    assert "\n" not in str(caught.value)


def test_a_run_gets_the_same_pixels(cfg, tmp_path):
    mapper = CheckedMapper(DatasetMapper(cfg, is_train=False))
    images = [
        mapper(dict(file_name=_save(tmp_path / name, pixels), width=64, height=48))["image"]
        for name, pixels in (("8.png", _GREY), ("16.png", _GREY.astype(np.uint16) * 257))
    ]
    assert torch.equal(*images)
