"""Accuracy with moving and with online statistics."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.ops import StochasticDepth

from kn_detectron.layers import convert_kalman_norm
from kn_detectron.pretraining import ImageClassifier, evaluate, online_statistics, open_folders

from ..models import randomize
from ..ranks import spawn_two, two_ranks
from .conftest import config


def _classifier(cfg, classes=3):
    cfg.PRETRAINING.NUM_CLASSES = classes
    model = randomize(ImageClassifier(cfg))
    torch.nn.init.normal_(model.linear.weight)  # so that not all images have the same class
    return model


def _batch(count=8):
    return {"image": torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8)}


@pytest.mark.parametrize("norm", ["BN", "KN", "BRN"])
@pytest.mark.parametrize("norm_batch_size", [0, 2])
def test_online_is_the_training_function_and_leaves_no_trace(norm, norm_batch_size):
    cfg = config("d", norm, norm_batch_size=norm_batch_size)
    model, batch = _classifier(cfg).eval(), _batch()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    moving = model(batch)
    with online_statistics(model.backbone):
        online = model(batch)
    assert torch.equal(model(batch), moving)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not torch.allclose(online, moving, rtol=0.01)
    if norm == "BRN":
        return  # in training it uses moving statistics too
    model.backbone.train()
    torch.testing.assert_close(online, model(batch))
    assert not torch.equal(model.backbone.stem.conv1.norm.running_mean, before[_STEM_MEAN])


_STEM_MEAN = "backbone.stem.conv1.norm.running_mean"


def test_dropout_stays_off_with_online_statistics():
    layers = nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Dropout2d(0.5), StochasticDepth(0.5, "row")
    network, x = nn.Sequential(*layers).eval(), torch.randn(4, 3, 5, 5)
    with online_statistics(network):
        torch.testing.assert_close(network(x), F.batch_norm(x, None, None, training=True))
    assert not any(module.training for module in network.modules())


class _Dropping(nn.Module):
    """Drops as timm's GhostNet does, by its own mode."""

    def forward(self, x):
        return F.dropout(x, 0.5, self.training)


@pytest.mark.parametrize("norm", ["BN", "KN"])
def test_functional_dropout_stays_off_with_online_statistics(norm):
    layers = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    without = nn.Sequential(*layers)
    network = copy.deepcopy(nn.Sequential(*layers[:2], _Dropping(), *layers[2:]))
    if norm == "KN":
        network, without = convert_kalman_norm(network), convert_kalman_norm(without)
    x = torch.randn(4, 3, 5, 5)
    with online_statistics(network.eval()):
        online = network(x)
    assert not torch.allclose(online, network(x), rtol=0.01)
    torch.testing.assert_close(online, without.train()(x))


def test_online_statistics_come_back_after_a_failure():
    model = _classifier(config("d", "BN")).eval()
    with pytest.raises(ZeroDivisionError), online_statistics(model.backbone):
        1 / 0
    norm = model.backbone.stem.conv1.norm
    assert norm.track_running_stats and not norm.training


def _image_by_image(model, folder):
    """Top-1 and top-2 of images in a batch of their own, in the order of the folders."""
    hits = []
    for path, label in open_folders(str(folder))[1].samples:
        image = Image.open(path)
        size = [int(64 * side / min(image.size)) for side in image.size]
        image = image.resize(size, Image.BILINEAR)
        left, top = round((size[0] - 64) / 2), round((size[1] - 64) / 2)
        pixels = np.asarray(image.crop((left, top, left + 64, top + 64)))[:, :, ::-1].copy()
        scores = model({"image": torch.from_numpy(pixels).permute(2, 0, 1)[None]})[0]
        best = scores.argsort(descending=True).tolist()
        hits.append((best[0] == label, label in best[:5]))
    return (100 * np.mean(hits, axis=0)).tolist()


@pytest.mark.parametrize("batch_size", [4, 8])
@torch.no_grad()
def test_moving_is_counted_image_by_image(folder, batch_size):
    model = _classifier(config(folder, "BN"), classes=9).eval()
    top1, top5 = _image_by_image(model, folder)
    assert 0 < top1 < top5 < 100
    results = evaluate(config(folder, "BN", batch_size=batch_size), model)
    assert results["moving"] == {"top1": pytest.approx(top1), "top5": pytest.approx(top5)}


@torch.no_grad()
def test_online_is_counted_batch_by_batch(folder):
    cfg = config(folder, "KN", norm_batch_size=1)
    model = _classifier(cfg, classes=9)
    results = evaluate(cfg, model)
    assert model.training
    assert results["online"] != results["moving"]
    # Each image is a batch of its own.
    model.eval()
    with online_statistics(model.backbone):
        assert list(results["online"].values()) == pytest.approx(_image_by_image(model, folder))


def test_group_norms_are_evaluated_once(folder, kn_log):
    cfg = config(folder, "GN4")
    model = _classifier(cfg, classes=4)
    calls = []
    model.register_forward_hook(lambda *args: calls.append(1))
    results = evaluate(cfg, model)
    assert len(calls) == 2 and results["online"] == results["moving"]
    assert results["moving"]["top5"] == 100
    assert "GN4 on 15 validation images" in kn_log.text
    top1 = f"{results['moving']['top1']:.2f}"
    assert "| moving (Option A) |" in kn_log.text and kn_log.text.count(top1) == 2


def test_every_module_keeps_its_mode(folder):
    cfg = config(folder, "KN")
    model = _classifier(cfg).train()
    model.backbone.stem.eval()
    before = [module.training for module in model.modules()]
    evaluate(cfg, model)
    assert [module.training for module in model.modules()] == before


def _evaluate_on_rank(rank, cfg, folder):
    with two_ranks(rank, folder):
        torch.manual_seed(0)
        torch.save(evaluate(cfg, _classifier(cfg, classes=9)), f"{folder}/{rank}.pth")


def test_two_processes_share_the_images(folder, tmp_path):
    cfg = config(folder, "KN", norm_batch_size=1)
    expected = evaluate(cfg, _classifier(cfg, classes=9))
    assert expected["online"] != expected["moving"]
    spawn_two(_evaluate_on_rank, cfg, str(tmp_path))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pth")
        assert found == {name: pytest.approx(scores) for name, scores in expected.items()}
