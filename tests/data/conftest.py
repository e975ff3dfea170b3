"""A small shapes dataset, written once for all tests of the data."""

import pytest
from detectron2.config import get_cfg

from kn_detectron.data import ShapesSpec, generate_shapes, register_shapes_lazily

from ..engine.conftest import kn_log  # noqa: F401
from ..engine.tiny import restore_shapes

SPEC = ShapesSpec(num_train=24, num_val=12, size=64, max_shapes=3, seed=5)


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "shapes"
    generate_shapes(root, SPEC)
    return root


@pytest.fixture
def default_registration():
    """Begins with the registration that importing makes, and puts back what there was before."""
    register_shapes_lazily()
    yield
    restore_shapes()


@pytest.fixture
def shapes(shapes_root, default_registration):
    """Registers the small dataset as shapes_train and shapes_val; gives its folder."""
    register_shapes_lazily(shapes_root, SPEC)
    return shapes_root


@pytest.fixture
def cfg(shapes):
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = ("shapes_train",)
    cfg.DATASETS.TEST = ("shapes_val",)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.INPUT.MIN_SIZE_TRAIN = (48, 64, 80)
    cfg.INPUT.MIN_SIZE_TEST = 64
    cfg.INPUT.MASK_FORMAT = "bitmask"
    cfg.MODEL.MASK_ON = True
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.SEED = 11
    return cfg
