"""The classifier around a detector's ResNet."""

import copy

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from kn_detectron import GroupKalmanNorm2d, InputError, KalmanNorm2d
from kn_detectron.layers import kalman_layers
from kn_detectron.pretraining import ImageClassifier, NetworkClassifier
from kn_detectron.pretraining.norms import BatchRenorm2d

from ..models import randomize, rcnn_cfg
from .conftest import config

pytestmark = pytest.mark.trains


def _batch(count=8, size=64):
    return {
        "image": torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8),
        "label": torch.randint(0, 3, (count,)),
    }


def _loss(model, batch):
    return model(batch)["loss_cls"]


@pytest.mark.parametrize(
    "norm, kind, options",
    [
        ("BN", nn.BatchNorm2d, {}),
        ("BN", KalmanNorm2d, dict(norm_batch_size=2)),
        ("KN", KalmanNorm2d, {}),
        ("GKN", GroupKalmanNorm2d, {}),
        ("GN4", nn.GroupNorm, {}),
        ("LN", nn.GroupNorm, {}),
        ("BRN", BatchRenorm2d, {}),
        ("WN", None, {}),
    ],
)
def test_every_norm_is_built_and_has_its_gradient(norm, kind, options):
    model = ImageClassifier(config("d", norm, **options))
    norms = [
        type(m)
        for m in model.modules()
        if isinstance(m, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm))
    ]
    assert len(norms) == (53 if kind else 0)
    assert all(issubclass(found, kind) for found in norms)
    if norm == "LN":
        assert {m.num_groups for m in model.modules() if isinstance(m, nn.GroupNorm)} == {1}
    start, batch = model.double(), _batch(4)
    model = copy.deepcopy(start)  # whose statistics move
    loss = _loss(model, batch)
    assert loss.item() == pytest.approx(1.1, abs=0.25)  # log 3
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    # The slope of the loss along its gradient is the gradient's squared length.
    step, losses = 1e-6 / sum(g.square().sum() for g in gradient), []
    for sign in (1, -1):
        moved = copy.deepcopy(start)
        with torch.no_grad():
            for parameter, direction in zip(moved.parameters(), gradient):
                parameter.add_(sign * step * direction)
            losses.append(_loss(moved, batch).item())
    assert losses[0] - losses[1] == pytest.approx(2e-6, rel=1e-4)


MEMORY_FORMATS = pytest.mark.parametrize(
    "norm, together, expected",
    [
        ("BN", 0, torch.channels_last),
        ("KN", 0, torch.channels_last),
        ("KN", 8, torch.channels_last),  # the whole batch
        ("KN", 2, torch.contiguous_format),
        ("BN", 2, torch.contiguous_format),
        ("GN4", 2, torch.channels_last),  # ignores the size
        ("GKN", 0, torch.contiguous_format),
    ],
)


@MEMORY_FORMATS
def test_features_have_the_faster_memory_format(norm, together, expected):
    """Where parts of a batch are measured, changing the format costs more than it gains."""
    model = ImageClassifier(config("d", norm, norm_batch_size=together))
    x = model.backbone(_batch()["image"].float())["res5"]
    assert x.shape[1] > 1 and x.shape[2] > 1  # else both formats are one
    assert x.is_contiguous(memory_format=expected)


@MEMORY_FORMATS
def test_the_memory_format_does_not_depend_on_the_device(norm, together, expected):
    """The meta device stands in for a GPU: it is no CPU."""
    cfg = config("d", norm, norm_batch_size=together)
    cfg.MODEL.DEVICE = "meta"
    weight = ImageClassifier(cfg).backbone.res2[0].conv2.weight
    assert weight.is_meta and weight.is_contiguous(memory_format=expected)


def test_loss_and_accuracy_are_those_of_the_scores():
    model = ImageClassifier(config("d", "GN4"))
    batch = _batch()
    loss = model(batch)["loss_cls"]
    scores = model.eval()(batch)
    assert scores.shape == (8, 3)
    torch.testing.assert_close(loss, F.cross_entropy(scores, batch["label"]))
    assert (
        model.batch_top1 == 100 * sum(s.argmax() == y for s, y in zip(scores, batch["label"])) / 8
    )


@pytest.mark.parametrize("norm", ["BN", "KN"])
def test_the_detector_sees_the_same_features(norm):
    detector_cfg = rcnn_cfg(norm, MODEL__PIXEL_STD=[50.0, 60.0, 70.0])
    detector = randomize(build_model(detector_cfg)).eval()
    model = ImageClassifier(config("d", norm, detection=detector_cfg)).eval()
    here = {n: t for n, t in detector.state_dict().items() if n.startswith("backbone.")}
    missing, unexpected = model.load_state_dict(here, strict=False)
    assert not unexpected and all(n.startswith(("backbone.res5", "linear")) for n in missing)
    res4 = []
    model.backbone.res4.register_forward_hook(
        lambda module, args, out: res4.append(getattr(out, "value", out))
    )
    image = _batch()["image"]
    model({"image": image})
    inputs = detector.preprocess_image([{"image": i} for i in image]).tensor
    expected = detector.backbone(inputs)["res4"]
    assert (res4[0] - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("norm", ["BN", "KN", "BRN"])
def test_micro_batches_are_batches_on_their_own(norm):
    """Loss and gradient are the averages over the groups."""
    whole = randomize(ImageClassifier(config("d", norm, norm_batch_size=2))).double()
    apart = ImageClassifier(config("d", norm)).double()
    apart.load_state_dict(whole.state_dict())
    for model in (whole, apart):
        if norm == "BRN":  # a group's statistics must not move those of the next one
            for layer in model.backbone.modules():
                if isinstance(layer, BatchRenorm2d):
                    layer.momentum = 0.0
                    layer.num_batches_tracked.fill_(layer.steps // 4)
    batch = _batch(6)
    loss = whole(batch)["loss_cls"]
    loss.backward()
    parts = []
    for i in range(0, 6, 2):
        part = {key: value[i : i + 2] for key, value in batch.items()}
        parts.append(apart(part)["loss_cls"] / 3)
        parts[-1].backward()
        for layer in apart.backbone.modules():
            if isinstance(layer, BatchRenorm2d):
                layer.num_batches_tracked.fill_(layer.steps // 4)
    torch.testing.assert_close(loss, sum(parts))
    for (name, one), other in zip(whole.named_parameters(), apart.parameters()):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-9, msg=name)


def test_groups_that_do_not_divide_the_widths_are_refused():
    with pytest.raises(InputError, match="GN3"):
        ImageClassifier(config("d", "GN3"))
    with pytest.raises(InputError, match="--norm GN does not fit the backbone"):
        ImageClassifier(config("d", "GN"))


# Other networks than the ResNet of the config.


@pytest.mark.parametrize(
    "norm, kind, options",
    [
        ("BN", nn.BatchNorm2d, {}),
        ("BN", KalmanNorm2d, dict(norm_batch_size=2)),
        ("KN", KalmanNorm2d, dict(norm_batch_size=2)),
        ("GKN", GroupKalmanNorm2d, {}),
        ("GN4", nn.GroupNorm, {}),
        ("LN", nn.GroupNorm, {}),
        ("BRN", BatchRenorm2d, {}),
    ],
)
def test_every_norm_in_a_network_by_name(norm, kind, options):
    cfg = config("d", norm, image_size=32, network="cifar_resnet32", **options)
    assert cfg.OUTPUT_DIR.endswith(f"pretraining_cifar_resnet32_{norm}")
    model = NetworkClassifier(cfg).train()
    norms = [m for m in model.modules() if isinstance(m, (nn.BatchNorm2d, nn.GroupNorm))]
    assert len(norms) == 31 and all(isinstance(m, kind) for m in norms)
    assert {getattr(m, "norm_batch_size", None) for m in norms} == {options.get("norm_batch_size")}
    _loss(model, _batch(4, 32)).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_chain_of_a_network_starts_at_the_pixels_of_the_config():
    cfg = config("d", "KN", image_size=32, network="cifar_resnet32")
    cfg.MODEL.PIXEL_STD = [114.75, 57.12, 58.395]
    chain = NetworkClassifier(cfg).backbone.kalman_chain
    torch.testing.assert_close(chain.image.belief().var, torch.tensor([[0.25, 1.0, 1.0]]))


@pytest.mark.parametrize(
    "norm, network, sentence",
    [
        ("WN", "small_inception", "give another norm for small_inception"),
        ("GN32", "cifar_resnet32", "--norm GN32 does not fit cifar_resnet32"),
        ("KN", "no_such", "There is no network 'no_such'"),
        # Nothing would be replaced, and the results would be called GroupNorm's.
        ("GN4", "vgg11", "vgg11 has no BatchNorm2d"),
        ("BN", "vgg11", "vgg11 has no BatchNorm2d"),
        ("KN", "vgg11", "neither BatchNorm2d nor GroupNorm"),
        # Its activations are a part of its norms, and would go with them.
        ("GN1", "timm/tf_efficientnet_lite0", "BatchNormAct2d, which do more than normalise"),
        ("BRN", "timm/tf_efficientnet_lite0", "BatchNormAct2d, which do more than normalise"),
        ("GKN", "timm/tf_efficientnet_lite0", "BatchNormAct2d, which do more than normalise"),
    ],
)
def test_networks_that_are_refused(norm, network, sentence):
    with pytest.raises(InputError, match=sentence):
        NetworkClassifier(config("d", norm, image_size=32, network=network))


@pytest.mark.parametrize("norm", ["BN", "KN"])
def test_norms_with_an_activation_keep_it(norm):
    network = "timm/tf_efficientnet_lite0"
    model = NetworkClassifier(config("d", norm, image_size=32, network=network))
    assert sum(isinstance(m, nn.ReLU6) for m in model.modules()) == 33


@pytest.mark.parametrize(
    "norm, network, together", [("BN", "", 1), ("BRN", "", 1), ("BN", "resnet18", 1), ("BN", "", 0)]
)
def test_one_value_per_channel_is_a_sentence(norm, network, together):
    options = dict(image_size=32, norm_batch_size=together, network=network)
    model = (NetworkClassifier if network else ImageClassifier)(config("d", norm, **options))
    with pytest.raises(InputError, match="give a larger --image-size, or more images"):
        _loss(model.train(), _batch(2 if together else 1, 32))


def test_the_keys_of_kn_reach_a_network_by_name():
    cfg = config("d", "KN", image_size=32, network="cifar_resnet14")
    cfg.MODEL.KN.merge_from_other_cfg(
        CfgNode(
            dict(
                VARIANT="paper",
                GAIN=0.25,
                LEARN_GAIN=False,
                PROCESS_MODEL=False,
                PRIOR_GRADIENT=False,
                EVAL_STATISTICS="batch",
                PREDICTION="monte_carlo",
                MONTE_CARLO_SIZE=8,
            )
        )
    )
    network = NetworkClassifier(cfg).backbone
    layers = kalman_layers(network).values()
    assert len(layers) == 12
    for layer in layers:
        assert layer.variant == "paper" and layer.eval_statistics == "batch"
        assert layer.gain.item() == pytest.approx(0.25) and not layer.learns_gain
        assert not layer.has_process_model and not layer.prior_gradient
    assert network.kalman_chain.transition.size == 8


@pytest.mark.parametrize("norm, together", [("BN", 2), ("BRN", 0), ("GN1", 0), ("KN", 0)])
def test_norms_that_are_compared_differ_in_nothing_else(norm, together):
    """Scale and shift, eps and momentum are the network's, which may initialise scales with 0."""
    options = dict(network="timm/resnet18", image_size=64)
    want = NetworkClassifier(config("d", "BN", **options))
    model = NetworkClassifier(config("d", norm, norm_batch_size=together, **options))
    zeros = 0
    for name, old in want.backbone.named_modules():
        if isinstance(old, torch.nn.BatchNorm2d):
            new = model.backbone.get_submodule(name)
            assert type(new) is not torch.nn.BatchNorm2d
            assert torch.equal(new.weight, old.weight) and torch.equal(new.bias, old.bias)
            assert new.eps == old.eps and getattr(new, "momentum", old.momentum) == old.momentum
            zeros += not old.weight.any()
    assert zeros == 8
