"""Images in ImageNet's layout that a tiny network can tell apart, and its config."""

import numpy as np
import pytest
from PIL import Image

from kn_detectron.pretraining import classification_config

from ..engine.conftest import kn_log  # noqa: F401
from ..models import resnet_cfg

CLASSES = ("blue", "green", "red")
TRAIN, VAL = 8, 5  # images per class


def write_images(folder, seed=0):
    """Noise with more of one colour; of different sizes, in train/ and val/."""
    random = np.random.RandomState(seed)
    for split, count in (("train", TRAIN), ("val", VAL)):
        for k, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.randint(0, 156, (40 + i, 50 - i, 3))
                pixels[:, :, 2 - k] += 100
                path = folder / split / name / f"{i}.png"
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder of images that is not to be changed."""
    return write_images(tmp_path_factory.mktemp("images"))


def config(folder, norm="KN", output=None, detection=None, **overrides):
    """A tiny classification config."""
    if detection is None:
        detection = resnet_cfg("KN" if norm == "KN" else "GKN" if norm == "GKN" else "BN")
    detection.DATALOADER.NUM_WORKERS = 0
    detection.SEED = 5
    arguments = dict(
        data=str(folder),
        num_classes=len(CLASSES),
        num_images=TRAIN * len(CLASSES),
        norm=norm,
        epochs=2,
        batch_size=8,
        image_size=64,
    )
    cfg = classification_config(detection, **{**arguments, **overrides})
    if output is not None:
        cfg.OUTPUT_DIR = str(output)
    return cfg
