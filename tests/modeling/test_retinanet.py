import copy
import pickle

import detectron2.layers
import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn.utils import prune

from kn_detectron import InputError, registration
from kn_detectron.checkpoint import KNCheckpointer, calibrate
from kn_detectron.layers import KN_STATE, build_transition, kalman_layers, set_gain_scale
from kn_detectron.layers import belief as B
from kn_detectron.modeling import KNFPN, ChainConfig, Feature, KNRetinaNet, KNRetinaNetHead

from ..models import build_rcnn, images, randomize, rcnn_inputs, retinanet_cfg
from .test_fpn import Noise, assert_true_of
from .test_roi_heads import NORM_AND_VARIANT, detections, train_step

LEVELS = ["p3", "p4", "p5", "p6", "p7"]
TOWERS = ("cls_subnet", "bbox_subnet")
# Of two convolutions in each of the two towers, one for each level.
LAYERS = {f"head.{t}.{i}.{level}" for t in TOWERS for i in (1, 4) for level in range(len(LEVELS))}
PER_LEVEL = hasattr(detectron2.layers, "CycleBatchNormList")


def model_of(norm, seed=0, **options):
    return randomize(build_rcnn(retinanet_cfg(norm, **options), seed))


def tower_inputs(model, x):
    """What goes into the towers: the levels, with their beliefs."""
    features = model.backbone(x)
    return [features[name] for name in model.head_in_features]


def priors_of(head):
    """A dict that a forward pass fills with the prior of each layer, by its name in the head."""
    priors = {}
    for name, layer in kalman_layers(head).items():
        layer.register_forward_pre_hook(
            lambda m, args, kwargs, name=name: priors.update({name: kwargs.get("prior")}),
            with_kwargs=True,
        )
    return priors


def assert_same_detections(got, want):
    for one, other in zip(got, want, strict=True):
        assert len(other) > 0
        torch.testing.assert_close(one.pred_boxes.tensor, other.pred_boxes.tensor)
        torch.testing.assert_close(one.scores, other.scores)
        assert torch.equal(one.pred_classes, other.pred_classes)


# Towers by torch's own functions.


def tower_by_torch(tower, x, level, normalize):
    for i in (0, 3):
        conv, norms = tower[i], tower[i + 1]
        x = F.conv2d(x, conv.weight, conv.bias, padding=1)
        x = normalize(x, norms, level).relu()
    return x


def with_running_statistics(x, norms, level):
    layer = norms[level]
    return F.batch_norm(x, layer.running_mean, layer.running_var, norms.weight, norms.bias)


def with_statistics_of_the_batch(x, norms, level):
    return F.batch_norm(x, None, None, norms.weight, norms.bias, training=True)


def head_by_torch(head, features, normalize):
    logits, deltas = [], []
    for level, x in enumerate(features):
        logits.append(head.cls_score(tower_by_torch(head.cls_subnet, x, level, normalize)))
        deltas.append(head.bbox_pred(tower_by_torch(head.bbox_subnet, x, level, normalize)))
    return logits, deltas


def assert_close_maps(got, want):
    for one, other in zip(sum(got, []), sum(want, []), strict=True):
        scale = other.abs().max()
        assert scale > 0
        torch.testing.assert_close(one / scale, other / scale, rtol=0, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 3])
def test_towers_at_gain_0_are_those_with_the_statistics_of_each_level(batch):
    frozen = model_of("FrozenBN", MODEL__RETINANET__NORM="")
    model = model_of("KN", seed=1)
    model.backbone.load_state_dict(frozen.backbone.state_dict(), strict=False)
    want_head = copy.deepcopy(model.head)
    changes = calibrate(model)
    assert set(changes) == set(kalman_layers(model)) and LAYERS < set(changes)
    set_gain_scale(model, 0.0)
    x = images(batch, 128)
    with torch.no_grad():
        features = list(frozen.backbone(x)[name] for name in LEVELS)
        want = head_by_torch(want_head, features, with_running_statistics)
        assert_close_maps(model.train().head(tower_inputs(model, x)), want)
        assert_close_maps(model.eval().head(tower_inputs(model, x)), want)


def test_statistics_of_a_layer_are_those_of_its_level():
    model = model_of("KN", MODEL__KN__GAIN=1.0, MODEL__KN__LEARN_GAIN=False)
    for layer in kalman_layers(model).values():
        layer.momentum = 1.0
    measured = {}

    def normalize(x, norms, level):
        measured.setdefault(norms, {})[level] = torch.var_mean(x, (0, 2, 3))
        return with_statistics_of_the_batch(x, norms, level)

    with torch.no_grad():
        features = tower_inputs(model.train(), images(2, 256))
        for level in (1, 0):  # a level that was seen alone changes no other's place
            model.head._run(model.head.cls_subnet, model.head._as_source(features[level]), level)
        found = model.head(features)
        values = [feature.value for feature in features]
        assert_close_maps(found, head_by_torch(model.head, values, normalize))
    assert len(measured) == 4
    for norms, levels in measured.items():
        for level, (var, mean) in levels.items():
            torch.testing.assert_close(norms[level].running_mean, mean, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(norms[level].running_var, var, rtol=2e-2, atol=1e-4)
            for other, (var, mean) in levels.items():
                if other != level:
                    difference = (norms[level].running_mean - mean).abs() / var.sqrt()
                    assert difference.max() > 0.02


def test_a_level_has_the_prior_of_its_belief():
    model = model_of("KN").train()
    priors = priors_of(model.head)
    features = tower_inputs(model, images())
    model.head(features)
    assert {f"head.{name}" for name in priors} == LAYERS
    firsts = set()
    for tower in TOWERS:
        layers = getattr(model.head, tower)
        for level, feature in enumerate(features):
            first, second = (priors[f"{tower}.{i}.{level}"] for i in (1, 4))
            want = B.conv2d(feature.belief, layers[0].weight, layers[0].bias)
            torch.testing.assert_close(first, want)
            behind = B.relu(B.normalized(layers[1].weight, layers[1].bias))
            torch.testing.assert_close(second, B.conv2d(behind, layers[3].weight, layers[3].bias))
            firsts.add(first.mean[0, 0].item())
    assert len(firsts) == len(TOWERS) * len(LEVELS)


def test_belief_of_the_towers_is_true_of_gaussian_features():
    chain = ChainConfig(gain=1.0, learn_gain=False, process_model=False)
    torch.manual_seed(0)
    shape = [detectron2.layers.ShapeSpec(channels=4, stride=8)]
    options = dict(input_shape=shape, num_classes=2, num_anchors=1, conv_dims=[8])
    head = randomize(KNRetinaNetHead(chain=chain, **options))
    belief = B.Belief(torch.randn(1, 4), torch.rand(1, 4) + 0.5)
    noise = torch.randn(2, 4, 200, 200)
    x = Feature(belief.mean.view(1, 4, 1, 1) + belief.var.sqrt().view(1, 4, 1, 1) * noise, belief)
    conv, norms = head.cls_subnet[0], head.cls_subnet[1]
    torch.nn.init.normal_(conv.weight)
    priors = priors_of(head)
    y = norms(x, 0, conv)
    assert_true_of(priors["cls_subnet.1.0"], conv(x.value))
    assert_true_of(y.belief, y.value)


@pytest.mark.parametrize("norm", ["KN", "GKN"])
@pytest.mark.parametrize("variant", ["network", "paper"])
def test_belief_behind_scale_and_shift(norm, variant):
    """The network variant's is about what the next convolution gets, the paper's is not."""
    model = model_of(norm, MODEL__KN__VARIANT=variant)
    norms, conv = model.head.cls_subnet[1], model.head.cls_subnet[0]
    x = tower_inputs(model.train(), images())[0]
    before = norms(x, 0, conv).belief
    with torch.no_grad():
        norms.weight.mul_(3)
        norms.bias.add_(2)
        weight, bias = norms.weight / 3, norms.bias - 2
    after = norms(x, 0, conv).belief
    if variant == "paper":
        torch.testing.assert_close(after, before)
    else:
        plain = (before.mean - bias) / weight
        torch.testing.assert_close(after.mean, plain * norms.weight + norms.bias)
        torch.testing.assert_close(after.var, 9 * before.var)


# P6 and P7.


@pytest.mark.parametrize("source", ["res4", "p4"])
def test_p6_and_p7_have_the_predictions(source):
    torch.manual_seed(0)
    chain = ChainConfig(gain=1.0, learn_gain=False, process_model=False)
    top = LastLevelP6P7(4 if source == "res4" else 6, 6, source)
    fpn = randomize(KNFPN(Noise(), ["res3", "res4"], 6, chain=chain, top_block=top))
    out = fpn(images())
    below = fpn.bottom_up.truth["res4"] if source == "res4" else out.beliefs["p4"]
    assert set(out.beliefs) == {"p3", "p4", "p5", "p6"}  # res4 is the last stage here
    if source == "res4":  # of independent Gaussian pixels
        assert_true_of(out.beliefs["p5"], out["p5"])
    # What is predicted takes the pixels for independent: by sampling such.
    with torch.no_grad():
        for belief, conv, name in (
            (below, top.p6, "p5"),
            (out.beliefs["p5"], top.p7, "p6"),
        ):
            shape = 1, conv.in_channels, 600, 600
            mean, std = belief.mean[..., None, None], belief.var.sqrt()[..., None, None]
            sample = mean + std * torch.randn(shape)
            assert_true_of(out.beliefs[name], conv(sample.relu() if name == "p6" else sample))


def test_sampled_beliefs_of_p6_and_p7_are_those_of_the_closed_form():
    beliefs = []
    for transition in (build_transition("closed_form"), build_transition("monte_carlo", 256)):
        torch.manual_seed(0)
        chain = ChainConfig(gain=1.0, learn_gain=False, process_model=False, transition=transition)
        top = LastLevelP6P7(4, 6, "res4")
        fpn = randomize(KNFPN(Noise(), ["res3", "res4"], 6, chain=chain, top_block=top))
        with torch.no_grad():
            beliefs.append(fpn(images()).beliefs)
    want, got = beliefs
    for name in ("p5", "p6"):
        std = want[name].var.sqrt()
        assert ((got[name].mean - want[name].mean).abs() < 0.05 * std).all()
        torch.testing.assert_close(got[name].var, want[name].var, rtol=0.05, atol=0)


# Training and inference.


@NORM_AND_VARIANT
@pytest.mark.parametrize("prediction", ["closed_form", "monte_carlo"])
def test_training_step_and_inference(norm, variant, prediction):
    options = dict(MODEL__KN__VARIANT=variant, MODEL__KN__PREDICTION=prediction)
    model = model_of(norm, **options)
    assert isinstance(model, KNRetinaNet)
    assert LAYERS <= set(kalman_layers(model))
    for gain_scale in (1.0, 0.0):
        set_gain_scale(model, gain_scale)
        model.zero_grad()
        losses = train_step(model, rcnn_inputs())
        assert set(losses) == {"loss_cls", "loss_box_reg"}
        assert all(0 <= loss < 100 for loss in losses.values())
        for name, p in model.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all(), name
    assert all(len(found) > 0 for found in detections(model, rcnn_inputs()))


@pytest.mark.parametrize("norm", ["KN", "GKN"])
@pytest.mark.parametrize("objects", [0, 2])
def test_one_image_with_and_without_ground_truth(norm, objects):
    model = model_of(norm)
    losses = train_step(model, rcnn_inputs(1, objects=objects))
    assert all(torch.tensor(v).isfinite() for v in losses.values())
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name


@pytest.mark.parametrize("norm", ["KN", "GKN"])
def test_mixed_precision_training_step(norm):
    model = model_of(norm)
    priors = priors_of(model.head)
    with EventStorage(), torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model.train()(rcnn_inputs())
    assert all(prior.mean.dtype == torch.float32 for prior in priors.values())
    sum(losses.values()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name


@pytest.mark.parametrize("gain", [0.1, 0.0])
@pytest.mark.parametrize("norm", ["KN", "GKN"])
def test_hooks_on_the_convolutions_of_the_towers_are_called_in_training(norm, gain):
    """As torch's pruning does it, whose hook makes the weight before each call."""
    model = model_of(norm, MODEL__KN__GAIN=gain, MODEL__KN__LEARN_GAIN=gain > 0)
    levels = tower_inputs(model.train(), images(1, 64))
    tower = model.head.cls_subnet
    before, _ = model.head(levels)
    for i in (0, 3):
        prune.random_unstructured(tower[i], "weight", amount=0.5)
        with torch.no_grad():
            tower[i].weight_orig.zero_()  # of which the next call makes its weight
    after, _ = model.head(levels)
    assert all((tower[i].weight == 0).all() for i in (0, 3))
    assert not any(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("gain", [0.1, 0.0])
def test_a_hook_on_a_convolution_of_the_towers_sees_its_output_in_both_modes(gain):
    model = model_of("KN", MODEL__KN__GAIN=gain, MODEL__KN__LEARN_GAIN=gain > 0)
    conv, seen, x = model.head.cls_subnet[0], [], images()
    conv.register_forward_hook(lambda conv, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        model.train().head(tower_inputs(model, x))
        model.eval().head(list(model.backbone(x)[name] for name in LEVELS))
        for given, output in seen:
            if isinstance(given, Feature):
                given, output = given.value, output.value
            torch.testing.assert_close(output, F.conv2d(given, conv.weight, conv.bias, padding=1))
    assert len(seen) == 2 * len(LEVELS)


def test_evaluation_with_moving_statistics_needs_no_belief():
    model = model_of("KN").eval()
    priors = priors_of(model.head)
    assert not model.backbone(images()).beliefs
    features = list(model.backbone(images())[name] for name in LEVELS)
    want = head_by_torch(model.head, features, with_running_statistics)
    assert_close_maps(model.head(features), want)
    assert set(priors.values()) == {None}


@pytest.mark.parametrize("norm, statistics", [("KN", "batch"), ("GKN", "moving")])
def test_evaluation_with_the_statistics_of_the_images(norm, statistics):
    model = model_of(norm, MODEL__KN__EVAL_STATISTICS=statistics)
    with torch.no_grad():
        want = model.train().head(tower_inputs(model, images()))
        got = model.eval().head(tower_inputs(model, images()))
    assert_close_maps(got, want)


def test_frozen_batch_norm_of_the_whole_model_is_inference():
    model = model_of("KN").eval()
    want = detections(model, rcnn_inputs())
    model = FrozenBatchNorm2d.convert_frozen_batchnorm(model)
    assert_same_detections(detections(model, rcnn_inputs()), want)
    train_step(model, rcnn_inputs())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_models_of_their_own(copied):
    model = model_of("KN")
    other = copied(model)
    assert other.head_in_features == model.head_in_features
    want = train_step(model, rcnn_inputs())
    assert train_step(other, rcnn_inputs()) == want
    for name, value in other.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    with torch.no_grad():
        other.head.cls_subnet[1].weight.zero_()
    assert model.head.cls_subnet[1].weight.all()


# What it is built of, and what it refuses.


def test_the_log_says_nothing_of_layers_without_priors(caplog, monkeypatch):
    monkeypatch.setattr(registration, "_told", set())
    build_rcnn(retinanet_cfg("KN"))
    assert "passes them a prior" not in caplog.text
    build_rcnn(retinanet_cfg("KN", MODEL__META_ARCHITECTURE="RetinaNet"))
    assert "passes them a prior" in caplog.text and "MODEL.META_ARCHITECTURE" in caplog.text


@pytest.mark.parametrize("norm", ["", "GN1"])
def test_with_another_norm_it_is_detectron2s(norm):
    model = build_rcnn(retinanet_cfg("KN", MODEL__RETINANET__NORM=norm))
    assert type(model.head) is RetinaNetHead
    train_step(model, rcnn_inputs())
    assert LAYERS.isdisjoint(calibrate(model))
    assert all(len(found) > 0 for found in detections(model, rcnn_inputs()))


def test_an_fpn_without_norms_hands_beliefs_on_too():
    train_step(build_rcnn(retinanet_cfg("KN", MODEL__FPN__NORM="")), rcnn_inputs())


def test_no_beliefs_is_a_sentence():
    model = build_rcnn(retinanet_cfg("KN", MODEL__FPN__NORM="GN1"))
    with pytest.raises(InputError, match="of which there are none: set .* MODEL.FPN.NORM"):
        train_step(model, rcnn_inputs())
    assert all(len(found) > 0 for found in detections(model, rcnn_inputs()))


def test_a_chain_of_two_norms_is_refused():
    with pytest.raises(InputError, match="MODEL.RETINANET.NORM is 'GKN', but .*NORM 'KN'"):
        build_rcnn(retinanet_cfg("KN", MODEL__RETINANET__NORM="GKN"))


def test_a_converted_head_is_a_sentence():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(build_rcnn(retinanet_cfg("KN")))
    with pytest.raises(TypeError, match="convert_sync_batchnorm must not be applied"):
        train_step(model, rcnn_inputs())


# Checkpoints.


def own_keys(state):
    return {name for name in state if name.rpartition(".")[2] in KN_STATE}


def test_same_model_as_detectron2s_with_batch_norm():
    theirs, ours = model_of("BN"), build_rcnn(retinanet_cfg("KN"), seed=1)
    state = theirs.state_dict()
    if PER_LEVEL:
        assert {k: v.shape for k, v in ours.state_dict().items() if k not in own_keys([k])} == {
            k: v.shape for k, v in state.items()
        }
    ours.load_state_dict(state, strict=True)
    assert_same_detections(detections(ours, rcnn_inputs()), detections(theirs, rcnn_inputs()))
    for i in (1, 4):
        norms = ours.head.cls_subnet[i]
        for level, layer in enumerate(norms):
            name = f"head.cls_subnet.{i}.{level}." if PER_LEVEL else f"head.cls_subnet.{i}."
            assert torch.equal(layer.running_mean, state[f"{name}running_mean"])


def test_group_norm_has_the_same_keys():
    theirs, ours = model_of("GN1"), build_rcnn(retinanet_cfg("GKN", MODEL__KN__NUM_GROUPS=1))
    state = ours.state_dict()
    assert set(state) - own_keys(state) == set(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert torch.equal(ours.head.cls_subnet[1].weight, theirs.head.cls_subnet[1].weight)


@pytest.mark.parametrize("shared", [True, False])
def test_a_checkpoint_with_batch_norm_is_calibrated(shared, tmp_path, caplog):
    """With statistics for each level, and with those of all levels together."""
    source = model_of("KN")
    state = {k: v for k, v in source.state_dict().items() if k not in own_keys([k])}
    if shared:
        for name in list(state):
            head, place, rest = name.partition("_subnet.")
            number, *parts = rest.split(".")
            if place and len(parts) == 2:
                state[f"{head}{place}{number}.{parts[1]}"] = state.pop(name)
    path = str(tmp_path / "model.pth")
    torch.save({"model": state}, path)
    model = build_rcnn(retinanet_cfg("KN"), seed=1)
    with caplog.at_level("INFO", "kn_detectron"):
        KNCheckpointer(model).load(path, checkpointables=[])
    assert f"priors of {len(kalman_layers(model))} Kalman layers were set" in caplog.text
    assert f"{len(own_keys(model.state_dict()))} initialised, 0 not used" in caplog.text
    norms, others = model.head.bbox_subnet[4], source.head.bbox_subnet[4]
    assert torch.equal(norms.weight, others.weight)
    assert torch.equal(norms[4].running_var, others[4].running_var)
    assert torch.equal(norms[0].running_var, norms[4].running_var) == shared
    set_gain_scale(model, 0.0)
    with torch.no_grad():
        want = model.eval().head(tower_inputs(model, images()))
        assert_close_maps(model.train().head(tower_inputs(model, images())), want)


@pytest.mark.parametrize("norm", ["KN", ""])
def test_a_checkpoint_without_norms_in_the_towers(norm, tmp_path):
    """As those of detectron2's model zoo."""
    options = dict(MODEL__RETINANET__NUM_CONVS=4, MODEL__FPN__NORM="")
    source = model_of("BN", MODEL__RETINANET__NORM="", **options)
    path = str(tmp_path / "model.pth")
    torch.save({"model": source.state_dict()}, path)
    model = build_rcnn(retinanet_cfg("KN", MODEL__RETINANET__NORM=norm, **options), seed=1)
    KNCheckpointer(model).load(path, checkpointables=[])
    for tower in TOWERS:
        convs, wanted = (
            [m for m in getattr(one.head, tower) if isinstance(m, nn.Conv2d)]
            for one in (model, source)
        )
        for conv, want in zip(convs, wanted, strict=True):
            assert torch.equal(conv.weight, want.weight) and torch.equal(conv.bias, want.bias)
    if norm:  # nothing is known of what is normalised
        assert not any(model.head.cls_subnet[1][0].mean_offset)
    else:
        assert_same_detections(detections(model, rcnn_inputs()), detections(source, rcnn_inputs()))


@pytest.mark.parametrize("norm", ["KN", "GKN"])
def test_own_checkpoints_return_everything(norm, tmp_path):
    model = model_of(norm)
    KNCheckpointer(model, str(tmp_path)).save("model")
    other = build_rcnn(retinanet_cfg(norm), seed=1)
    KNCheckpointer(other).load_for_evaluation(str(tmp_path / "model.pth"))
    for name, value in other.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
