"""Micro-batches inside a batch, against a loop over them with a layer for each."""

import copy

import pytest
import torch

from kn_detectron.layers import Belief, GroupKalmanNorm2d, KalmanNorm2d, set_norm_batch_size

from ..models import build_backbone, images, randomize, resnet_cfg
from .inputs import features, prior_of

KINDS = {
    "head": dict(gain=None),
    "paper head": dict(gain=None, variant="paper"),
    "network": dict(gain=0.3),
    "paper": dict(gain=0.3, variant="paper"),
    "gain 0": dict(gain=0.0, learn_gain=False, variant="paper"),
}


def batch(images=6):
    return features(shape=(images, 4, 3, 5))


def layer_of(kind):
    return randomize(KalmanNorm2d(4, eval_statistics="batch", **KINDS[kind]).double())


def run(layer, x, prior, belief_counts=True):
    """Output, belief, and gradients by name, of a loss on both."""
    inputs = dict(layer.named_parameters(), x=x.clone().requires_grad_())
    if layer.is_head:
        prior = None
    else:
        prior = Belief(*(v.clone().requires_grad_() for v in prior))
        inputs.update(prior_mean=prior.mean, prior_var=prior.var)
    y, belief = layer(inputs["x"], prior=prior)
    loss = y.sigmoid().sum()
    if belief_counts:
        loss = loss + belief.mean.square().sum() + belief.var.sqrt().sum()
    grads = torch.autograd.grad(loss, list(inputs.values()), materialize_grads=True)
    return y, belief, dict(zip(inputs, grads))


@pytest.mark.parametrize(
    "kind, rows",
    [("head", 1), ("paper head", 1), ("network", 1), ("paper", 1), ("paper", 3), ("gain 0", 3)],
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_equals_a_loop_over_groups(kind, rows, training, memory_format):
    layer = layer_of(kind).train(training)
    x = batch().contiguous(memory_format=memory_format)
    prior = prior_of(rows=rows, dtype=torch.float64)
    # The network variant's belief is not about the images: all groups pass on the same one.
    passes_on_rows = layer.variant == "paper" and (kind != "gain 0" or rows == 3)

    layers, ys, beliefs, grads = [], [], [], []
    for k, group in enumerate(x.split(2)):
        layers.append(copy.deepcopy(layer))
        own_prior = Belief(*(v[k : k + 1] for v in prior)) if rows == 3 else prior
        results = run(layers[k], group, own_prior, belief_counts=passes_on_rows or k == 0)
        for of_all, of_group in zip((ys, beliefs, grads), results):
            of_all.append(of_group)

    set_norm_batch_size(layer, 2)
    y, belief, got = run(layer, x, prior)
    torch.testing.assert_close(y, torch.cat(ys))
    assert y.is_contiguous(memory_format=memory_format)
    want = Belief(*map(torch.cat, zip(*beliefs))) if passes_on_rows else beliefs[0]
    torch.testing.assert_close(belief, want)
    for name in got:
        parts = [g[name] for g in grads]
        apart = name == "x" or (name.startswith("prior") and rows == 3)
        torch.testing.assert_close(got[name], torch.cat(parts) if apart else sum(parts), msg=name)
    for name in ("running_mean", "running_var"):
        average = sum(getattr(own, name) for own in layers) / 3
        torch.testing.assert_close(getattr(layer, name), average)
    assert layer.num_batches_tracked == int(training)


def test_a_prior_is_dropped_group_by_group():
    layer = layer_of("paper")
    x = batch(2)
    x[0] *= 0.01  # beside these the prior is far too wide
    want = torch.cat([copy.deepcopy(layer)(image[None], prior=prior_of())[0] for image in x])
    set_norm_batch_size(layer, 1)
    y, belief = layer(x, prior=prior_of())
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(belief.mean[0], x[0].mean((1, 2)))


@pytest.mark.parametrize("kind", ["head", "network", "paper"])
def test_the_whole_batch_as_one_group_is_the_default(kind):
    layer, prior = layer_of(kind), prior_of(dtype=torch.float64)
    other = copy.deepcopy(layer)
    set_norm_batch_size(other, 6)
    (y, *_), (want, *_) = run(other, batch(), prior), run(layer, batch(), prior)
    assert torch.equal(y, want)
    set_norm_batch_size(other, 3)
    assert not torch.equal(run(other, batch(), prior)[0], want)
    set_norm_batch_size(other, None)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(run(other, batch(), prior)[0], want)


@pytest.mark.parametrize("variant", ["network", "paper"])
def test_a_backbone_equals_a_loop_over_groups(variant):
    backbone = randomize(build_backbone(resnet_cfg(MODEL__KN__VARIANT=variant))).double()
    x = images(4).double()
    want = torch.cat([copy.deepcopy(backbone)(group)["res4"] for group in x.split(2)])
    set_norm_batch_size(backbone, 2)
    outputs = backbone(x)
    torch.testing.assert_close(outputs["res4"], want)
    assert outputs.beliefs["res4"].mean.shape[0] == (2 if variant == "paper" else 1)


def test_it_is_no_part_of_the_state_and_moving_statistics_know_nothing_of_it():
    layer = KalmanNorm2d(4)
    before = set(layer.state_dict())
    want = layer.eval()(batch(3).float())
    set_norm_batch_size(layer, 2)
    assert set(layer.state_dict()) == before
    assert torch.equal(layer(batch(3).float()), want)


def test_group_kalman_normalization_has_none_of_it():
    layer = GroupKalmanNorm2d(2, 4)
    want, _ = layer(batch(3).float(), prior=prior_of())
    set_norm_batch_size(layer, 2)
    assert torch.equal(layer(batch(3).float(), prior=prior_of())[0], want)


def test_innovation_is_the_average_over_groups():
    layer, prior, x = layer_of("network"), prior_of(dtype=torch.float64), batch()
    parts = [layer.innovation(group, prior) for group in x.split(2)]
    set_norm_batch_size(layer, 2)
    for got, *want in zip(layer.innovation(x, prior), *parts):
        torch.testing.assert_close(got, sum(want) / 3)


def test_bad_batches_and_sizes():
    layer, prior = layer_of("paper"), prior_of(dtype=torch.float64)
    with pytest.raises(ValueError, match="1 image or more, or is None, not 0"):
        set_norm_batch_size(layer, 0)
    with pytest.raises(ValueError, match=r"prior of 3 rows does not fit 1 micro-batch"):
        layer(batch(), prior=prior_of(rows=3))
    set_norm_batch_size(layer, 4)
    with pytest.raises(ValueError, match="batch of 6 images cannot .* micro-batches of 4"):
        layer(batch(), prior=prior)
    y, _ = layer(batch()[:0], prior=prior)  # as many micro-batches as images: none
    assert y.shape == (0, 4, 3, 5)
