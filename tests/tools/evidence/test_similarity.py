"""How alike the features of different images are."""

import json

import pytest
import torch
from evidence import similarity

from ...pretraining.conftest import config, folder, write_images  # noqa: F401
from .test_runs import call


def test_it_is_the_average_over_all_pairs():
    vectors = torch.randn(5, 3, dtype=torch.float64)
    pairs = [
        torch.nn.functional.cosine_similarity(vectors[i], vectors[j], dim=0).item()
        for i in range(5)
        for j in range(i)
    ]
    assert similarity.mean_cosine(vectors) == pytest.approx(sum(pairs) / len(pairs))
    assert similarity.mean_cosine(torch.ones(4, 2)) == pytest.approx(1.0)


def test_the_network_of_a_run_is_measured(tmp_path, monkeypatch, folder, capsys):  # noqa: F811
    (tmp_path / "run").mkdir()
    cfg = config(folder, "BN")
    (tmp_path / "run" / "config.yaml").write_text(cfg.dump())
    for output in ("one.json", "two.json"):
        call(monkeypatch, similarity, tmp_path / "run", "--output", tmp_path / output)
    (value,) = json.loads((tmp_path / "one.json").read_text()).values()
    assert -1 < value < 1 and f"run: {value:.3f}" in capsys.readouterr().out
    assert (tmp_path / "two.json").read_text() == (tmp_path / "one.json").read_text()
