from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone
from torch import nn

from benchmark import Group, candidates, make_groups, measure, measure_group
from benchmark.candidates import NotRun, build, network_config
from benchmark.presets import DTYPES, FORMATS, NORMS
from kn_detectron.layers import kalman_layers, normalize

CPU = torch.device("cpu")
LAYER = Group("layer", ("BN",), ("BN",), (2, 32, 4, 4))
(STEP,) = make_groups("quick", ["step"])
NETWORKS = ["BN", "FrozenBN", "GN", "KN", "KN-gain0", "KN-paper", "KN-paper-MC", "GKN"]


def conv_shapes(norm):
    backbone = build_backbone(network_config(norm, CPU, STEP))
    convs = [m for m in backbone.modules() if isinstance(m, torch.nn.Conv2d)]
    return [(tuple(c.weight.shape), c.stride, c.weight.requires_grad) for c in convs]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_gives_features_and_gradients_like_the_ones_it_gets(dtype, memory_format):
    group = replace(LAYER, dtype=dtype, memory_format=memory_format)
    for norm in ("BN", "FrozenBN", "FrozenBN-affine", "KN", "KN-gain0", "KN-paper", "GKN"):
        layer = build(group, norm, CPU)
        y = layer.forward()
        dx, *others = layer.backward(y)
        assert y.shape == dx.shape == group.shape
        assert str(y.dtype) == str(dx.dtype) == f"torch.{dtype}"
        expected = dict(contiguous=torch.contiguous_format, channels_last=torch.channels_last)
        assert dx.is_contiguous(memory_format=expected[memory_format]), norm
        assert dx.abs().max() > 0
        # weight and bias, and those of the prior, b, r and the gain where there are such
        count = {"FrozenBN": 0, "KN": 7, "KN-gain0": 6, "KN-paper": 6, "GKN": 7}.get(norm, 2)
        assert len(others) == count and all(v is not None for v in others), norm


@pytest.mark.filterwarnings("ignore:torch.is_autocast_cpu_enabled:DeprecationWarning")
def test_autocast_on_a_cpu_works_where_torch_asks_about_gpus_only(monkeypatch):
    """As torch does before 2.4."""

    class OldTorch:
        is_autocast_enabled = staticmethod(lambda: False)

        def __getattr__(self, name):
            return getattr(torch, name)

    monkeypatch.setattr(candidates, "torch", OldTorch())
    layer = build(replace(LAYER, dtype="bfloat16"), "BN", CPU)
    assert layer.forward().dtype == torch.bfloat16


def test_the_layers_are_what_they_are_called():
    x, outputs = None, {}
    for norm in ("BN", "FrozenBN-affine", "KN-gain0", "GN"):
        layer = build(LAYER, norm, CPU)
        (x,) = [t for t in layer.constants if t.shape == LAYER.shape and t.requires_grad]
        outputs[norm] = layer.forward()
    torch.testing.assert_close(outputs["BN"], F.batch_norm(x, None, None, training=True))
    torch.testing.assert_close(outputs["GN"], F.group_norm(x, 32))
    # With a prior of mean 0 and variance 1, or such running statistics, nothing is measured.
    for norm in ("FrozenBN-affine", "KN-gain0"):
        torch.testing.assert_close(outputs[norm], x / (1 + 1e-5) ** 0.5)


def test_networks_are_alike_but_for_the_norm():
    expected = conv_shapes("BN")
    assert len(expected) == 42  # 43 less the first shortcut, which the slim network does without
    for norm in NETWORKS[1:]:
        assert conv_shapes(norm) == expected, norm
    gain0 = network_config("KN-gain0", CPU, STEP)
    assert (gain0.MODEL.KN.GAIN, gain0.MODEL.KN.LEARN_GAIN) == (0.0, False)
    predictions = {n: network_config(n, CPU, STEP).MODEL.KN.PREDICTION for n in NETWORKS}
    assert predictions["KN-paper"] == "closed_form" and predictions["KN-paper-MC"] == "monte_carlo"


def test_the_full_networks_are_the_shipped_coco_configs():
    cfg = network_config("KN", CPU, replace(STEP, slim=False, regions=None))
    assert cfg.MODEL.RESNETS.RES2_OUT_CHANNELS == 256 and cfg.MODEL.BACKBONE.FREEZE_AT == 2
    assert cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE == 256 and cfg.MODEL.MASK_ON


@pytest.fixture
def models(monkeypatch):
    """The detectors that are built, in a list."""
    built, build_detector = [], candidates._detector

    def detector(*args):
        cfg, model = build_detector(*args)
        built.append(model)
        return cfg, model

    monkeypatch.setattr(candidates, "_detector", detector)
    return built


def test_steps_do_the_same_work_for_all_norms_each_time(models):
    regions = []
    for norm in ("BN", "KN", "FrozenBN"):
        step = build(STEP, norm, CPU)
        models[-1].roi_heads.pooler.register_forward_pre_hook(
            lambda module, args: regions.append(args[1][0].tensor)
        )
        before = [t.clone() for t in step.constants if t.requires_grad]
        losses = []
        for _ in range(2):
            losses.append(step.forward())
            step.backward(losses[-1])
            grads = [t.grad for t in step.constants if t.requires_grad]
            assert grads and all(g is not None for g in grads), norm
            step.finish()
        assert losses[0].isfinite() and losses[0] == losses[1]
        after = [t for t in step.constants if t.requires_grad]
        assert all(a.equal(b) and a.grad is None for a, b in zip(after, before))
    assert len(regions) == 6 and regions[0].shape == (STEP.regions, 4)
    assert all(r.equal(regions[0]) for r in regions)


def test_a_prediction_in_closed_form_does_not_depend_on_the_image_and_a_sampled_one_does():
    group = Group("prediction", (), (), (0, 3, 64, 64), rounds=1, slim=True)
    names = [f"{norm}@{size}" for norm in ("KN", "KN-paper-MC") for size in (64, 128)]
    rows = measure_group(replace(group, candidates=tuple(names)), CPU, warmup=1, min_time=0)["rows"]
    small, large, sampled_small, sampled_large = rows
    for key in ("saved_bytes", "launches"):
        assert small[key] == large[key]
    # Four times the pixels, beside what does not depend on them: the regions and the weights.
    assert sampled_large["saved_bytes"] > 2 * sampled_small["saved_bytes"] > 0
    # About 30 layers with a prior, each with a mean and a variance.
    assert small["launches"]["backward"] > 100


def test_what_is_predicted_is_what_a_training_step_predicts(models):
    priors = []
    for norm in ("KN-prediction", "KN"):
        candidate = build(STEP, norm, CPU)
        priors.append({})
        for name, layer in kalman_layers(models[-1]).items():
            layer.register_forward_pre_hook(
                lambda module, args, kwargs, name=name, to=priors[-1]: to.update(
                    {name: kwargs["prior"]}
                ),
                with_kwargs=True,
            )
        result = candidate.forward()
        candidate.backward(result)
        if norm == "KN-prediction":
            assert result[0].shape[0] == 0  # no images
    predicted, real = priors
    assert len(predicted) == 42 and list(predicted) == list(real)  # all but those that are frozen
    for name, prior in predicted.items():
        torch.testing.assert_close(tuple(prior), tuple(real[name]))


def test_on_a_gpu_a_prediction_takes_a_real_steps_path(monkeypatch):
    """On empty features layers are composed of torch's nodes, which use no kernel."""
    needs, composed = candidates._needs_an_image, []
    monkeypatch.setattr(
        candidates, "_needs_an_image", lambda transition, _: needs(transition, torch.device("cuda"))
    )
    compose = normalize._composed
    monkeypatch.setattr(normalize, "_composed", lambda *a: composed.append(a) or compose(*a))
    expected = {"KN": False, "KN-paper": False, "GKN": False, "KN-paper-MC": True}
    for norm, is_empty in expected.items():
        composed.clear()
        prediction = build(
            Group("prediction", (), (), (0, 3, 64, 64), slim=True), f"{norm}@64", CPU
        )
        features, regions, *belief = result = prediction.forward()
        assert (len(features) == 0, len(regions) == 0, len(composed) > 0) == (is_empty,) * 3
        # A sampled map has the size of the features.
        assert features.shape[-2:] == ((4, 4) if is_empty else (2, 2))
        assert all(v.isfinite().all() for v in belief)
        gradients = prediction.backward(result)
        assert sum(g is not None for g in gradients) > 100 and len(belief) == 2
    with_a_step = build(STEP, "KN-prediction", CPU)
    assert with_a_step.forward()[0].shape[0] == 1


@pytest.fixture
def step_of_a_gpu(monkeypatch):
    """Makes a step in float16 whose gradient, in float16 on its way, is a given number."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda _, **options: scaler("cpu", **options))

    class Model(nn.Module):
        def __init__(self, gradient):
            super().__init__()
            self.weight, self.gradient = nn.Parameter(torch.zeros(1)), gradient

        def forward(self, inputs):
            return {"loss": (self.weight.half() * self.gradient).float().sum()}

    def make(gradient):
        monkeypatch.setattr(candidates, "_detector", lambda *_: (get_cfg(), Model(gradient)))
        group = replace(STEP, dtype="float16")
        return candidates._build_step(group, "BN", torch.device("cuda"))

    return make


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_the_loss_in_float16_is_not_scaled_beyond_its_range(step_of_a_gpu):
    step = step_of_a_gpu(100.0)  # times 2^10 it is beyond 65504
    scale = step.scale()
    step.run()
    assert step.scale() == scale > 1


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_a_step_whose_gradients_overflow_is_not_measured(step_of_a_gpu, monkeypatch):
    monkeypatch.setattr(measure, "build", lambda group, name, device: step_of_a_gpu(float(name)))
    group = replace(STEP, candidates=("60000", "100"), bases=("100",), rounds=1)
    overflows, fine = measure_group(group, CPU, warmup=1, min_time=0)["rows"]
    assert (overflows["status"], fine["status"]) == ("not run", "measured")
    assert "gradients overflowed with the loss times 64" in overflows["reason"]


def test_evaluation_needs_as_many_operations_as_with_frozen_batchnorm():
    (group,) = make_groups("quick", ["evaluation"], rounds=1)
    rows = measure_group(group, CPU, warmup=1, min_time=0.0)["rows"]
    launches = {row["name"]: row["launches"] for row in rows}
    assert launches["KN"] == launches["FrozenBN"]
    assert launches["KN"]["forward"] > 100 and launches["KN"]["backward"] == 0


@pytest.mark.parametrize("name", ["closed form", "Monte Carlo"])
def test_a_curves_prediction_is_that_of_relu_and_convolution(name):
    group = Group("size", (), (), (1, 16, 40, 40), kernel=3, at=640)
    prediction = build(group, name, CPU)
    mean, var = prediction.forward()
    weight = prediction.constants[0]
    # A rectified standard normal has mean 1/sqrt(2 pi) and variance 1/2 - 1/(2 pi).
    tolerance = dict(rtol=1e-4, atol=1e-4) if name == "closed form" else dict(rtol=0.2, atol=0.1)
    torch.testing.assert_close(mean[0], weight.sum((1, 2, 3)) * 0.398942, **tolerance)
    torch.testing.assert_close(var[0], weight.square().sum((1, 2, 3)) * 0.340845, **tolerance)
    assert [g.shape for g in prediction.backward((mean, var))] == [weight.shape, (1, 16), (1, 16)]


@pytest.mark.parametrize(
    "group, norm, reason",
    [
        (LAYER, "SyncBN", "needs GPUs"),
        (STEP, "SyncBN", "needs GPUs"),
        (LAYER, "KN-paper-MC", "only the prediction differs"),
        (LAYER, "KN-prediction", "beside a step"),
        (STEP, "FrozenBN-affine", "only one layer"),
        (replace(LAYER, shape=(1, 24, 4, 4)), "GN", "32 groups do not divide 24 channels"),
        (replace(STEP, dtype="float16"), "BN", "gradient scaling"),
        (Group("prediction", (), (), (0, 3, 64, 64)), "BN@64", "predicts nothing"),
    ],
)
def test_what_cannot_be_run_says_why(group, norm, reason):
    with pytest.raises(NotRun, match=reason):
        build(group, norm, CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_runs_on_it():
    for norm in NORMS:
        with pytest.raises(NotRun, match="torch finds no GPU"):
            build(LAYER, norm, torch.device("cuda"))
