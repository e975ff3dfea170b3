"""The gap between the variance of a batch and the moving one."""

import json

import torch
from evidence import classification, variance_gap
from torch import nn

from kn_detectron.layers import KalmanNorm2d, belief

from ...pretraining.conftest import folder, write_images  # noqa: F401
from .test_runs import call


def test_batchnorms_gap_is_that_of_the_measured_variance():
    network = nn.Sequential(nn.BatchNorm2d(3, momentum=None), nn.ReLU(), nn.BatchNorm2d(3))
    network[0].running_var.fill_(2.0)
    network.eval()
    batches = torch.randn(4, 2, 3, 5, 5)
    gaps = variance_gap.variance_gaps(network, batches)
    measured = batches.transpose(1, 2).flatten(2).var(2)  # unbiased, shape (4, 3)
    torch.testing.assert_close(gaps["0"], (measured / 2).log().abs().T)
    assert network[0].momentum is None and network[2].momentum == 0.1
    assert (network[0].running_var == 2).all() and network[0].num_batches_tracked == 0


class OneKalmanNorm(nn.Module):
    """A chain of one layer, whose prior is mean 0 and variance 3."""

    def __init__(self, gain):
        super().__init__()
        self.norm = KalmanNorm2d(3, gain=gain, learn_gain=False)

    def forward(self, x):
        prior = belief.Belief(torch.zeros(1, 3), torch.full((1, 3), 3.0))
        return self.norm(x, prior=prior)[0]


def test_kalman_norms_gap_is_that_of_the_posterior():
    batches = torch.randn(4, 2, 3, 5, 5)
    measured = batches.transpose(1, 2).flatten(2).var(2)
    (gap,) = variance_gap.variance_gaps(OneKalmanNorm(0.25), batches).values()
    torch.testing.assert_close(gap, (0.75 * 3 + 0.25 * measured).log().abs().T)


def test_a_run_is_drawn(tmp_path, monkeypatch, folder, capsys):  # noqa: F811
    arguments = ("--data", folder, "--output", tmp_path / "runs", "--arms", "KN")
    monkeypatch.setattr(classification, "_BATCH_SIZE", 8)
    call(monkeypatch, classification, *arguments, "--epochs", 1, "--micro-batches", 2)
    (run,) = tmp_path.glob("runs/*")
    call(monkeypatch, variance_gap, run, "--output", tmp_path / "gap", "--batches", 5)
    means = json.loads((tmp_path / "gap.json").read_text())
    (gaps,) = means.values()
    assert len(gaps) == 13 and all(0 < gap < 20 for gap in gaps.values())  # 6 * 2 + 1 convolutions
    assert (tmp_path / "gap.png").stat().st_size > 10_000
    assert "on average over the norms" in capsys.readouterr().out
