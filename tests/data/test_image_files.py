import struct

import numpy as np
import pytest
from detectron2.data import detection_utils
from PIL import Image

from kn_detectron import InputError
from kn_detectron.data.image_files import check_headers, read_rgb


@pytest.fixture
def photo(tmp_path):
    """Writes an image with an EXIF orientation, and gives its record."""

    def write(name, orientation=None):
        image = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
        exif = image.getexif()
        if orientation:
            exif[274] = orientation
        image.save(tmp_path / name, exif=exif)
        return {"file_name": name, "width": 30, "height": 20}

    return write


def test_images_that_are_turned_and_keep_their_size_are_counted(photo, tmp_path, kn_log):
    check_headers([photo("plain.jpg"), photo("upright.jpg", 1)], str(tmp_path))
    assert not kn_log.records
    records = [photo(f"{orientation}.jpg", orientation) for orientation in (1, 2, 3, 4)]
    check_headers(records, str(tmp_path))
    (warning,) = kn_log.messages
    assert "3 images have an EXIF orientation" in warning and "2.jpg" in warning


def test_the_first_image_of_another_size_is_named(photo, tmp_path):
    wide = {**photo("wide.jpg"), "width": 31}
    with pytest.raises(InputError, match="wide.jpg .* 30 x 20 pixels, .* says 31 x 20"):
        check_headers([photo("plain.jpg"), wide], str(tmp_path))


@pytest.mark.parametrize("orientation", [0, 9, 1000])
def test_an_orientation_that_there_is_not_turns_nothing(photo, tmp_path, kn_log, orientation):
    check_headers([photo("photo.jpg", orientation)], str(tmp_path))
    assert not kn_log.records


def test_an_orientation_that_is_text_turns_nothing(tmp_path, kn_log):
    image = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
    # One entry, of type 2, which is text of two bytes. Pillow writes numbers only.
    exif = b"Exif\0\0II*\0" + struct.pack("<IHHHI4sI", 8, 1, 274, 2, 2, b"6", 0)
    image.save(tmp_path / "photo.jpg", exif=exif)
    with Image.open(tmp_path / "photo.jpg") as written:
        assert isinstance(written.getexif()[274], str)
    check_headers([{"file_name": "photo.jpg", "width": 30, "height": 20}], str(tmp_path))
    assert not kn_log.records


@pytest.mark.parametrize(
    "name, dtype", [("a.png", "u2"), ("a.tiff", "u2"), ("a.tiff", "i4"), ("a.tiff", "f4")]
)
def test_more_than_8_bits_are_refused(tmp_path, name, dtype):
    """detectron2 would make them white, which this also asserts."""
    path = tmp_path / name
    Image.fromarray(np.full((20, 30), 30000, dtype)).save(path)
    assert (detection_utils.read_image(str(path), "RGB") == 255).all()
    record = {"file_name": name, "width": 30, "height": 20}
    with pytest.raises(InputError, match=f"{name} .*more than 8 bits.* convert them to 8"):
        check_headers([record], str(tmp_path))
    with pytest.raises(InputError, match="more than 8 bits"):
        read_rgb(str(path))


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_images_of_8_bits_are_read_as_detectron2_reads_them(tmp_path, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    exif = image.getexif()
    exif[274] = 6  # turned by a quarter
    path = str(tmp_path / "a.jpg")
    image.save(path, exif=exif)
    found = read_rgb(path)
    assert found.shape == (30, 20, 3) and found.std() > 0
    assert (found == detection_utils.read_image(path, "RGB")).all()
