import copy

import pytest
import torch
import torch.nn.functional as F
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from torch import nn

from kn_detectron import InputError
from kn_detectron.checkpoint import calibrate, fit_process_noise
from kn_detectron.checkpoint.calibration import predicted_priors
from kn_detectron.layers import (
    KalmanNorm2d,
    convert_kalman_norm,
    kalman_layers,
    set_gain_scale,
)
from kn_detectron.modeling.features import feature_of

from ..models import (
    build_backbone,
    build_rcnn,
    fpn_rcnn_cfg,
    images,
    randomize,
    rcnn_cfg,
    resnet_cfg,
)
from .deployed import assert_same_detections, detect
from .networks import scenes, trained_batch_norm

pytestmark = pytest.mark.trains


def calibrated(gain=0.1, **options):
    """The trained network with calibrated KN."""
    model = trained_batch_norm("KN", MODEL__KN__GAIN=gain, **options)
    calibrate(model)
    return model


def at_gain_0(**options):
    model = calibrated(**options)
    set_gain_scale(model, 0.0)
    return model


def relative_error(got, want):
    return ((got - want).abs().max() / want.abs().max()).item()


# At gain 0: the network with frozen BatchNorm, in training.


@pytest.mark.parametrize("freeze_at", [0, 2])
@pytest.mark.parametrize("batch", [1, 2, 16])
def test_features_at_gain_0_are_the_frozen_networks(freeze_at, batch):
    # In double precision, or the bound would depend on the rounding of the machine.
    frozen = trained_batch_norm("FrozenBN").double()
    model = trained_batch_norm("KN", MODEL__BACKBONE__FREEZE_AT=freeze_at).double()
    assert set(calibrate(model)) == set(kalman_layers(model))
    set_gain_scale(model, 0.0)
    x = frozen.preprocess_image(scenes(batch, seed=99)).tensor
    with torch.no_grad():
        want = frozen.backbone(x)["res4"]
        features = model.train().backbone(x)
        assert relative_error(features["res4"], want) <= 1e-9
        boxes = [Boxes(torch.tensor([[10.0, 10.0, 70.0, 80.0]]))] * batch
        want = frozen.roi_heads._shared_roi_transform([want], boxes)
        got = model.roi_heads._shared_roi_transform([feature_of(features, "res4")], boxes)
    assert relative_error(got, want) <= 1e-9


def first_losses(model, inputs):
    """The losses of a training step, whose choice of proposals is seeded."""
    torch.manual_seed(7)
    with EventStorage(), torch.no_grad():
        return {name: loss.item() for name, loss in model.train()(inputs).items()}


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_losses_and_detections_at_gain_0_are_the_frozen_networks(batch):
    frozen, model = trained_batch_norm("FrozenBN"), at_gain_0()
    inputs = scenes(batch, seed=77)
    want = first_losses(frozen, inputs)
    assert first_losses(model, inputs) == pytest.approx(want, rel=1e-4)
    # Detections, with the layers computing what they compute in training.
    frozen.eval()
    model.eval()
    model.backbone.train()
    model.roi_heads.res5.train()
    want = detect(frozen, inputs)
    assert sum(len(one["scores"]) for one in want) > 5 * batch
    assert_same_detections(detect(model, inputs), want, tolerance=1e-4)


# At the gains of the configs.


def test_first_losses_are_close_to_the_frozen_networks():
    # All anchors and proposals count, so that none is drawn.
    all_of_them = dict(
        MODEL__RPN__BATCH_SIZE_PER_IMAGE=4096,
        MODEL__ROI_HEADS__BATCH_SIZE_PER_IMAGE=64,
        MODEL__ROI_HEADS__POSITIVE_FRACTION=1.0,
    )
    batches = [scenes(2, seed=400 + i) for i in range(6)]

    def total_losses(model):
        return torch.tensor([sum(first_losses(model, inputs).values()) for inputs in batches])

    want = total_losses(trained_batch_norm("FrozenBN", **all_of_them))
    error = {
        name: ((total_losses(model) - want).abs().mean() / want.mean()).item()
        for name, model in {
            "live": trained_batch_norm("BN", **all_of_them),
            0.1: calibrated(0.1, **all_of_them),
            0.02: calibrated(0.02, **all_of_them),
            "uncalibrated": trained_batch_norm("KN", MODEL__KN__GAIN=0.02, **all_of_them),
        }.items()
    }
    # By how much depends on the trained network, and that on the machine's rounding.
    assert error[0.02] < 0.1
    assert error[0.02] < error["live"]
    assert max(error[0.02], error[0.1]) < error["uncalibrated"]


# While it is fine-tuned.


def test_priors_follow_a_filter_and_frozen_statistics_do_not():
    frozen, model = trained_batch_norm("FrozenBN"), at_gain_0()
    x = frozen.preprocess_image(scenes(2, seed=5)).tensor
    changes = {}
    for name, one in (("frozen", frozen), ("KN", model)):
        with torch.no_grad():
            before = one.train().backbone(x)["res4"]
            one.backbone.res3[1].conv2.weight.mul_(3.0)
            changes[name] = relative_error(one.backbone(x)["res4"], before)
    assert changes["KN"] < 1e-3 and changes["frozen"] > 0.1
    norms = [one.backbone.res3[1].conv2.norm for one in (model, frozen)]
    torch.testing.assert_close(norms[0].running_mean, 3 * norms[1].running_mean)
    torch.testing.assert_close(norms[0].running_var, 9 * norms[1].running_var)


def test_priors_follow_a_step_of_the_optimiser():
    """After one step that scales every filter, all else being equal."""
    model = at_gain_0()
    x = model.preprocess_image(scenes(2, seed=5)).tensor
    filters = [m.weight for m in model.backbone.modules() if isinstance(m, torch.nn.Conv2d)]
    before = model.train().backbone(x)["res4"]
    statistics = copy.deepcopy(model.backbone.res4[2].conv2.norm.running_var)
    optimiser = torch.optim.SGD(filters, lr=1.0)
    for weight in filters:
        weight.grad = -2.0 * weight.detach()
    optimiser.step()
    with torch.no_grad():
        after = model.backbone(x)["res4"]
    assert (
        relative_error(after, before) < 5e-3
    )  # eps was small beside the variances, and is smaller
    ratio = model.backbone.res4[2].conv2.norm.running_var / statistics
    torch.testing.assert_close(ratio, torch.full_like(ratio, 9.0), rtol=1e-3, atol=0)


# What else calibration does and does not.


def test_it_changes_nothing_but_the_process_models():
    model = trained_batch_norm("KN")
    model.roi_heads.eval()
    before = copy.deepcopy(model.state_dict())
    calibrate(model)
    for name, value in model.state_dict().items():
        changed = not torch.equal(value, before[name])
        assert changed == name.endswith(("mean_offset", "log_var_scale")), name
    assert model.training and not model.roi_heads.training


def test_it_changes_only_the_layers_that_it_is_told_to():
    model, whole = trained_batch_norm("KN"), calibrated()
    name = "backbone.res3.0.conv1.norm"
    assert list(calibrate(model, [name])) == [name]
    for other, layer in kalman_layers(model).items():
        want = kalman_layers(whole)[name].mean_offset if other == name else 0.0
        assert (layer.mean_offset == want).all(), other


def test_new_layers_keep_their_priors():
    """Nobody has measured the statistics of an FPN and of heads that ImageNet weights lack."""
    model = build_rcnn(fpn_rcnn_cfg("KN"))
    randomize(model.backbone.bottom_up)
    trained = {name for name in kalman_layers(model) if name.startswith("backbone.bottom_up.")}
    assert set(calibrate(model)) == trained < set(kalman_layers(model))
    assert calibrate(build_rcnn(rcnn_cfg("KN"))) == {}


def test_each_detector_of_a_module_has_its_own_beliefs():
    model = nn.ModuleDict(
        {
            name: randomize(build_rcnn(rcnn_cfg("KN"), seed), seed)
            for seed, name in enumerate(("teacher", "student"))
        }
    )
    alone = {name: copy.deepcopy(detector) for name, detector in model.items()}
    calibrate(model)
    for name, detector in alone.items():
        calibrate(detector)
        for key, value in detector.state_dict().items():
            assert torch.equal(model[name].state_dict()[key], value), (name, key)


def test_layers_that_no_chain_leads_to_are_named():
    model = trained_batch_norm("KN")
    model.extra = KalmanNorm2d(4)  # of another project, which hands it priors itself
    model.extra.running_mean.fill_(1.0)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match="1 KN layers cannot be calibrated, the first extra,"):
        calibrate(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert set(kalman_layers(model)) - set(predicted_priors(model)) == {"extra"}


def test_gkn_in_the_heads_of_an_fpn_gets_priors_without_images():
    model = build_rcnn(fpn_rcnn_cfg("GKN"))
    priors = predicted_priors(model)
    assert set(priors) == set(kalman_layers(model))
    assert any(name.startswith("roi_heads.mask_head") for name in priors)


def test_a_head_between_two_backbones_is_not_reached():
    model = trained_batch_norm("KN")
    model.second = copy.deepcopy(model.backbone)
    head = {name for name in kalman_layers(model) if name.startswith("roi_heads.")}
    assert set(kalman_layers(model)) - set(predicted_priors(model)) == head


def test_a_compiled_part_is_calibrated_too():
    model = randomize(build_rcnn(fpn_rcnn_cfg("KN")))
    model.backbone.bottom_up = torch.compile(model.backbone.bottom_up)
    assert set(calibrate(model)) == set(kalman_layers(model))


def test_sampled_priors_are_calibrated_in_closed_form():
    closed_form, monte_carlo = (
        calibrated(MODEL__KN__PREDICTION=p) for p in ("closed_form", "monte_carlo")
    )
    for name, value in closed_form.state_dict().items():
        assert torch.equal(monte_carlo.state_dict()[name], value), name
    assert "MonteCarlo" in repr(monte_carlo.backbone.chain.transition)


def test_sampling_goes_on_where_no_prior_could_be_predicted():
    options = dict(MODEL__FPN__NORM="GN1", MODEL__KN__PREDICTION="monte_carlo")
    model = build_rcnn(fpn_rcnn_cfg("KN", **options)).eval()
    with pytest.raises(InputError, match="MODEL.FPN.NORM"):
        predicted_priors(model)
    assert "MonteCarlo" in repr(model.backbone.bottom_up.chain.transition)
    assert not any(module.training for module in model.modules())


def test_a_dead_channel_keeps_everything_finite():
    backbone = build_backbone(resnet_cfg("KN"))
    backbone.res2[0].conv1.norm.running_var[0] = 0.0
    backbone.res2[0].conv1.norm.weight.data[1] = 0.0
    calibrate(backbone)
    assert all(p.isfinite().all() for p in backbone.parameters())
    assert backbone(images())["res4"].isfinite().all()


def test_a_dead_filter_can_come_to_life():
    """Its stale statistics are negligible, and as a quotient of small numbers b was thousands: then
    the first step made the loss 1e8, and a later one NaN."""
    conv = nn.Conv2d(3, 4, 3, bias=False)
    below = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU()
    network = nn.Sequential(*below, conv, nn.BatchNorm2d(4))
    network = convert_kalman_norm(network, gain=0.0, learn_gain=False)
    norm = network.get_submodule("4")
    with torch.no_grad():
        conv.weight[0] *= 1e-20
        norm.running_mean[0], norm.running_var[0] = -3e-15, 1e-41
    calibrate(network)
    assert norm.mean_offset[0] == norm.log_var_scale[0] == 0
    assert norm.mean_offset[1:].any() and norm.log_var_scale[1:].all()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.005, momentum=0.9)
    target = torch.randn(2, 4, 28, 28, generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(5):
        loss = (network.train()(images(2, 32) / 50) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert max(losses) < 2 * losses[0]


@pytest.mark.parametrize(
    "option", [dict(MODEL__KN__VARIANT="paper"), dict(MODEL__KN__PROCESS_MODEL=False)]
)
def test_what_cannot_be_calibrated(option):
    with pytest.raises(InputError, match="cannot be calibrated"):
        calibrate(build_backbone(resnet_cfg("KN", **option)))


# The paper variant.


def paper(**options):
    return trained_batch_norm("KN", MODEL__KN__VARIANT="paper", **options)


def test_noise_widens_the_priors_of_the_paper_variant():
    model = paper()
    block = model.backbone.res3[1]
    below, norm = block.conv1.norm, block.conv2.norm
    norm.running_var[::2] *= 100.0  # more than is predicted
    fit_process_noise(model)
    # From the running statistics of the layer below, by sampling.
    with torch.no_grad():
        z = torch.distributions.Normal(below.running_mean, below.running_var.sqrt())
        draws = z.sample((200_000,)).clamp_min(0)
        predicted = torch.einsum("oihw,i->o", block.conv2.weight.square(), draws.var(0))
        noise = F.softplus(norm.process_noise)
    least = F.softplus(torch.tensor(-5.0))
    want = (norm.running_var - predicted).clamp_min(least)
    torch.testing.assert_close(noise, want, rtol=2e-2, atol=1e-4)
    assert noise.max() > 10 * least and noise.min().item() == pytest.approx(least.item(), rel=1e-3)


def test_learned_gains_of_the_paper_variant_are_raised_and_no_others():
    model = paper(MODEL__KN__GAIN=0.1)
    with torch.no_grad():
        model.backbone.res2[0].conv1.norm.gain_logit.fill_(5.0)
    assert fit_process_noise(model) == len(kalman_layers(model)) - 1
    for name, layer in kalman_layers(model).items():
        want = torch.tensor(5.0).sigmoid() if name == "backbone.res2.0.conv1.norm" else 0.9
        assert layer.gain.item() == pytest.approx(float(want), rel=1e-5)
    model = paper(MODEL__KN__GAIN=0.1, MODEL__KN__LEARN_GAIN=False)
    assert fit_process_noise(model) == 0
    assert all(abs(layer.gain.item() - 0.1) < 1e-6 for layer in kalman_layers(model).values())


def test_how_far_the_paper_variant_is_from_exact():
    """The figures in the docstring of fit_process_noise."""
    frozen = trained_batch_norm("FrozenBN")
    x = frozen.preprocess_image(scenes(2, seed=999)).tensor
    model = paper()
    fit_process_noise(model)
    models = {
        "paper": model,
        "live": trained_batch_norm("BN"),
        "network": calibrated(0.02),
        "exact": at_gain_0(),
    }
    with torch.no_grad():
        want = frozen.backbone(x)["res4"]
        error = {
            name: ((m.train().backbone(x)["res4"] - want).norm() / want.norm()).item()
            for name, m in models.items()
        }
    assert error["exact"] < 1e-4 < error["network"] < 0.4 < error["paper"] < 1.1 * error["live"]


def test_noise_is_for_the_paper_variant_only():
    with pytest.raises(InputError, match="not a layer of the paper variant"):
        fit_process_noise(build_rcnn(rcnn_cfg("KN")))


def test_a_model_without_kalman_layers_is_refused():
    with pytest.raises(InputError, match="Sequential has no KN layer"):
        calibrate(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
