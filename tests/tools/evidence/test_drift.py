"""The drift of a detector's features from the statistics of its norms."""

import json

import pytest
import torch
from evidence import detection, drift, tables
from torch import nn

from kn_detectron.data import ShapesSpec, generate_shapes

from .test_runs import call


def test_drift_is_the_distance_from_the_statistics_of_all_batches_together():
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=0.5))
    network.eval()
    first, last = network[0], network[2]
    images = 2 * torch.randn(6, 3, 8, 8) + 1
    features = network[1](first(images)).detach()
    last.running_mean, last.running_var = features.mean((0, 2, 3)), features.var((0, 2, 3)) + 1
    of_variance, of_mean = drift.drift(network, images.split([1, 5]))
    var, mean = images.var((0, 2, 3), unbiased=False), images.mean((0, 2, 3))
    expected = (var + first.eps).log().sum()
    var = features.var((0, 2, 3), unbiased=False)
    expected += ((last.running_var + 0.5) / (var + 0.5)).log().sum()
    assert of_variance == pytest.approx(expected.item() / 7, rel=1e-4)
    assert of_mean == pytest.approx(mean.abs().sum().item() / 7, rel=1e-4)


def test_runs_are_measured_before_and_after(tmp_path, monkeypatch):
    shapes, output = tmp_path / "shapes", tmp_path / "runs"
    generate_shapes(str(shapes), ShapesSpec(num_train=4, num_val=2, size=64, max_shapes=2))
    options = ("SOLVER.MAX_ITER", 2, "SOLVER.STEPS", "()", "SOLVER.BASE_LR", 0.02)
    options += ("SOLVER.WARMUP_ITERS", 0, "INPUT.MIN_SIZE_TRAIN", "(64,)")
    options += ("INPUT.MIN_SIZE_TEST", 64, "DATALOADER.NUM_WORKERS", 0)
    arguments = ("--dataset", shapes, "--output", output, "--arms", "BN_frozen", "--images", 1)
    call(monkeypatch, detection, *arguments, "--seeds", 1, "--opts", *options)
    (run,) = output.iterdir()
    result = tmp_path / "drift.json"
    call(monkeypatch, drift, run, "--dataset", shapes, "--output", result)
    (found,) = rows = json.loads(result.read_text())
    assert (found["arm"], found["learning_rate"], found["steps"]) == ("BN_frozen", 0.02, 2)
    # Shapes are not ImageNet's photographs, and two steps change the weights a little.
    assert min(found["before"]) > 0.05
    assert found["before"] != found["after"] == pytest.approx(found["before"], abs=0.5)
    assert "| BN\\*, frozen" in tables.drift_table(rows)
