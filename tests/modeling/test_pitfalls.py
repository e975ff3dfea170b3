"""What goes wrong around normalisation layers in detectron2, one by one."""

import pickle

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import FrozenBatchNorm2d
from detectron2.solver import build_optimizer
from detectron2.utils.events import EventStorage
from fvcore.nn.precise_bn import get_bn_modules, update_bn_stats
from torch import nn

from kn_detectron import KalmanNorm2d
from kn_detectron.layers import KN_STATE, kalman_layers

from ..models import (
    build_backbone,
    build_rcnn,
    images,
    randomize,
    rcnn_cfg,
    rcnn_inputs,
    resnet_cfg,
)


def test_1_freeze_converts_kalman_norms():
    backbone = randomize(build_backbone(resnet_cfg("KN")))
    x, want = images(), backbone.eval()(images())["res4"]
    for stage in [backbone.stem, *(block for stage in backbone.stages for block in stage)]:
        stage.freeze()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in backbone.modules())
    assert not any(p.requires_grad for p in backbone.parameters())
    torch.testing.assert_close(backbone.eval()(x)["res4"], want)
    torch.testing.assert_close(backbone.train()(x)["res4"], want)  # statistics do not move


@pytest.mark.parametrize("norm", ["KN", "GKN"])
def test_2_filter_parameters_get_the_weight_decay_of_norms(norm):
    model = build_rcnn(rcnn_cfg(norm))
    cfg = rcnn_cfg(norm, SOLVER__WEIGHT_DECAY=0.5, SOLVER__WEIGHT_DECAY_NORM=0.25)
    decay = {}
    for group in build_optimizer(cfg, model).param_groups:
        decay.update({id(p): group["weight_decay"] for p in group["params"]})
    own = [p for n, p in model.named_parameters() if n.rsplit(".", 1)[1] in KN_STATE]
    assert len(own) == 53 * 3
    assert {decay[id(p)] for p in own} == {0.25}
    assert decay[id(model.backbone.stem.conv1.weight)] == 0.5


def test_3_precise_bn_sets_the_statistics_of_a_prior_and_a_batch():
    backbone = randomize(build_backbone(resnet_cfg("KN", MODEL__RESNETS__OUT_FEATURES=["stem"])))
    norm = backbone.stem.conv1.norm
    assert norm in get_bn_modules(backbone)
    x = images(4)
    update_bn_stats(backbone, [x] * 5, num_iters=5)
    assert norm.momentum == 0.1
    # All batches are the same, so their statistics are the posterior of this one: the output in
    # evaluation is that in training, up to Bessel's correction of a part that is not unbiased.
    got, want = backbone.eval()(x)["stem"], backbone.train()(x)["stem"]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_4_empty_batches_stay_connected():
    backbone = build_backbone(resnet_cfg("KN", MODEL__RESNETS__OUT_FEATURES=["res2"]))
    out = backbone(torch.zeros(0, 3, 64, 64))["res2"]
    assert out.shape == (0, 16, 16, 16)
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in backbone.parameters())


def test_5_blocks_work_in_place():
    # relu_ and += after the norm must not change what its backward reads.
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    norm = KalmanNorm2d(4, gain=None).double()
    weight = torch.randn(2, 4, 5, 5, dtype=torch.float64)

    def in_place(x):
        y = norm(x)
        y += x
        return (y.relu_() * weight).sum()

    assert torch.autograd.gradcheck(in_place, (x,))


# 6, DDP, is in test_ddp.py.


@pytest.mark.parametrize("norm", ["KN", "GKN"])
@pytest.mark.parametrize("variant", ["network", "paper"])
def test_7_mixed_precision_training_step(norm, variant):
    model = build_rcnn(rcnn_cfg(norm, MODEL__KN__VARIANT=variant))
    with EventStorage(), torch.autocast("cpu", dtype=torch.bfloat16):
        features = model.backbone(images())
        loss = features["res4"].float().square().mean()
    assert features["res4"].dtype == torch.bfloat16
    assert features.beliefs["res4"].mean.dtype == torch.float32
    loss.backward()
    for name, p in model.backbone.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
    for layer in kalman_layers(model.backbone).values():
        assert all(b.isfinite().all() and b.dtype != torch.bfloat16 for b in layer.buffers())


def test_8_detectron2_renames_no_filter_parameter(tmp_path):
    # Weights in a .pkl go through detectron2's name matching, which rewrites what it takes for
    # Caffe2's names, and matches res5 by suffix both in the backbone and in the head.
    model = randomize(build_rcnn(rcnn_cfg("KN")))
    weights = {}
    for name, value in model.state_dict().items():
        for prefix in ("backbone.", "roi_heads."):
            if name.startswith(prefix + "res") or name.startswith(prefix + "stem"):
                weights[name[len(prefix) :]] = value.numpy()
    path = tmp_path / "R-50-KN.pkl"
    content = {"model": weights, "__author__": "test", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content))
    other = build_rcnn(rcnn_cfg("KN"), seed=1)
    DetectionCheckpointer(other).load(str(path))
    for name, value in other.state_dict().items():
        if name.rsplit(".", 1)[-1] in KN_STATE:
            assert torch.equal(value, model.state_dict()[name]), name


def test_9_the_evaluation_model_exports():
    backbone = randomize(build_backbone(resnet_cfg("KN"))).eval()
    program = torch.export.export(backbone, (images(),))
    torch.testing.assert_close(program.module()(images())["res4"], backbone(images())["res4"])


def test_10_fusing_and_converting():
    conv, norm = nn.Conv2d(3, 4, 3), randomize(KalmanNorm2d(4)).eval()
    fused = nn.utils.fuse_conv_bn_eval(conv.eval(), norm)
    torch.testing.assert_close(fused(images()), norm(conv(images())), rtol=1e-4, atol=1e-3)
    # Converted to SyncBatchNorm a chain is no chain: it must not go unnoticed.
    backbone = nn.SyncBatchNorm.convert_sync_batchnorm(build_backbone(resnet_cfg("KN")))
    with pytest.raises(TypeError, match="convert_sync_batchnorm must not be applied"):
        backbone(images())


def test_11_buffers_hold_nothing_transient():
    backbone = build_backbone(resnet_cfg("KN"))
    expected = {"running_mean", "running_var", "num_batches_tracked", "gain_scale"}
    before = {n for n, _ in backbone.named_buffers()}
    backbone(images())
    assert {n for n, _ in backbone.named_buffers()} == before
    for layer in kalman_layers(backbone).values():
        assert {n for n, _ in layer.named_buffers()} == expected


def test_12_no_module_is_registered_twice():
    backbone = build_backbone(resnet_cfg("KN"))
    tensors = [*backbone.parameters(), *backbone.buffers()]
    named = [
        *backbone.named_parameters(remove_duplicate=False),
        *backbone.named_buffers(remove_duplicate=False),
    ]
    assert len(tensors) == len(named)
    assert len({t.data_ptr() for _, t in named}) == len(named)


def test_frozen_batch_norm_of_the_whole_model_is_inference():
    model = randomize(build_rcnn(rcnn_cfg("KN"))).eval()
    with torch.no_grad():
        want = model(rcnn_inputs())
        got = FrozenBatchNorm2d.convert_frozen_batchnorm(model)(rcnn_inputs())
    for a, b in zip(got, want):
        torch.testing.assert_close(a["instances"].scores, b["instances"].scores)
