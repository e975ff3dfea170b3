import copy

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool

from kn_detectron import Belief, InputError
from kn_detectron.layers import KN_STATE, GroupKalmanNorm2d, KalmanNorm2d, kalman_layers
from kn_detectron.layers import belief as B
from kn_detectron.modeling import KNFPN, ChainConfig, Features

from ..models import build_backbone, build_rcnn, fpn_rcnn_cfg, images, randomize, rcnn_inputs
from .test_roi_heads import detections, train_step

CONVS = {f"fpn_{kind}{level}" for kind in ("lateral", "output") for level in (2, 3, 4, 5)}


class Noise(Backbone):
    """Features of independent Gaussian pixels, with the beliefs that are true of them."""

    def __init__(self, seed=0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.truth = {
            f"res{k}": Belief(torch.randn(1, 4, generator=g), torch.rand(1, 4, generator=g) + 0.5)
            for k in (3, 4)
        }
        self.beliefs = dict(self.truth)

    def forward(self, x):
        g = torch.Generator().manual_seed(1)
        features = {}
        for name, side in (("res3", 256), ("res4", 128)):
            mean, var = (v.view(1, 4, 1, 1) for v in self.truth[name])
            features[name] = mean + var.sqrt() * torch.randn(2, 4, side, side, generator=g)
        return Features(features, self.beliefs)

    def output_shape(self):
        return {name: ShapeSpec(channels=4, stride=2 ** int(name[-1])) for name in self.truth}


def noise_fpn(**options):
    torch.manual_seed(0)
    # At gain 1 the belief about what a norm put out is exact, so that errors are those in between.
    chain = ChainConfig(gain=1.0, learn_gain=False, process_model=False)
    fpn = KNFPN(Noise(), ["res3", "res4"], 6, chain=chain, top_block=LastLevelMaxPool(), **options)
    fpn.top_block.in_feature = "p4"
    return randomize(fpn)


def assert_true_of(belief, value):
    """That a belief is what features measure, up to their sampling errors."""
    var, mean = torch.var_mean(value, (0, 2, 3))
    assert ((belief.mean[0] - mean).abs() < 0.05 * var.sqrt()).all()
    torch.testing.assert_close(belief.var[0], var, rtol=0.05, atol=0)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("fuse_type", ["sum", "avg"])
def test_beliefs_are_true_of_the_features(normalize, fuse_type):
    fpn, fused, priors = noise_fpn(normalize=normalize, fuse_type=fuse_type), {}, {}
    for name in ("fpn_output3", "fpn_output4"):
        conv = getattr(fpn, name)
        conv.register_forward_pre_hook(lambda m, args, name=name: fused.update({name: args[0]}))
    for name, norm in kalman_layers(fpn).items():
        norm.register_forward_pre_hook(
            lambda m, args, kwargs, name=name: priors.update({name: (kwargs["prior"], args[0])}),
            with_kwargs=True,
        )
    out = fpn(images())
    for name, feature in fused.items():
        assert_true_of(feature.belief, feature.value)
        # The channels of a fused map are mixtures of the same features: not independent, so that
        # what is predicted behind an output convolution is not quite what is measured there.
        conv = getattr(fpn, name)
        predicted = B.conv2d(feature.belief, conv.weight, conv.bias)
        got = priors[f"{name}.norm"][0] if normalize else out.beliefs[f"p{name[-1]}"]
        torch.testing.assert_close(got, predicted)
    if normalize:
        for name in ("fpn_lateral3.norm", "fpn_lateral4.norm"):
            assert_true_of(*priors[name])
        for name in ("p3", "p4"):
            assert_true_of(out.beliefs[name], out[name])
    assert out.beliefs["p5"] is out.beliefs["p4"]
    assert out["p5"].shape[-2:] == (64, 64)


@pytest.mark.parametrize("fuse_type", ["sum", "avg"])
@pytest.mark.parametrize("norm", ["KN", ""])
def test_same_network_and_keys_as_detectron2(norm, fuse_type):
    options = dict(MODEL__FPN__FUSE_TYPE=fuse_type)
    theirs = fpn_rcnn_cfg("BN", **options)
    theirs.MODEL.FPN.NORM = norm and "BN"
    theirs = randomize(build_backbone(theirs))
    ours = build_backbone(fpn_rcnn_cfg("KN", MODEL__FPN__NORM=norm, **options))
    assert isinstance(ours, KNFPN)
    own = {k for k in ours.state_dict() if k.rsplit(".", 1)[1] in KN_STATE}
    assert set(ours.state_dict()) - own == set(theirs.state_dict())
    assert ours.output_shape() == theirs.output_shape()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    got, want = ours.eval()(images()), theirs.eval()(images())
    assert set(got) == set(want) == {"p2", "p3", "p4", "p5", "p6"}
    assert not got.beliefs
    for name in want:
        assert torch.equal(got[name], want[name])


@pytest.mark.parametrize("norm", ["KN", "GKN"])
@pytest.mark.parametrize("variant", ["network", "paper"])
@pytest.mark.parametrize("prediction", ["closed_form", "monte_carlo"])
def test_every_parameter_gets_a_gradient(norm, variant, prediction):
    cfg = fpn_rcnn_cfg(norm, MODEL__KN__VARIANT=variant, MODEL__KN__PREDICTION=prediction)
    fpn = build_backbone(cfg)
    assert {name.split(".")[0] for name in kalman_layers(fpn)} == CONVS | {"bottom_up"}
    out = fpn(images())
    assert set(out.beliefs) == set(out)
    sum(level.square().mean() for level in out.values()).backward()
    for name, p in fpn.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name


def test_a_copy_runs_its_own_convolutions():
    fpn = build_backbone(fpn_rcnn_cfg("KN"))
    copied = copy.deepcopy(fpn)
    assert copied.lateral_convs[0] is copied.fpn_lateral5
    assert copied.output_convs[-1] is copied.fpn_output2
    assert copied.output_convs[-1] is not fpn.fpn_output2
    assert torch.equal(copied(images())["p2"], fpn(images())["p2"])


@pytest.mark.parametrize("norm", ["GN1", "BN"])
def test_with_another_norm_it_is_detectron2s(norm):
    fpn = build_backbone(fpn_rcnn_cfg("KN", MODEL__FPN__NORM=norm))
    assert type(fpn) is FPN
    assert not any(
        isinstance(m, (KalmanNorm2d, GroupKalmanNorm2d)) for m in fpn.fpn_output2.modules()
    )
    sum(level.mean() for level in fpn(images()).values()).backward()


def test_a_feature_without_a_belief_is_a_sentence():
    fpn = noise_fpn()
    del fpn.bottom_up.beliefs["res4"]
    with pytest.raises(InputError, match="ends before res4, .* set MODEL.FPN.NORM"):
        fpn(images())
    assert set(fpn.eval()(images())) == {"p3", "p4", "p5"}


def test_what_a_hook_has_kept_of_a_lateral_convolution_stays():
    fpn = noise_fpn().train()
    kept = []
    hook = fpn.fpn_lateral3.register_forward_hook(
        lambda conv, args, output: kept.append((output.value, output.value.clone()))
    )
    fpn(images())
    hook.remove()
    ((value, copied),) = kept
    assert torch.equal(value, copied)


def test_parts_in_evaluation():
    cfg = fpn_rcnn_cfg("KN", MODEL__FPN__NORM="KN")
    fpn = build_backbone(cfg)
    want = fpn.eval()(images())
    fpn.train()
    for part in (*fpn.bottom_up.children(), *(m for n, m in fpn.named_children() if "fpn" in n)):
        part.eval()
    got = fpn(images())
    assert set(got.beliefs) == set(got) == set(want)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value)
    fpn.bottom_up.eval()
    with pytest.raises(InputError, match=r"only bottom_up is in evaluation mode, call train\(\)"):
        fpn(images())


def test_a_chain_of_two_norms_is_refused():
    with pytest.raises(InputError, match="MODEL.FPN.NORM is 'GKN', but .*NORM 'KN': set both"):
        build_backbone(fpn_rcnn_cfg("KN", MODEL__FPN__NORM="GKN"))


@pytest.mark.parametrize("norm", ["KN", ""])
def test_retinanet_trains_and_detects(norm):
    stages = ["res3", "res4", "res5"]
    cfg = fpn_rcnn_cfg(
        norm or "KN",
        MODEL__META_ARCHITECTURE="RetinaNet",
        MODEL__BACKBONE__NAME="build_kn_retinanet_resnet_fpn_backbone",
        MODEL__RESNETS__OUT_FEATURES=stages,
        MODEL__FPN__IN_FEATURES=stages,
        MODEL__FPN__NORM=norm,
        MODEL__RETINANET__NUM_CLASSES=5,
        MODEL__RETINANET__SCORE_THRESH_TEST=0.0,
    )
    model = build_rcnn(cfg)
    assert set(model.backbone.output_shape()) == {"p3", "p4", "p5", "p6", "p7"}
    losses = train_step(model, rcnn_inputs())
    assert set(losses) == {"loss_cls", "loss_box_reg"}
    for name, p in model.named_parameters():
        assert p.grad is not None, name
    assert all(len(found) > 0 for found in detections(model, rcnn_inputs()))
