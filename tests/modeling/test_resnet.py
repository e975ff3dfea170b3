import copy
import functools

import pytest
import torch
from detectron2.layers import CNNBlockBase, FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling.backbone.resnet import ResNet
from torch import nn
from torch.utils.checkpoint import checkpoint

from kn_detectron import GroupKalmanNorm2d, InputError, KalmanNorm2d
from kn_detectron.layers import KN_STATE, kalman_layers, set_gain_scale
from kn_detectron.layers import belief as B
from kn_detectron.modeling import KNResNet

from ..models import build_backbone, images, randomize, resnet_cfg

ALL_STAGES = dict(MODEL__RESNETS__OUT_FEATURES=["stem", "res2", "res3", "res4", "res5"])
SMALL_DEPTH = dict(MODEL__RESNETS__RES2_OUT_CHANNELS=64, MODEL__RESNETS__STEM_OUT_CHANNELS=64)

NETWORKS = {
    "R18": dict(MODEL__RESNETS__DEPTH=18, **SMALL_DEPTH),
    "R34": dict(MODEL__RESNETS__DEPTH=34, **SMALL_DEPTH),
    "R50": {},
    "R50 torchvision": dict(MODEL__RESNETS__STRIDE_IN_1X1=False),
    "R101": dict(MODEL__RESNETS__DEPTH=101),
    "R152": dict(MODEL__RESNETS__DEPTH=152),
    "ResNeXt": dict(MODEL__RESNETS__NUM_GROUPS=4, MODEL__RESNETS__WIDTH_PER_GROUP=2),
    "DC5": dict(MODEL__RESNETS__RES5_DILATION=2),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_same_network_and_keys_as_detectron2(network):
    options = {**NETWORKS[network], **ALL_STAGES}
    theirs = randomize(build_backbone(resnet_cfg("BN", **options)))
    ours = build_backbone(
        resnet_cfg("KN", MODEL__KN__GAIN=1.0, MODEL__KN__LEARN_GAIN=False, **options)
    )
    own = {k for k in ours.state_dict() if k.rsplit(".", 1)[1] in KN_STATE}
    assert {k: v.shape for k, v in ours.state_dict().items() if k not in own} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    assert ours.output_shape() == theirs.output_shape()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    # In double, since rounding grows over 152 layers by an amount that differs between machines.
    ours, theirs, x = ours.double(), theirs.double(), images().double()
    # With gain 1 it is the same function in training, statistics and all, and then in evaluation.
    for training in (True, False):
        got, want = ours.train(training)(x), theirs.train(training)(x)
        for name in theirs.output_shape():
            assert (got[name] - want[name]).abs().max() < 1e-8 * want[name].abs().max(), name
    assert set(got) == set(want)  # no beliefs in evaluation


@pytest.mark.parametrize("variant", ["network", "paper"])
def test_at_gain_0_convolutions_absorb_their_norms(variant):
    """The same values, gradients and statistics, and fewer features are kept, than with hooks on
    the norms, which are called then."""
    cfg = resnet_cfg("KN", MODEL__KN__VARIANT=variant, MODEL__KN__PREDICTION="closed_form")
    backbone = randomize(build_backbone(cfg)).double()
    set_gain_scale(backbone, 0.0)
    twin = copy.deepcopy(backbone)
    called = []
    for layer in kalman_layers(twin).values():
        layer.register_forward_hook(lambda *_: called.append(1))
    results = []
    for network in (backbone, twin):
        kept = {}

        def note(t, kept=kept):
            kept[t.data_ptr()] = t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            y = network(images().double())["res4"]
        y.square().mean().backward()
        gradients = {name: p.grad for name, p in network.named_parameters()}
        results.append((y, gradients, dict(network.named_buffers()), sum(kept.values())))
    (y, gradients, buffers, kept), (twins_y, twins_gradients, twins_buffers, twins_kept) = results
    assert len(called) == len(kalman_layers(twin))
    torch.testing.assert_close(y, twins_y)
    torch.testing.assert_close(buffers, twins_buffers)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, twins_gradients[name], rtol=1e-6, atol=1e-9)
    assert kept < 0.8 * twins_kept


def test_observed_layers_are_absorbed_all_the_same():
    """The log of a training costs no memory for features at gain 0, and changes nothing."""
    backbone = randomize(build_backbone(resnet_cfg("KN"))).double()
    set_gain_scale(backbone, 0.0)
    x, kept, observed = images().double(), [], {}
    for listening in (False, True):
        if listening:
            for name, layer in kalman_layers(backbone).items():
                layer.observer = lambda *parts, name=name: observed.update({name: parts})
        seen = {}

        def note(t, seen=seen):
            seen[t.data_ptr()] = t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            y = backbone(x)["res4"]
        y.square().mean().backward()
        kept.append((sum(seen.values()), y, [p.grad.clone() for p in backbone.parameters()]))
        backbone.zero_grad()
    (elements, y, gradients), (observed_elements, observed_y, observed_gradients) = kept
    assert observed_elements == elements and torch.equal(observed_y, y)
    assert all(map(torch.equal, observed_gradients, gradients))

    # The innovations are those of the features in front of the norms, which a hook sees.
    want = {}

    def measure(layer, args, kwargs, name):
        want[name] = layer.innovation(args[0], kwargs["prior"])

    for name, layer in kalman_layers(backbone).items():
        layer.observer = None
        hook = functools.partial(measure, name=name)
        layer.register_forward_pre_hook(hook, with_kwargs=True)
    backbone(x)
    assert set(observed) == set(want) == set(kalman_layers(backbone))
    for name, parts in want.items():
        torch.testing.assert_close(observed[name], parts)


@pytest.mark.parametrize("norm", ["KN", "GKN"])
@pytest.mark.parametrize("variant", ["network", "paper"])
@pytest.mark.parametrize("prediction", ["closed_form", "monte_carlo"])
def test_every_parameter_gets_a_gradient(norm, variant, prediction):
    backbone = build_backbone(
        resnet_cfg(norm, MODEL__KN__VARIANT=variant, MODEL__KN__PREDICTION=prediction, **ALL_STAGES)
    )
    out = backbone(images())
    assert "res5" in out.beliefs
    sum(out[name].square().mean() for name in backbone.output_shape()).backward()
    # The last norm of a network hands its belief to nobody, but its scale and shift are used.
    for name, p in backbone.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name


@pytest.mark.parametrize(
    "depth, batch_norm, paper", [(50, 25_557_032, 25_583_580), (101, 44_549_160, 44_601_871)]
)
def test_parameter_counts_of_table_2(depth, batch_norm, paper):
    def count(norm, **kn):
        cfg = resnet_cfg(
            norm,
            MODEL__RESNETS__DEPTH=depth,
            MODEL__RESNETS__STEM_OUT_CHANNELS=64,
            MODEL__RESNETS__RES2_OUT_CHANNELS=256,
            MODEL__RESNETS__WIDTH_PER_GROUP=64,
            MODEL__RESNETS__OUT_FEATURES=["res5"],
            **kn,
        )
        features = sum(p.numel() for p in build_backbone(cfg).parameters())
        return features + 2048 * 1000 + 1000

    assert count("BN") == batch_norm
    # One R per channel and one q for every norm but the head of the chain.
    assert count("KN", MODEL__KN__VARIANT="paper") == paper
    assert [round(n / 1e6, 2) for n in (batch_norm, paper)] == {
        50: [25.56, 25.58],
        101: [44.55, 44.60],
    }[depth]
    # b and r per channel, q for every norm: about twice that.
    extra = {50: 2 * 26_560 + 53, 101: 2 * 52_672 + 104}[depth]
    assert count("KN") == batch_norm + extra


def test_classification_network():
    cfg = resnet_cfg("KN", **ALL_STAGES)
    backbone = build_backbone(cfg)
    net = KNResNet(
        backbone.stem,
        [list(stage) for stage in backbone.stages],
        num_classes=10,
        image_std=[1.0, 1.0, 1.0],
        chain=backbone.chain,
    )
    assert set(net(images())) == {"linear"} and net.eval()(images())["linear"].shape == (2, 10)


@pytest.mark.parametrize("variant", ["network", "paper"])
@pytest.mark.parametrize("freeze_at", range(6))
def test_freeze_at(variant, freeze_at):
    cfg = resnet_cfg(
        "KN", MODEL__BACKBONE__FREEZE_AT=freeze_at, MODEL__KN__VARIANT=variant, **ALL_STAGES
    )
    backbone = randomize(build_backbone(cfg))
    stages = [backbone.stem, *backbone.stages]
    for k, stage in enumerate(stages):
        frozen = k < freeze_at
        assert any(isinstance(m, FrozenBatchNorm2d) for m in stage.modules()) == frozen
        assert any(isinstance(m, KalmanNorm2d) for m in stage.modules()) != frozen
        assert not any(p.requires_grad for p in stage.parameters()) or not frozen
    before = copy.deepcopy(backbone.state_dict())
    out = backbone(images())
    if freeze_at < 5:
        sum(v.square().mean() for v in out.values()).backward()
    for name, p in backbone.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
    for k, stage in enumerate(["stem", "res2", "res3", "res4", "res5"]):
        moved = [
            not torch.equal(v, before[n])
            for n, v in backbone.state_dict().items()
            if n.startswith(stage) and "running" in n
        ]
        assert all(moved) if k >= freeze_at else not any(moved)


def test_the_chain_goes_through_frozen_stages():
    # The running statistics of a frozen norm are its posterior.
    cfg = resnet_cfg(
        "KN", MODEL__BACKBONE__FREEZE_AT=1, MODEL__RESNETS__OUT_FEATURES=["stem", "res2"]
    )
    backbone = randomize(build_backbone(cfg))
    norm = backbone.stem.conv1.norm
    want = B.relu(B.Belief(norm.bias[None], norm.weight.square()[None]))
    torch.testing.assert_close(backbone(images()).beliefs["stem"], want)
    cfg.MODEL.KN.VARIANT = "paper"
    backbone = randomize(build_backbone(cfg))
    norm = backbone.stem.conv1.norm
    want = B.relu(B.Belief(norm.running_mean[None], norm.running_var[None]))
    torch.testing.assert_close(backbone(images()).beliefs["stem"], want)


@pytest.mark.parametrize("variant", ["network", "paper"])
@pytest.mark.parametrize("gain", [0.0, 0.1])
def test_parts_in_evaluation_count_as_frozen(variant, gain):
    """People keep statistics by eval() of some stages, or of all norms, in a model that trains."""
    cfg = resnet_cfg(
        "KN",
        MODEL__KN__VARIANT=variant,
        MODEL__KN__GAIN=gain,
        MODEL__KN__LEARN_GAIN=False,
        MODEL__RESNETS__OUT_FEATURES=["res2", "res3"],
    )
    backbone = randomize(build_backbone(cfg))
    want = backbone.eval()(images())["res2"]
    before = {name: b.clone() for name, b in backbone.named_buffers()}
    backbone.train()
    for part in (backbone.stem, backbone.res2):
        part.eval()
    got = backbone(images())
    torch.testing.assert_close(got["res2"], want)
    got["res3"].sum().backward()
    assert backbone.res2[0].conv1.weight.grad is not None
    moved = {name for name, b in backbone.named_buffers() if not torch.equal(b, before[name])}
    assert all(name.startswith("res3.") for name in moved)
    assert all(f"res3.{i}.conv{k}.norm.running_mean" in moved for i in range(4) for k in (1, 2, 3))


def test_all_norms_in_evaluation():
    backbone = randomize(build_backbone(resnet_cfg("KN")))
    want = backbone.eval()(images())["res4"]
    backbone.train()
    for norm in backbone.modules():
        if isinstance(norm, KalmanNorm2d):
            norm.eval()
    torch.testing.assert_close(backbone(images())["res4"], want)


def test_a_part_in_training_behind_a_backbone_in_evaluation():
    backbone = build_backbone(resnet_cfg("KN")).eval()
    backbone.res4.train()
    with pytest.raises(InputError, match=r"the backbone, .* in evaluation mode .* call train\(\)"):
        backbone(images())


def priors_of(backbone, x):
    """The prior that each KN layer is given in one forward pass."""
    priors, hooks = {}, []
    for name, layer in kalman_layers(backbone).items():

        def record(module, args, kwargs, name=name):
            priors[name] = kwargs["prior"]

        hooks.append(layer.register_forward_pre_hook(record, with_kwargs=True))
    backbone(x)
    for hook in hooks:
        hook.remove()
    return priors


def test_chain_of_a_bottleneck_stage_by_hand():
    cfg = resnet_cfg("KN", MODEL__RESNETS__OUT_FEATURES=["res2"])
    backbone = randomize(build_backbone(cfg))
    priors = priors_of(backbone, images())
    relu = B.relu

    def passed_on(norm):
        return B.normalized(norm.weight, norm.bias)

    image = B.Belief(torch.zeros(1, 3), torch.tensor([cfg.MODEL.KN.IMAGE_STD]).square())
    want = {"stem.conv1.norm": B.conv2d(image, backbone.stem.conv1.weight)}
    source = relu(passed_on(backbone.stem.conv1.norm))
    for i, block in enumerate(backbone.res2):
        name = f"res2.{i}"
        shortcut = source
        if block.shortcut is not None:
            want[f"{name}.shortcut.norm"] = B.conv2d(source, block.shortcut.weight)
            shortcut = passed_on(block.shortcut.norm)
        for k, conv in enumerate([block.conv1, block.conv2, block.conv3], start=1):
            want[f"{name}.conv{k}.norm"] = B.conv2d(source, conv.weight)
            source = relu(passed_on(conv.norm))
        source = relu(B.add(passed_on(block.conv3.norm), shortcut))
    assert set(want) == set(priors)
    for name, belief in want.items():
        torch.testing.assert_close(priors[name], belief, msg=name)


def test_closed_form_agrees_with_monte_carlo_in_every_layer():
    exact = randomize(build_backbone(resnet_cfg("KN", MODEL__RESNETS__OUT_FEATURES=["res3"])))
    cfg = resnet_cfg(
        "KN",
        MODEL__RESNETS__OUT_FEATURES=["res3"],
        MODEL__KN__PREDICTION="monte_carlo",
        MODEL__KN__MONTE_CARLO_SIZE=160,
    )
    sampled = randomize(build_backbone(cfg))
    torch.manual_seed(0)
    got, want = priors_of(sampled, images()), priors_of(exact, images())
    for name in want:
        std = want[name].var.sqrt()
        assert ((got[name].mean - want[name].mean).abs() < 0.1 * std).all(), name
        # The map's border, where taps fall outside, is in the sample.
        assert ((got[name].var / want[name].var).log().abs() < 0.15).all(), name


def test_network_priors_do_not_depend_on_the_images():
    backbone = randomize(build_backbone(resnet_cfg("KN")))
    a, b = priors_of(backbone, images(2, 64, seed=1)), priors_of(
        backbone, 3 * images(1, 96, seed=2)
    )
    for name in a:
        assert torch.equal(a[name].mean, b[name].mean) and torch.equal(a[name].var, b[name].var)


def test_at_gain_0_training_is_inference_and_batches_do_not_matter():
    backbone = randomize(build_backbone(resnet_cfg("KN")))
    set_gain_scale(backbone, 0.0)
    x = images(3)
    together = backbone(x)["res4"]
    alone = torch.cat([backbone(image[None])["res4"] for image in x])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(backbone.eval()(x)["res4"], together, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", ["KN", "GKN"])
@pytest.mark.parametrize("variant", ["network", "paper"])
def test_activation_checkpointing(norm, variant):
    backbone = build_backbone(resnet_cfg(norm, MODEL__KN__VARIANT=variant))
    other = copy.deepcopy(backbone)
    for stage in other.stages:
        for k, block in enumerate(stage):
            block.forward = lambda x, f=block.forward: checkpoint(f, x, use_reentrant=False)
    backbone(images())["res4"].square().mean().backward()
    other(images())["res4"].square().mean().backward()
    for (name, p), q in zip(backbone.named_parameters(), other.parameters()):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


@pytest.mark.parametrize("norm", ["KN", "GKN"])
def test_two_calls_in_one_step_and_deepcopy(norm):
    backbone = build_backbone(resnet_cfg(norm))
    loss = sum(backbone(images(seed=s))["res4"].square().mean() for s in range(2))
    loss.backward()
    copied = copy.deepcopy(backbone)
    assert torch.equal(copied(images())["res4"], backbone(images())["res4"])


@pytest.mark.parametrize("statistics", ["moving", "batch"])
def test_option_b_predicts_in_evaluation(statistics):
    cfg = resnet_cfg("KN", MODEL__KN__EVAL_STATISTICS=statistics)
    backbone = build_backbone(cfg)
    trained = backbone(images())["res4"]
    out = backbone.eval()(images())
    assert ("res4" in out.beliefs) == (statistics == "batch")
    assert torch.allclose(out["res4"], trained, atol=1e-4) == (statistics == "batch")


def test_gkn_layers_are_built_with_the_configured_groups():
    layers = kalman_layers(build_backbone(resnet_cfg("GKN", MODEL__KN__NUM_GROUPS=2)))
    assert all(isinstance(m, GroupKalmanNorm2d) and m.num_groups == 2 for m in layers.values())


def test_config_reaches_the_layers():
    cfg = resnet_cfg(
        "KN",
        MODEL__KN__GAIN=0.25,
        MODEL__KN__LEARN_GAIN=False,
        MODEL__KN__PROCESS_MODEL=False,
        MODEL__KN__PRIOR_GRADIENT=False,
        MODEL__KN__IMAGE_STD=[10.0, 20.0, 30.0],
        MODEL__PIXEL_STD=[1.0, 2.0, 5.0],
    )
    backbone = build_backbone(cfg)
    assert torch.equal(backbone.image.belief().var, torch.tensor([[100.0, 100.0, 36.0]]))
    for layer in kalman_layers(backbone).values():
        assert layer.gain.item() == pytest.approx(0.25)
        assert not layer.has_process_model and not layer.prior_gradient
        assert {n for n, _ in layer.named_parameters()} == {"weight", "bias"}


@pytest.mark.parametrize(
    "options, sentence",
    [
        (
            dict(MODEL__RESNETS__DEFORM_ON_PER_STAGE=[False, True, False, False]),
            "DEFORM_ON_PER_STAGE asks",
        ),
        (dict(MODEL__RESNETS__DEPTH=20), "DEPTH is 20, but must be one of 18, 34"),
        (dict(MODEL__RESNETS__RES5_DILATION=3), "RES5_DILATION is 3"),
        (dict(MODEL__KN__NETWORK_WEIGHTS="r50.pth"), "NETWORK_WEIGHTS is r50.pth, but is only for"),
        (dict(MODEL__RESNETS__DEPTH=18), "RES2_OUT_CHANNELS is 16, but must be 64"),
        (
            dict(
                MODEL__RESNETS__DEPTH=18,
                MODEL__RESNETS__RES2_OUT_CHANNELS=64,
                MODEL__RESNETS__NUM_GROUPS=4,
            ),
            "NUM_GROUPS is 4, but must be 1",
        ),
        (
            dict(
                MODEL__RESNETS__DEPTH=18,
                MODEL__RESNETS__RES2_OUT_CHANNELS=64,
                MODEL__RESNETS__RES5_DILATION=2,
            ),
            "RES5_DILATION is 2, but must be 1",
        ),
        (dict(MODEL__RESNETS__NORM="GN"), "NORM is 'GN'"),
        (
            dict(MODEL__RESNETS__NORM="GKN", MODEL__KN__NUM_GROUPS=3),
            "NUM_GROUPS is 3, which does not divide",
        ),
        (
            dict(MODEL__RESNETS__NORM="GKN", MODEL__KN__NUM_GROUPS=32),
            "NUM_GROUPS is 32, .* a layer of 8 channels: .* such as 8 for this one",
        ),
    ],
)
def test_what_it_refuses(options, sentence):
    with pytest.raises(InputError, match=sentence):
        build_backbone(resnet_cfg("KN", **options))


def test_it_is_a_detectron2_resnet():
    backbone = build_backbone(resnet_cfg("KN"))
    assert isinstance(backbone, ResNet) and backbone.image.belief().var.shape == (1, 3)
    assert backbone.output_shape()["res4"] == ShapeSpec(channels=64, stride=16)


@pytest.mark.parametrize("gain", [0.1, 0.0])
@pytest.mark.parametrize("norm, statistics", [("KN", "moving"), ("KN", "batch"), ("GKN", "moving")])
def test_training_and_evaluation_have_the_same_keys_and_call_the_same_modules(
    norm, statistics, gain
):
    """Beliefs are no features, and a hook on a module does not depend on the mode."""
    cfg = resnet_cfg(norm, MODEL__KN__EVAL_STATISTICS=statistics, **ALL_STAGES)
    cfg.MODEL.KN.GAIN, cfg.MODEL.KN.LEARN_GAIN = gain, gain > 0
    backbone = build_backbone(cfg)
    called = []
    types = {}

    def note(module, args, output, name):
        called.append(name)
        types.setdefault(module.training, set()).update((type(args[0]), type(output)))

    for name, module in backbone.named_modules():
        if not list(module.children()) or isinstance(module, (nn.Conv2d, CNNBlockBase)):
            module.register_forward_hook(functools.partial(note, name=name))
    calls = []
    for training in (True, False):
        called.clear()
        out = backbone.train(training)(images())
        assert set(out) == set(backbone.output_shape())
        assert all(isinstance(feature, torch.Tensor) for feature in out.values())
        calls.append(list(called))
    assert calls[0] == calls[1]
    convs = [name for name, module in backbone.named_modules() if isinstance(module, nn.Conv2d)]
    assert set(convs) <= set(calls[0])
    if not backbone.chain.predicts_in_evaluation:  # as in any other network
        assert types[False] == {torch.Tensor}


def test_a_backbone_that_gets_its_values_later():
    cfg = resnet_cfg(MODEL__KN__GAIN=0.0, MODEL__KN__LEARN_GAIN=False)
    want = build_backbone(cfg).train()
    with torch.device("meta"):
        late = build_backbone(cfg)
    late.to_empty(device="cpu").load_state_dict(want.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(dict(late.train()(images())), dict(want(images())))
