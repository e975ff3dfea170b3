import pytest
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from kn_detectron import InputError, add_kn_config, check_config
from kn_detectron.config import _RULES
from kn_detectron.engine import Trainer


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_kn_config(cfg)
    return cfg


def test_defaults_are_valid_and_all_checked(cfg):
    check_config(cfg)
    assert set(_RULES) == set(cfg.MODEL.KN)


def test_adding_again_keeps_what_was_set(cfg):
    cfg.MODEL.KN.GAIN = 0.3
    add_kn_config(cfg)
    assert cfg.MODEL.KN.GAIN == 0.3


@pytest.mark.parametrize(
    "key, value, wanted",
    [
        ("VARIANT", "papers", "one of 'network', 'paper'"),
        ("PREDICTION", "exact", "one of 'closed_form', 'monte_carlo'"),
        ("MONTE_CARLO_SIZE", 3, "at least 8"),
        ("GAIN", 1.5, "a float from 0.0 to 1.0"),
        ("GAIN", 0, "a float from 0.0 to 1.0"),
        ("GAIN", -0.1, "a float from 0.0 to 1.0"),
        ("GAIN", float("nan"), "a float from 0.0 to 1.0"),
        ("LEARN_GAIN", 1, "True or False"),
        ("GAIN_ANNEAL", [0.9, 0.6], "the first not above the second"),
        ("GAIN_ANNEAL", [0.6], "two fractions"),
        ("GAIN_ANNEAL", [-0.1, 0.5], "two fractions of the schedule from 0 to 1"),
        ("GAIN_ANNEAL", [0.6, 90.0], "two fractions of the schedule from 0 to 1"),
        ("PROCESS_MODEL", "yes", "True or False"),
        ("PRIOR_GRADIENT", None, "True or False"),
        ("IMAGE_STD", [1.0, 0.0, 1.0], "positive numbers"),
        ("EVAL_STATISTICS", "online", "one of 'moving', 'batch'"),
        ("NUM_GROUPS", 0, "a positive whole number"),
    ],
)
def test_bad_values_are_named(cfg, key, value, wanted):
    cfg.MODEL.KN[key] = value
    with pytest.raises(InputError, match=f"MODEL.KN.{key} is .*, but must be .*{wanted}"):
        check_config(cfg)


def test_names_of_classes_that_a_user_has_set_stay():
    cfg = get_cfg()
    cfg.DATASETS.CLASS_NAMES = ["cat"]
    add_kn_config(cfg)
    assert cfg.DATASETS.CLASS_NAMES == ["cat"] and cfg.MODEL.KN.GAIN == 0.1


def test_missing_key(cfg):
    del cfg.MODEL.KN["NUM_GROUPS"]
    with pytest.raises(InputError, match="MODEL.KN.NUM_GROUPS is missing: call .*add_kn_config"):
        check_config(cfg)


def test_unknown_key(cfg):
    cfg.MODEL.KN.GIAN = 0.1
    with pytest.raises(InputError, match="MODEL.KN.GIAN is unknown: the keys are VARIANT"):
        check_config(cfg)


def test_a_config_without_the_keys_of_kn_is_a_sentence():
    cfg = get_cfg()
    cfg.MODEL.RESNETS.NORM = "KN"
    cfg.MODEL.DEVICE = "cpu"
    for backbone in ("build_kn_resnet_backbone", "build_kn_network_backbone"):
        cfg.MODEL.BACKBONE.NAME = backbone
        with pytest.raises(
            InputError, match=r"no MODEL.KN: call kn_detectron.add_kn_config\(cfg\)"
        ):
            build_model(cfg)
    with pytest.raises(InputError, match="no MODEL.KN"):
        Trainer(cfg)


def test_image_std_must_fit_the_pixels(cfg):
    cfg.MODEL.KN.IMAGE_STD = [1.0]
    with pytest.raises(InputError, match="IMAGE_STD has 1 values, but .*PIXEL_STD: 3"):
        check_config(cfg)


@pytest.mark.parametrize("gain", [0.0, 1.0])
def test_a_gain_at_the_end_cannot_be_learned(cfg, gain):
    cfg.MODEL.KN.GAIN = gain
    with pytest.raises(InputError, match="cannot be learned: set MODEL.KN.LEARN_GAIN False"):
        check_config(cfg)
    cfg.MODEL.KN.LEARN_GAIN = False
    check_config(cfg)
