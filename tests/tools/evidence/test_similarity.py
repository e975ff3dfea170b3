"""How alike the features of different images are."""

import json

import pytest
import torch
from evidence import similarity
from evidence.classifiers import build_classifier, training_images

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
    assert f"run: {value:.3f}" in capsys.readouterr().out
    cfg, model = build_classifier(tmp_path / "run")
    with torch.no_grad():
        features = model.backbone(next(training_images(cfg, model)))["res5"]
    units = torch.nn.functional.normalize(features.mean((2, 3)), dim=1)
    pairs = (units @ units.T)[~torch.eye(len(units), dtype=torch.bool)]
    assert len(units) == 8 and value == pytest.approx(pairs.mean().item(), abs=1e-3)
    assert (tmp_path / "two.json").read_text() == (tmp_path / "one.json").read_text()
