"""What of a checkpoint a model takes, what is fitted to it, and what is said about it."""

import copy
import math
import re

import pytest
import torch
from detectron2.utils.events import EventStorage

from kn_detectron import InputError
from kn_detectron.checkpoint import KNCheckpointer, calibrate, fit_process_noise
from kn_detectron.layers import KN_STATE, KalmanNorm2d, kalman_layers, set_gain_scale

from ..models import build_rcnn, fpn_rcnn_cfg, randomize, rcnn_cfg, rcnn_inputs, retinanet_cfg
from . import formats
from .networks import trained_batch_norm

PAPER = dict(MODEL__KN__VARIANT="paper")


def model_of(norm, **options):
    return build_rcnn(rcnn_cfg(norm, **options), seed=3)


def load(model, folder, content, name="model.pth", **kwargs):
    path = formats.write(folder, content, name)
    KNCheckpointer(model).load(path, [], **kwargs)
    return model


def filters(state):
    return {n: v for n, v in state.items() if n.rpartition(".")[2] in KN_STATE}


def others(state):
    return {n: v for n, v in state.items() if n not in filters(state) and "num_batches" not in n}


def assert_same(one, other):
    assert set(one) == set(other)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def trained_kn(seed=5, **options):
    """A KN network with the trained weights, whose filters are not what calibration would set."""
    model = trained_batch_norm("KN", **options)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in filters(dict(model.named_parameters())).items():
            parameter.add_(torch.randn(parameter.shape, generator=g))
    return model


# Between variants and norms.


def test_batch_norm_to_the_network_variant_is_calibrated(tmp_path, caplog):
    bn = trained_batch_norm()
    with caplog.at_level("INFO", "kn_detectron"):
        model = load(model_of("KN"), tmp_path, bn.state_dict())
    assert "priors of 53 Kalman layers were set" in caplog.text
    want = trained_batch_norm("KN")
    calibrate(want)
    assert_same(filters(model.state_dict()), filters(want.state_dict()))
    assert_same(others(model.state_dict()), others(bn.state_dict()))


def test_filters_for_the_same_priors_are_kept(tmp_path, caplog):
    for options in ({}, PAPER):
        source = trained_kn(**options)
        with caplog.at_level("INFO", "kn_detectron"):
            model = load(model_of("KN", **options), tmp_path, source.state_dict())
        assert_same(model.state_dict(), source.state_dict())
        assert "priors of" not in caplog.text


@pytest.mark.parametrize("options", [{}, PAPER], ids=["network", "paper"])
@pytest.mark.parametrize("gain", [0.0, 0.3])
def test_a_fixed_gain_is_the_configs_and_not_the_checkpoints(tmp_path, caplog, gain, options):
    """Weights of a training whose gains were learned and annealed to 0, as a start and as a result."""
    source = trained_kn(**options)
    set_gain_scale(source, 0.0)
    fixed = dict(options, MODEL__KN__GAIN=gain, MODEL__KN__LEARN_GAIN=False)
    with caplog.at_level("INFO", "kn_detectron"):
        model = load(model_of("KN", **fixed), tmp_path, source.state_dict())
    count = len(kalman_layers(model))
    assert f"The gains of {count} Kalman layers are those of MODEL.KN.GAIN" in caplog.text
    set_gain_scale(model, 1.0)  # as the trainer does
    for layer in kalman_layers(model).values():
        assert layer.gain.item() == pytest.approx(gain) and layer.measures == (gain > 0)
    want = {n: v for n, v in source.state_dict().items() if "gain" not in n}
    assert_same({n: v for n, v in model.state_dict().items() if n in want}, want)
    # What is evaluated or resumed is the checkpoint, as it is.
    caplog.clear()
    model = load(model_of("KN", **fixed), tmp_path, source.state_dict(), strict=True)
    assert_same(model.state_dict(), source.state_dict())
    assert "MODEL.KN.GAIN" not in caplog.text


@pytest.mark.parametrize("logit", [None, -math.inf], ids=["", "older"])
@pytest.mark.parametrize("former", [0.0, 1.0])
def test_a_gain_that_was_fixed_at_0_or_1_can_be_learned_again(tmp_path, caplog, former, logit):
    source = trained_kn(MODEL__KN__GAIN=former, MODEL__KN__LEARN_GAIN=False)
    state = source.state_dict()
    if logit is not None:
        for name in state:
            if name.endswith("gain_logit"):
                state[name] = torch.full_like(state[name], logit if former == 0.0 else -logit)
    with caplog.at_level("INFO", "kn_detectron"):
        model = load(model_of("KN", MODEL__KN__GAIN=0.25), tmp_path, state)
    layers = kalman_layers(model)
    assert f"The gains of {len(layers)} Kalman layers are those of MODEL.KN.GAIN" in caplog.text
    for layer in layers.values():
        assert layer.learns_gain and layer.gain.item() == pytest.approx(0.25) and layer.measures
    with EventStorage():
        sum(model.train()(rcnn_inputs(1, 64)).values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert any(layer.gain_logit.grad != 0 for layer in layers.values())


def test_the_state_of_a_schedule_is_no_weight(tmp_path):
    source = trained_kn()
    set_gain_scale(source, 0.0)  # as at the end of annealing
    model = load(model_of("KN"), tmp_path, source.state_dict())
    assert all(layer.gain_scale == 1 for layer in kalman_layers(model).values())
    model = load(model_of("KN"), tmp_path, source.state_dict(), strict=True)
    assert all(layer.gain_scale == 0 for layer in kalman_layers(model).values())


def test_priors_without_their_process_models_do_not_fit(tmp_path, caplog):
    with caplog.at_level("WARNING", "kn_detectron"):
        load(model_of("KN", MODEL__KN__PROCESS_MODEL=False), tmp_path, trained_kn().state_dict())
    assert "priors of 53 Kalman layers do not fit" in caplog.text


def test_a_layer_that_no_chain_leads_to_keeps_its_prior_and_is_told(tmp_path, caplog):
    """It is of another project, which hands it beliefs itself; the others are calibrated."""
    source, model = trained_batch_norm(), model_of("KN")
    source.extra, model.extra = torch.nn.BatchNorm2d(4), KalmanNorm2d(4)
    source.extra.running_mean.fill_(1.0)
    with caplog.at_level("INFO", "kn_detectron"):
        load(model, tmp_path, source.state_dict())
    assert "priors of 53 Kalman layers were set" in caplog.text
    assert "priors of 1 Kalman layers do not fit" in caplog.text
    assert model.extra.running_mean.tolist() == [1.0] * 4 and not model.extra.mean_offset.any()


def test_scales_of_group_norm_in_the_fpn_bring_no_statistics(tmp_path, caplog):
    options = dict(MODEL__FPN__NORM="GN4", MODEL__ROI_BOX_HEAD__NORM="GN4")
    options["MODEL__ROI_MASK_HEAD__NORM"] = "GN4"
    source = randomize(build_rcnn(fpn_rcnn_cfg("BN", **options)))
    with caplog.at_level("INFO", "kn_detectron"):
        model = load(build_rcnn(fpn_rcnn_cfg("KN"), seed=1), tmp_path, source.state_dict())
    layers = kalman_layers(model)
    bottom_up = [name for name in layers if name.startswith("backbone.bottom_up.")]
    assert f"priors of {len(bottom_up)} Kalman layers were set" in caplog.text
    for name, layer in layers.items():
        assert (name in bottom_up) == bool(layer.mean_offset.any()), name
    weight = "backbone.fpn_lateral2.norm.weight"
    assert torch.equal(model.state_dict()[weight], source.state_dict()[weight])


@pytest.mark.parametrize(
    "cfg, advice",
    [
        (rcnn_cfg("KN", MODEL__BACKBONE__NAME="build_resnet_backbone"), "build_kn_resnet_backbone"),
        (fpn_rcnn_cfg("KN", MODEL__FPN__NORM="GN4"), "MODEL.FPN.NORM"),
        (retinanet_cfg("KN", MODEL__FPN__NORM="GN4"), "MODEL.FPN.NORM"),
    ],
)
def test_heads_without_beliefs_are_a_sentence_before_anything_is_loaded(tmp_path, cfg, advice):
    model = build_rcnn(cfg, seed=3)
    before = copy.deepcopy(model.state_dict())
    source = randomize(build_rcnn(cfg))
    content = {n: v for n, v in source.state_dict().items() if n not in filters(before)}
    with pytest.raises(InputError, match=advice):
        load(model, tmp_path, content)
    assert_same(model.state_dict(), before)


def test_only_layers_without_process_model_are_calibrated(tmp_path):
    # As when the frozen prefix of a detector is trained on: it had no filters.
    source = trained_kn(MODEL__BACKBONE__FREEZE_AT=2)
    model = load(model_of("KN"), tmp_path, source.state_dict())
    want = trained_kn(MODEL__BACKBONE__FREEZE_AT=2).state_dict()
    calibrated = trained_batch_norm("KN")
    calibrate(calibrated)
    for name, value in filters(model.state_dict()).items():
        if name in want:
            assert torch.equal(value, want[name]), name
        else:
            assert re.search(r"stem|res2", name)
            assert torch.equal(value, calibrated.state_dict()[name]), name


def test_paper_to_network_is_calibrated_at_the_gain_of_the_config(tmp_path, caplog):
    source = trained_kn(**PAPER)
    with caplog.at_level("INFO", "kn_detectron"):
        model = load(model_of("KN", MODEL__KN__GAIN=0.02), tmp_path, source.state_dict())
    want = trained_batch_norm("KN", MODEL__KN__GAIN=0.02)
    calibrate(want)
    assert_same(model.state_dict(), want.state_dict())
    # 52 layers with gain_logit, gain_scale, process_noise; the stem is a head.
    assert f"{53 * 4} initialised, {52 * 3} not used" in caplog.text


def test_network_to_paper_makes_the_best_of_it_and_says_so(tmp_path, caplog):
    source = trained_kn(MODEL__KN__GAIN=0.02)
    with caplog.at_level("WARNING", "kn_detectron"):
        model = load(model_of("KN", **PAPER), tmp_path, source.state_dict())
    (warning,) = [r.getMessage() for r in caplog.records if r.name.startswith("kn_detectron")]
    assert "paper" in warning and "52 learned gains were raised to 0.9" in warning
    want = trained_batch_norm("KN", **PAPER)
    fit_process_noise(want)
    assert_same(model.state_dict(), want.state_dict())


def test_gains_of_the_paper_variant_are_raised_where_the_file_has_none(tmp_path):
    source = trained_kn(**PAPER).state_dict()
    state = {n: v for n, v in source.items() if "gain" not in n}
    fixed = dict(PAPER, MODEL__KN__GAIN=0.3, MODEL__KN__LEARN_GAIN=False)
    for options, gain in ((PAPER, 0.9), (fixed, 0.3)):
        model = load(model_of("KN", **options), tmp_path, state)
        for layer in kalman_layers(model).values():
            assert layer.gain.item() == pytest.approx(gain, rel=1e-5)


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
@pytest.mark.parametrize("variant", ["network", "paper"])
def test_kn_to_batch_norm(tmp_path, norm, variant, caplog):
    source = trained_kn(MODEL__KN__VARIANT=variant)
    with caplog.at_level("INFO", "kn_detectron"):
        model = load(model_of(norm), tmp_path, source.state_dict())
    assert_same(others(model.state_dict()), others(source.state_dict()))
    assert f" 0 initialised, {len(filters(source.state_dict()))} not used" in caplog.text


@pytest.mark.parametrize("norm", ["GN", "GKN"])
@pytest.mark.parametrize("source", ["BN", "KN"])
def test_batch_norm_to_group_norm_takes_weights_and_biases(tmp_path, norm, source, caplog):
    options = {}
    if norm == "GN":  # of 32 groups in detectron2
        options = dict(
            MODEL__RESNETS__STEM_OUT_CHANNELS=32,
            MODEL__RESNETS__RES2_OUT_CHANNELS=64,
            MODEL__RESNETS__WIDTH_PER_GROUP=32,
        )
    state = randomize(build_rcnn(rcnn_cfg(source, **options))).state_dict()
    target = model_of(norm, **options)
    before = {n: v.clone() for n, v in filters(target.state_dict()).items()}
    with caplog.at_level("INFO", "kn_detectron"):
        model = load(target, tmp_path, state)
    for name, value in others(model.state_dict()).items():
        assert torch.equal(value, state[name]), name
    assert_same(filters(model.state_dict()), before)
    left = len(filters(state)) + 2 * 53
    assert f"{len(before)} initialised, {left} not used" in caplog.text
    assert ("cannot be calibrated" in caplog.text) == (norm == "GKN")


def test_gkn_keeps_its_filters(tmp_path):
    source = randomize(build_rcnn(rcnn_cfg("GKN")))
    model = load(model_of("GKN"), tmp_path, source.state_dict())
    assert_same(model.state_dict(), source.state_dict())


# Running statistics.


def test_group_norm_has_none_for_kn(tmp_path):
    for state in (
        build_rcnn(rcnn_cfg("GKN")).state_dict(),
        formats.torchvision(formats.without_statistics(formats.bare(_bn_state()))),
    ):
        model = model_of("KN")
        before = {n: v.clone() for n, v in model.state_dict().items()}
        with pytest.raises(InputError, match=r"has no running statistics, as .*106 missing, the f"):
            load(model, tmp_path, state)
        assert_same(model.state_dict(), before)


def _bn_state():
    return trained_batch_norm().state_dict()


def test_group_norm_of_detectron1_goes_into_gkn(tmp_path):
    state = _bn_state()
    content = formats.group_norm(formats.bare(state))
    model = load(model_of("GKN"), tmp_path, content, "R-50-GN.pkl")
    for name in ("backbone.res2.0.conv1.norm.weight", "roi_heads.res5.2.conv3.norm.bias"):
        assert torch.equal(model.state_dict()[name], state[name])


def test_folded_batch_norm_goes_into_frozen_norms_with_a_warning(tmp_path, caplog):
    content = formats.detectron1(formats.bare(_bn_state()))
    with caplog.at_level("WARNING", "kn_detectron"):
        model = load(model_of("FrozenBN"), tmp_path, content, "R-50.pkl")
    assert "no running statistics for 53 layers" in caplog.text
    assert torch.equal(
        model.backbone.res3[0].conv1.norm.weight,
        trained_batch_norm().backbone.res3[0].conv1.norm.weight,
    )
    with pytest.raises(InputError, match="no running statistics"):
        load(model_of("KN", MODEL__BACKBONE__FREEZE_AT=2), tmp_path, content, "R-50.pkl")


def test_statistics_that_are_missing_here_and_there_are_no_folding(tmp_path):
    state = _bn_state()
    del state["backbone.res2.1.conv2.norm.running_var"]
    for model in (model_of("FrozenBN"), model_of("KN", MODEL__BACKBONE__FREEZE_AT=2)):
        with pytest.raises(InputError, match="1 missing, the first backbone.res2.1.conv2.norm.run"):
            load(model, tmp_path, state)


# Another architecture.


def test_a_deeper_network_is_refused(tmp_path):
    source = build_rcnn(rcnn_cfg("BN", MODEL__RESNETS__DEPTH=101))
    with pytest.raises(InputError, match="filters that the model lacks, the first .*res4.6"):
        load(model_of("KN"), tmp_path, source.state_dict())


def test_a_stage_that_the_model_does_not_have_is_left(tmp_path, caplog):
    # ImageNet's res5, where no head has one; and the bias of MSRA's first convolution.
    from ..models import build_backbone, resnet_cfg

    content = formats.bare({**_bn_state(), "backbone.stem.conv1.bias": torch.zeros(8)})
    with caplog.at_level("INFO", "kn_detectron"):
        load(build_backbone(resnet_cfg("KN")), tmp_path, content)
    assert re.search(r"\nres5 +50\n", caplog.text) and f" {50 + 1} not used" in caplog.text


def test_weights_of_which_nothing_fits_are_refused_without_a_resnet_too(tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1))
    with pytest.raises(InputError, match="another architecture .*0 tensors fit, 2 missing"):
        load(model, tmp_path, {"encoder.bias": torch.ones(3)})


# The report.


def test_the_table_counts_per_group_and_names_what_is_missing(tmp_path, caplog):
    with caplog.at_level("INFO", "kn_detectron"):
        load(model_of("KN"), tmp_path, formats.torchvision(formats.bare(_bn_state())))
    rows = dict(re.findall(r"^([\w ]+?) {2,}(\d.*)$", caplog.text, re.MULTILINE))
    rows = {name: [int(n) for n in counts.split()] for name, counts in rows.items()}
    assert rows == {
        "KN gains": [106],
        "KN process models": [106],
        "stem": [5],
        "res2": [50],
        "res3": [65],
        "res4": [95],
        "res5": [50],
        "RPN": [6],
        "box predictor": [4],
        "mask head": [4],
        "classifier": [2],
        "all": [265, 226, 2],
    }
    # Names of what is missing, of one module in one line.
    assert "proposal_generator.rpn_head.conv" in caplog.text
    assert "roi_heads.mask_head.deconv" in caplog.text
    assert "mean_offset" not in caplog.text


def test_other_pixels_and_strides_are_said_in_one_sentence(tmp_path, caplog):
    state = formats.torchvision(formats.bare(_bn_state()))
    with caplog.at_level("WARNING", "kn_detectron"):
        load(model_of("KN"), tmp_path, state)
    (record,) = [r for r in caplog.records if r.name.startswith("kn_detectron")]
    for words in (
        "INPUT.FORMAT RGB (the model has BGR)",
        "MODEL.PIXEL_MEAN [123.675, 116.28, 103.53] (the model has [103.53, 116.28, 123.675]",
        "MODEL.PIXEL_STD [58.395, 57.12, 57.375] (the model has [1, 1, 1])",
        "MODEL.RESNETS.STRIDE_IN_1X1 False (the model has True)",
    ):
        assert words in record.getMessage()
    caplog.clear()
    fitting = model_of(
        "KN",
        INPUT__FORMAT="RGB",
        MODEL__PIXEL_MEAN=[123.675, 116.280, 103.530],
        MODEL__PIXEL_STD=[58.395, 57.120, 57.375],
        MODEL__RESNETS__STRIDE_IN_1X1=False,
    )
    with caplog.at_level("WARNING", "kn_detectron"):
        load(fitting, tmp_path, state)
    assert not [r for r in caplog.records if r.name.startswith("kn_detectron")]


def test_the_config_decides_on_pixels_whatever_the_checkpoint_has(tmp_path):
    state = dict(_bn_state(), pixel_mean=torch.ones(3, 1, 1), pixel_std=torch.ones(3, 1, 1) * 2)
    model = load(model_of("BN"), tmp_path, state)
    assert model.pixel_mean.flatten().tolist() == pytest.approx([103.53, 116.28, 123.675])
    assert model.pixel_std.flatten().tolist() == [1.0, 1.0, 1.0]


# Evaluation.


def test_converted_weights_can_be_evaluated(tmp_path):
    source = trained_kn()
    state = {n: v for n, v in source.state_dict().items() if "gain" not in n}
    # The process models of layers that the config freezes have no use either.
    for options in ({}, dict(MODEL__BACKBONE__FREEZE_AT=2)):
        model = load(model_of("KN", **options), tmp_path, state, strict=True)
        assert_same(others(model.state_dict()), others(source.state_dict()))


# FPN models of detectron2's model zoo.

# Those with frozen BatchNorm have no other norms, and a box head without convolutions.
PLAIN = dict(
    MODEL__FPN__NORM="",
    MODEL__ROI_BOX_HEAD__NORM="",
    MODEL__ROI_BOX_HEAD__NUM_CONV=0,
    MODEL__ROI_BOX_HEAD__NUM_FC=2,
    MODEL__ROI_MASK_HEAD__NORM="",
)


def zoo_file(folder, norm, **options):
    source = randomize(build_rcnn(fpn_rcnn_cfg(norm, **options)))
    return formats.write(folder, formats.model_zoo(source.state_dict()), "model_final.pkl"), source


def test_the_zoos_fpn_model_starts_a_kn_model(tmp_path, caplog):
    path, source = zoo_file(tmp_path, "FrozenBN", **PLAIN)
    model = build_rcnn(fpn_rcnn_cfg("KN"), seed=3)
    of_parts = {n for n in kalman_layers(model) if "bottom_up" not in n}
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with caplog.at_level("INFO", "kn_detectron"):
        KNCheckpointer(model).load(path, [])
    state, given = model.state_dict(), source.state_dict()
    for name in set(given) & set(state) - {"pixel_mean", "pixel_std"}:
        assert torch.equal(state[name], given[name]), name
    loaded = {name.rpartition(".")[0] for name in given}
    assert {"backbone.fpn_output2", "roi_heads.mask_head.mask_fcn1"} <= loaded & {
        name.rpartition(".")[0] for name in state
    }
    # The ResNet is calibrated; statistics of FPN and heads, which are of no data, are fitted to
    # by nothing.
    assert "priors of 21 Kalman layers were set" in caplog.text
    assert len(kalman_layers(model)) == 21 + len(of_parts) == 21 + 8 + 4
    for name in filters(state):
        if name.rpartition(".")[0] in of_parts:
            assert torch.equal(state[name], before[name]), name
    assert not [r for r in caplog.records if "no running statistics" in r.getMessage()]


def test_an_fpn_model_with_batch_norm_everywhere_is_calibrated_everywhere(tmp_path, caplog):
    path, source = zoo_file(tmp_path, "BN")
    model = build_rcnn(fpn_rcnn_cfg("KN"), seed=3)
    with caplog.at_level("INFO", "kn_detectron"):
        KNCheckpointer(model).load(path, [])
    assert "priors of 33 Kalman layers were set" in caplog.text
    assert_same(others(model.state_dict()), others(source.state_dict()))


@pytest.mark.parametrize("norm", ["GN4", "GKN"])
def test_the_zoos_fpn_model_with_group_norm_loads_whole(tmp_path, norm):
    path, source = zoo_file(tmp_path, "GN4")
    model = build_rcnn(fpn_rcnn_cfg(norm), seed=3)
    KNCheckpointer(model).load(path, [])
    assert_same(others(model.state_dict()), others(source.state_dict()))
