import copy

import pytest
import torch
from detectron2.structures import Boxes

from kn_detectron import InputError
from kn_detectron.checkpoint import KNCheckpointer, calibrate
from kn_detectron.layers import kalman_layers, set_gain_scale

from ..models import build_backbone, build_rcnn, images, randomize, rcnn_cfg, resnet_cfg


def trained_batch_norm(**options):
    """A Mask R-CNN with BatchNorm whose statistics are those of its features."""
    model = randomize(build_rcnn(rcnn_cfg("BN", **options)))
    with torch.no_grad():
        for seed in range(20):
            features = model.backbone(images(4, 96, seed))["res4"]
            model.roi_heads.res5(features[:, :, :2, :2].repeat(1, 1, 7, 7))
    return model


@pytest.mark.parametrize("freeze_at", [0, 2])
@pytest.mark.parametrize("batch", [1, 2, 16])
def test_at_gain_0_it_is_the_frozen_network_in_training(freeze_at, batch):
    frozen = trained_batch_norm(MODEL__BACKBONE__FREEZE_AT=freeze_at)
    model = build_rcnn(rcnn_cfg("KN", MODEL__BACKBONE__FREEZE_AT=freeze_at))
    model.load_state_dict(frozen.state_dict())
    assert set(calibrate(model)) == set(kalman_layers(model))
    set_gain_scale(model, 0.0)
    x = images(batch, 96, seed=99)
    with torch.no_grad():
        want = frozen.eval().backbone(x)["res4"]
        features = model.train().backbone(x)
        assert (features["res4"] - want).abs().max() <= 1e-4 * want.abs().max()
        boxes = [Boxes(torch.tensor([[10.0, 10.0, 70.0, 80.0]]))] * batch
        want = frozen.roi_heads._shared_roi_transform([want], boxes)
        got = model.roi_heads._with_beliefs(features)
        got = model.roi_heads._shared_roi_transform([got["res4"]], boxes)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def test_priors_follow_the_filters():
    model = build_rcnn(rcnn_cfg("KN"))
    model.load_state_dict(trained_batch_norm().state_dict())
    calibrate(model)
    set_gain_scale(model, 0.0)
    with torch.no_grad():
        want = model.backbone(images())["res4"]
        model.backbone.res3[1].conv2.weight.mul_(3.0)
        got = model.backbone(images())["res4"]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * want.abs().max().item())


def test_it_changes_nothing_but_the_process_models():
    model = build_rcnn(rcnn_cfg("KN"))
    model.load_state_dict(trained_batch_norm().state_dict())
    model.roi_heads.eval()
    before = copy.deepcopy(model.state_dict())
    calibrate(model)
    for name, value in model.state_dict().items():
        changed = not torch.equal(value, before[name])
        assert changed == name.endswith(("mean_offset", "log_var_scale")), name
    assert model.training and not model.roi_heads.training


def test_sampled_priors_are_calibrated_in_closed_form():
    state = trained_batch_norm().state_dict()
    models = [
        build_rcnn(rcnn_cfg("KN", MODEL__KN__PREDICTION=p)) for p in ("closed_form", "monte_carlo")
    ]
    for model in models:
        model.load_state_dict(state)
        calibrate(model)
    closed_form, monte_carlo = (model.state_dict() for model in models)
    for name, value in closed_form.items():
        assert torch.equal(monte_carlo[name], value), name
    assert "MonteCarlo" in repr(models[1].backbone.chain.transition)


def test_a_dead_channel_keeps_everything_finite():
    backbone = build_backbone(resnet_cfg("KN"))
    backbone.res2[0].conv1.norm.running_var[0] = 0.0
    backbone.res2[0].conv1.norm.weight.data[1] = 0.0
    calibrate(backbone)
    assert all(p.isfinite().all() for p in backbone.parameters())
    assert backbone(images())["res4"].isfinite().all()


@pytest.mark.parametrize(
    "option", [dict(MODEL__KN__VARIANT="paper"), dict(MODEL__KN__PROCESS_MODEL=False)]
)
def test_what_cannot_be_calibrated(option):
    with pytest.raises(InputError, match="cannot be calibrated"):
        calibrate(build_backbone(resnet_cfg("KN", **option)))


def test_batch_norm_weights_are_calibrated_when_they_are_loaded(tmp_path, caplog):
    bn = trained_batch_norm()
    torch.save({"model": bn.state_dict()}, tmp_path / "bn.pth")
    model, want = build_rcnn(rcnn_cfg("KN")), build_rcnn(rcnn_cfg("KN"))
    with caplog.at_level("INFO", "kn_detectron"):
        KNCheckpointer(model).load(str(tmp_path / "bn.pth"), checkpointables=[])
    assert "priors of 53 Kalman layers were set" in caplog.text
    want.load_state_dict(bn.state_dict())
    calibrate(want)
    for name, value in want.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    # What has priors of its own is left alone.
    model.backbone.stem.conv1.norm.mean_offset.data.fill_(7.0)
    torch.save({"model": model.state_dict()}, tmp_path / "kn.pth")
    KNCheckpointer(want).load(str(tmp_path / "kn.pth"), checkpointables=[])
    assert (want.backbone.stem.conv1.norm.mean_offset == 7.0).all()


def test_weights_whose_priors_cannot_be_fitted_are_loaded_with_a_warning(tmp_path, caplog):
    torch.save({"model": trained_batch_norm().state_dict()}, tmp_path / "bn.pth")
    model = build_rcnn(rcnn_cfg("KN", MODEL__KN__VARIANT="paper"))
    with caplog.at_level("WARNING", "kn_detectron"):
        KNCheckpointer(model).load(str(tmp_path / "bn.pth"), checkpointables=[])
    assert "do not fit the weights" in caplog.text
