"""Every shipped config: it loads, its model builds, and it says what it is meant to say."""

import json
import math
from pathlib import Path

import pytest
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from torch import nn

import kn_detectron
from kn_detectron import GroupKalmanNorm2d, KalmanNorm2d, add_kn_config, check_config
from kn_detectron.engine.command_line import argument_parser, load_config

from ..engine import tiny

CONFIGS = Path(kn_detectron.__file__).parent / "model_zoo" / "configs"
NAMES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))
BASES = [name for name in NAMES if Path(name).name.startswith("Base-")]
NORMS = ("BN", "GN", "KN", "GKN", "KN_paper")
FPN_NORMS = ("BN", "GN", "KN")
# Those of the detectors that are fine-tuned from weights of their own norm on photographs.
PHOTO_NORMS = ("BN", "GN", "GKN", "KN")
COCO = [f"C4_{norm}" for norm in NORMS] + [f"FPN_{norm}" for norm in FPN_NORMS]
MASK_RCNN = [f"mask_rcnn_R50_{model}" for model in COCO]
RETINANET = [f"retinanet_R50_FPN_{norm}" for norm in FPN_NORMS]

# What the norm decides, and what follows from it: which weights there are, and where those have
# their stride.
OF_THE_NORM = {
    "MODEL.BACKBONE.NAME",
    "MODEL.FPN.NORM",
    "MODEL.KN.GAIN",
    "MODEL.KN.GAIN_ANNEAL",
    "MODEL.KN.PREDICTION",
    "MODEL.KN.VARIANT",
    "MODEL.META_ARCHITECTURE",
    "MODEL.RESNETS.NORM",
    "MODEL.RESNETS.STRIDE_IN_1X1",
    "MODEL.RETINANET.NORM",
    "MODEL.ROI_BOX_HEAD.NAME",
    "MODEL.ROI_BOX_HEAD.NORM",
    "MODEL.ROI_HEADS.NAME",
    "MODEL.ROI_MASK_HEAD.NAME",
    "MODEL.ROI_MASK_HEAD.NORM",
    "MODEL.WEIGHTS",
}
OF_RETINANET = {"MODEL.META_ARCHITECTURE", "MODEL.RETINANET.NORM"}
OF_HEADS = {name for name in OF_THE_NORM if "BOX_HEAD" in name or "MASK_HEAD" in name}
OF_PARTS = OF_HEADS | OF_RETINANET | {"MODEL.FPN.NORM"}
OF_KN = {name for name in OF_THE_NORM if name.startswith("MODEL.KN.")}
OF_CALIBRATED_KN = {"MODEL.KN.GAIN", "MODEL.KN.GAIN_ANNEAL"}

# tensorpack's schedule of 280k iterations, and the setting of the paper's Table 6.
SETTING = {
    "DATASETS.TEST": ("coco_2017_val",),
    "DATASETS.TRAIN": ("coco_2017_train",),
    "INPUT.MAX_SIZE_TEST": 1333,
    "INPUT.MAX_SIZE_TRAIN": 1333,
    "INPUT.MIN_SIZE_TEST": 800,
    "INPUT.MIN_SIZE_TRAIN": (800,),
    "MODEL.MASK_ON": True,
    "MODEL.RESNETS.DEPTH": 50,
    "SOLVER.BASE_LR": 0.01,
    "SOLVER.GAMMA": 0.1,
    "SOLVER.IMS_PER_BATCH": 8,
    "SOLVER.MAX_ITER": 280000,
    "SOLVER.STEPS": (150000, 230000),
    "SOLVER.WARMUP_ITERS": 1000,
    "SOLVER.WEIGHT_DECAY": 0.0001,
}
OF_C4 = {"MODEL.RESNETS.OUT_FEATURES": ["res4"], "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 256}

# As in the configs of detectron2's model zoo, whose GroupNorm models have this box head.
OF_FPN = {
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 1000,
    "MODEL.ROI_BOX_HEAD.NUM_CONV": 4,
    "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 512,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 4,
}

# As in detectron2's Base-RetinaNet.yaml, and half the learning rate of its Mask R-CNN.
SETTING_OF_RETINANET = {
    **SETTING,
    "MODEL.MASK_ON": False,
    "MODEL.RETINANET.IN_FEATURES": ["p3", "p4", "p5", "p6", "p7"],
    "MODEL.RETINANET.IOU_THRESHOLDS": [0.4, 0.5],
    "MODEL.RETINANET.NUM_CONVS": 4,
    "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA": 0.0,
    "SOLVER.BASE_LR": 0.005,
}

LAYERS = {
    "FrozenBN": FrozenBatchNorm2d,
    "GN": nn.GroupNorm,
    "GN8": nn.GroupNorm,
    "GKN": GroupKalmanNorm2d,
    "KN": KalmanNorm2d,
}


def load(name):
    cfg = get_cfg()
    add_kn_config(cfg)
    cfg.merge_from_file(str(CONFIGS / name))
    cfg.MODEL.DEVICE = "cpu"
    check_config(cfg)
    return cfg


def flat(node, prefix=""):
    """All values of a config by their full names."""
    values = {}
    for key, value in node.items():
        name = prefix + key
        values.update(flat(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return values


def changes(name, other):
    """The values of ``name`` that are not those of ``other``."""
    one, other = flat(load(name)), flat(load(other))
    assert one.keys() == other.keys()
    return {key: value for key, value in one.items() if value != other[key]}


def test_none_is_lost():
    expected = {f"{name}{suffix}.yaml" for name in MASK_RCNN for suffix in ("", "_2im")}
    expected |= {f"{name}.yaml" for name in RETINANET}
    expected |= {f"mask_rcnn_R50_FPN_{norm}_finetune.yaml" for norm in FPN_NORMS}
    expected |= {f"quick_schedules/{name}_instant_test.yaml" for name in MASK_RCNN + RETINANET}
    expected |= {f"shapes/mask_rcnn_slim_R50_C4_{norm}.yaml" for norm in NORMS}
    expected.add("shapes/mask_rcnn_slim_R50_FPN_KN.yaml")
    expected |= {f"photos/mask_rcnn_lite0_FPN_{norm}.yaml" for norm in ("BN", "KN", "KN_finetune")}
    expected |= {f"photos/mask_rcnn_slim_R50_C4_{norm}.yaml" for norm in PHOTO_NORMS}
    expected |= {f"mask_rcnn_R50_C4_{norm}_finetune.yaml" for norm in ("BN", "KN")}
    expected.add("mask_rcnn_R50_FPN_KN_backbone_finetune.yaml")
    assert expected == set(NAMES) - set(BASES)


# The others have the same models: see test_2im_... and test_instant_tests_... below. Those on
# EfficientNet-Lite0 are built in tests/modeling/test_network.py.
@pytest.mark.parametrize(
    "name",
    [
        name
        for name in NAMES
        if name not in BASES and not name.endswith(("_2im.yaml", "_finetune.yaml", "_test.yaml"))
        if not name.startswith("photos/mask_rcnn_lite0")
    ],
)
def test_model_is_built_with_its_norm(name):
    cfg = load(name)
    model = build_model(cfg)
    kinds = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, FrozenBatchNorm2d)
    used = {type(module) for module in model.modules() if isinstance(module, kinds)}
    assert LAYERS[cfg.MODEL.RESNETS.NORM] in used
    parts = ("RESNETS", "FPN", "RETINANET", "ROI_BOX_HEAD", "ROI_MASK_HEAD")
    named = {LAYERS[cfg.MODEL[part].NORM] for part in parts if cfg.MODEL[part].NORM}
    # Frozen stages of KN are FrozenBatchNorm2d.
    assert used <= named | {FrozenBatchNorm2d}


@pytest.mark.parametrize("name", BASES)
def test_base_loads(name):
    load(name)


@pytest.mark.parametrize(
    "norm, key",
    [("BN", "FrozenBN"), ("GN", "GN"), ("KN", "KN"), ("GKN", "GKN"), ("KN_paper", "KN")],
)
def test_coco_configs_follow_the_paper(norm, key):
    cfg = load(f"mask_rcnn_R50_C4_{norm}.yaml")
    assert cfg.MODEL.RESNETS.NORM == key
    assert cfg.MODEL.KN.VARIANT == ("paper" if norm == "KN_paper" else "network")
    values, setting = flat(cfg), {**SETTING, **OF_C4}
    assert {name: values[name] for name in setting} == setting


@pytest.mark.parametrize("norm, parts", [("BN", ""), ("GN", "GN"), ("KN", "KN")])
def test_fpn_configs_have_norms_in_fpn_and_heads(norm, parts):
    cfg = load(f"mask_rcnn_R50_FPN_{norm}.yaml")
    assert cfg.MODEL.RESNETS.NORM == (parts or "FrozenBN")
    assert {cfg.MODEL[p].NORM for p in ("FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")} == {parts}
    values, setting = flat(cfg), {**SETTING, **OF_FPN}
    assert {name: values[name] for name in setting} == setting


@pytest.mark.parametrize("norm, parts", [("BN", ""), ("GN", "GN"), ("KN", "KN")])
def test_retinanet_configs_have_norms_in_fpn_and_towers(norm, parts):
    cfg = load(f"retinanet_R50_FPN_{norm}.yaml")
    assert cfg.MODEL.RESNETS.NORM == (parts or "FrozenBN")
    assert {cfg.MODEL[p].NORM for p in ("FPN", "RETINANET")} == {parts}
    values = flat(cfg)
    assert {name: values[name] for name in SETTING_OF_RETINANET} == SETTING_OF_RETINANET
    for size, sizes in zip((32, 64, 128, 256, 512), cfg.MODEL.ANCHOR_GENERATOR.SIZES, strict=True):
        assert sizes == pytest.approx([size * 2 ** (k / 3) for k in range(3)], abs=0.05)


def test_coco_configs_differ_in_the_norm_alone():
    for architecture, norms, of_norms in (
        ("mask_rcnn_R50_C4", NORMS, OF_THE_NORM - OF_PARTS),
        (
            "mask_rcnn_R50_FPN",
            FPN_NORMS,
            OF_THE_NORM - OF_KN - OF_RETINANET | OF_CALIBRATED_KN,
        ),
        (
            "retinanet_R50_FPN",
            FPN_NORMS,
            OF_THE_NORM - OF_KN - OF_HEADS - {"MODEL.ROI_HEADS.NAME"} | OF_CALIBRATED_KN,
        ),
    ):
        configs = [flat(load(f"{architecture}_{norm}.yaml")) for norm in norms]
        differing = {key for key in configs[0] for cfg in configs if cfg[key] != configs[0][key]}
        assert differing == of_norms


def test_slim_configs_on_photographs_differ_in_the_norm_alone():
    names = [f"photos/mask_rcnn_slim_R50_C4_{norm}.yaml" for norm in PHOTO_NORMS]
    for other in names[1:]:
        own = "MODEL.KN.NUM_GROUPS" if other.endswith("_GKN.yaml") else "MODEL.KN.LEARN_GAIN"
        assert set(changes(other, names[0])) <= OF_THE_NORM | {own}


def test_shapes_configs_differ_in_the_norm_alone():
    configs = [flat(load(f"shapes/mask_rcnn_slim_R50_C4_{norm}.yaml")) for norm in NORMS]
    differing = {key for key in configs[0] for cfg in configs if cfg[key] != configs[0][key]}
    of_slim = {"MODEL.KN.NUM_GROUPS", "MODEL.KN.MONTE_CARLO_SIZE"}
    assert differing <= OF_THE_NORM | of_slim
    assert not differing & {"MODEL.RESNETS.STRIDE_IN_1X1", "MODEL.KN.GAIN"}
    model = build_model(load("shapes/mask_rcnn_slim_R50_C4_KN.yaml"))
    norms = [m for m in model.modules() if isinstance(m, (KalmanNorm2d, FrozenBatchNorm2d))]
    assert len(norms) == 53


@pytest.mark.parametrize("model", ["C4_BN", "C4_KN", *(f"FPN_{norm}" for norm in FPN_NORMS)])
def test_fine_tuning_changes_the_schedule_and_gain_alone(model):
    name = f"mask_rcnn_R50_{model}_finetune.yaml"
    found = changes(name, f"mask_rcnn_R50_{model}.yaml")
    of_gain = {f"MODEL.KN.{key}" for key in ("GAIN", "LEARN_GAIN", "GAIN_ANNEAL")}
    of_schedule = {key for key in found if key.startswith(("SOLVER.", "TEST."))}
    assert found.keys() - of_schedule == (of_gain if model == "C4_KN" else set())
    rate = load("Base-finetune.yaml").SOLVER.BASE_LR
    assert load(name).SOLVER.BASE_LR == (2 * rate if model.endswith("_KN") else rate)


def test_kn_in_the_backbone_alone_differs_from_frozen_bn_there_alone():
    name = "mask_rcnn_R50_FPN_KN_backbone_finetune.yaml"
    found = changes(name, "mask_rcnn_R50_FPN_BN_finetune.yaml")
    assert found.keys() == {
        "MODEL.BACKBONE.NAME",
        "MODEL.RESNETS.NORM",
        "MODEL.KN.GAIN",
        "MODEL.KN.LEARN_GAIN",
        "SOLVER.BASE_LR",
    }
    model = build_model(load(name))
    norms = [name for name, m in model.named_modules() if isinstance(m, KalmanNorm2d)]
    assert len(norms) == 42 and all(name.startswith("backbone.bottom_up.res") for name in norms)


@pytest.mark.parametrize("model", COCO)
def test_2im_doubles_images_and_learning_rate(model):
    name = f"mask_rcnn_R50_{model}"
    doubled = {"SOLVER.IMS_PER_BATCH": 16, "SOLVER.BASE_LR": 0.02}
    assert changes(f"{name}_2im.yaml", f"{name}.yaml") == doubled


@pytest.mark.parametrize("architecture", ["mask_rcnn_R50_C4", "mask_rcnn_R50_FPN", "retinanet"])
def test_instant_tests_change_the_same(architecture):
    names = [name for name in MASK_RCNN + RETINANET if name.startswith(architecture)]
    first, *others = [
        changes(f"quick_schedules/{name}_instant_test.yaml", f"{name}.yaml") for name in names
    ]
    assert first["MODEL.WEIGHTS"] == "" and first["SOLVER.MAX_ITER"] == 10
    assert first.keys() & OF_THE_NORM == {"MODEL.WEIGHTS"}
    assert all(other == first for other in others)


@pytest.fixture(scope="module")
def few_shapes(tmp_path_factory):
    """A few images as shapes_train and shapes_val."""
    with tiny.shapes(tmp_path_factory.mktemp("datasets")):
        yield


@pytest.mark.parametrize("model", MASK_RCNN + RETINANET)
def test_instant_test_runs(few_shapes, tmp_path, model):
    name = CONFIGS / f"quick_schedules/{model}_instant_test.yaml"
    options = ["OUTPUT_DIR", str(tmp_path), "MODEL.DEVICE", "cpu", "SEED", "1"]
    options += ["SOLVER.MAX_ITER", "3"]  # of the same steps
    args = argument_parser().parse_args(["--config", str(name), *options])
    tiny.train_net_module().train_or_evaluate(load_config(args), args)

    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    (losses,) = [line for line in lines if "total_loss" in line]
    assert losses["iteration"] == 2
    assert all(math.isfinite(value) for name, value in losses.items() if "loss" in name)
    results = json.loads((tmp_path / "inference/results.json").read_text())
    assert set(results) == ({"bbox", "segm"} if model in MASK_RCNN else {"bbox"})
    detections = tmp_path / "inference/shapes_val/coco_instances_results.json"
    assert len(json.loads(detections.read_text())) == 2 * 5
