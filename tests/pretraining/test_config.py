"""The config of a pre-training."""

import pytest
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from kn_detectron import InputError, model_zoo
from kn_detectron.pretraining import add_pretraining_config, classification_config
from kn_detectron.pretraining.config import micro_batch

from ..models import resnet_cfg
from .conftest import config


def test_detector_decides_on_architecture_norm_and_pixels():
    detection = model_zoo.get_config("shapes/mask_rcnn_slim_R50_FPN_KN.yaml")
    detection.INPUT.FORMAT = "RGB"
    detection.SOLVER.AMP.ENABLED = detection.CUDNN_BENCHMARK = True
    detection.MODEL.KN.VARIANT = "paper"
    cfg = classification_config(detection, data="d", num_classes=7, num_images=999, batch_size=9)
    assert cfg.MODEL.META_ARCHITECTURE == "ImageClassifier"
    assert cfg.MODEL.BACKBONE.NAME == "build_kn_resnet_backbone"
    assert cfg.MODEL.RESNETS.WIDTH_PER_GROUP == 16
    assert cfg.MODEL.RESNETS.NORM == cfg.PRETRAINING.NORM == "KN"
    assert cfg.MODEL.KN.VARIANT == "paper"
    assert cfg.INPUT.FORMAT == "RGB"
    assert cfg.SOLVER.AMP.ENABLED and cfg.CUDNN_BENCHMARK
    assert cfg.MODEL.PIXEL_STD == detection.MODEL.PIXEL_STD
    assert (cfg.MODEL.DEVICE, cfg.SEED, cfg.DATALOADER.NUM_WORKERS) == ("cpu", 1, 1)
    assert (cfg.PRETRAINING.NUM_CLASSES, cfg.PRETRAINING.NUM_IMAGES) == (7, 999)
    assert cfg.OUTPUT_DIR == "output/shapes/pretraining_KN"
    # And the detector's is as it was.
    assert detection.MODEL.RESNETS.OUT_FEATURES == ["res2", "res3", "res4", "res5"]


def test_nothing_of_fine_tuning_remains():
    detection = resnet_cfg("KN", MODEL__BACKBONE__FREEZE_AT=2, MODEL__WEIGHTS="somewhere.pkl")
    detection.MODEL.KN.GAIN, detection.MODEL.KN.GAIN_ANNEAL = 0.02, [0.6, 0.9]
    detection.MODEL.KN.EVAL_STATISTICS, detection.MODEL.KN.LEARN_GAIN = "batch", False
    cfg = classification_config(detection, data="d", num_classes=7, num_images=999)
    assert cfg.MODEL.BACKBONE.FREEZE_AT == 0 and cfg.MODEL.KN.LEARN_GAIN
    assert cfg.MODEL.WEIGHTS == ""
    assert (cfg.MODEL.KN.GAIN, cfg.MODEL.KN.GAIN_ANNEAL) == (0.1, [1.0, 1.0])
    assert cfg.MODEL.KN.EVAL_STATISTICS == "moving"


def test_imagenet_schedule():
    cfg = classification_config(resnet_cfg("BN"), data="d", num_classes=1000, num_images=1281167)
    epoch = 1281167 / 256
    solver = cfg.SOLVER
    assert solver.MAX_ITER == pytest.approx(100 * epoch, abs=1)
    assert solver.WARMUP_ITERS == pytest.approx(5 * epoch, abs=1)
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.MOMENTUM) == (256, 0.1, 0.9)
    assert solver.WEIGHT_DECAY == 1e-4
    assert solver.LR_SCHEDULER_NAME == "WarmupCosineLR"
    assert cfg.TEST.EVAL_PERIOD == pytest.approx(10 * epoch, abs=1)


def test_learning_rate_follows_the_batch_size_unless_it_is_given():
    assert config("d", batch_size=8).SOLVER.BASE_LR == pytest.approx(0.1 / 32)
    assert config("d", batch_size=8, lr=0.7).SOLVER.BASE_LR == 0.7


def test_the_weight_decay_is_the_one_that_is_given():
    solver = config("d", weight_decay=0.3).SOLVER
    assert solver.WEIGHT_DECAY == solver.WEIGHT_DECAY_BIAS == 0.3


def test_short_schedules_evaluate_once_per_epoch():
    cfg = config("d", epochs=2.5)  # of 3 steps
    assert (cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD, cfg.SOLVER.CHECKPOINT_PERIOD) == (8, 3, 3)


@pytest.mark.parametrize("norm", ["FrozenBN", "SyncBN"])
def test_frozen_and_synchronised_batch_norm_become_live(norm):
    cfg = config("d", norm=None, detection=resnet_cfg("BN", MODEL__RESNETS__NORM=norm))
    assert cfg.PRETRAINING.NORM == cfg.MODEL.RESNETS.NORM == "BN"
    assert cfg.PRETRAINING.DETECTOR_NORM == norm


def test_norm_replaces_the_detectors_backbone():
    cfg = config("d", "GN4", detection=resnet_cfg("KN"))
    assert cfg.MODEL.BACKBONE.NAME == "build_resnet_backbone"
    assert cfg.MODEL.RESNETS.NORM == "GN4"
    assert build_model(cfg).backbone.stem.conv1.norm.num_groups == 4
    cfg = config("d", "GKN", detection=resnet_cfg("BN"))
    assert cfg.MODEL.BACKBONE.NAME == "build_kn_resnet_backbone"


def test_micro_batches_are_for_norms_that_look_at_other_images():
    assert micro_batch(config("d", "KN", norm_batch_size=2)) == 2
    assert micro_batch(config("d", "KN")) is None
    assert micro_batch(config("d", "GN4", norm_batch_size=2)) is None


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (dict(norm="XN"), "--norm is 'XN': give one of BN, KN"),
        (dict(norm="GN0"), "--norm is 'GN0'"),
        (dict(norm_batch_size=-1), "--norm-batch-size is -1"),
        (dict(epochs=0), "--epochs is 0"),
        (dict(batch_size=0), "--batch-size is 0"),
        (dict(batch_size=25), "has 24 training images, fewer than a batch"),
        (dict(lr=-1), "--lr is -1"),
        (dict(lr=float("nan")), "--lr is nan"),
        (dict(weight_decay=-1), "--weight-decay is -1"),
        (dict(image_size=16), "--image-size is 16: a ResNet needs 32"),
    ],
)
def test_bad_arguments(arguments, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        config("d", **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "key, value, sentence",
    [
        ("MODEL__BACKBONE__NAME", "build_vit", "MODEL.BACKBONE.NAME is build_vit"),
        ("MODEL__RESNETS__NORM", "", "MODEL.RESNETS.NORM is ''"),
    ],
)
def test_bad_detectors(key, value, sentence):
    with pytest.raises(InputError, match=sentence):
        config("d", norm=None, detection=resnet_cfg("BN", **{key: value}))


def test_defaults_of_the_node_are_complete():
    cfg = get_cfg()
    add_pretraining_config(cfg)
    assert cfg.PRETRAINING.keys() == config("d").PRETRAINING.keys()
