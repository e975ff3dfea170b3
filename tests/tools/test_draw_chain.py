"""tools/docs/draw_chain.py: what the picture of the chain shows."""

import importlib.util
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location(
        "draw_chain", ROOT / "tools" / "docs" / "draw_chain.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_posterior_lies_between_prior_and_measurement(tool):
    moments = tool.compute()
    prior, measured, posterior = (moments[k][0] for k in ("prior", "measured", "posterior"))
    assert posterior == pytest.approx((1 - tool.GAIN) * prior + tool.GAIN * measured, abs=1e-5)


def test_the_prior_is_nearer_to_the_truth_than_one_image(tool):
    moments = tool.compute()
    true = moments["all images"][0]
    assert abs(moments["prior"][0] - true) < 0.5 * abs(moments["measured"][0] - true)


def test_the_command_draws(tool, tmp_path, monkeypatch):
    path = tmp_path / "chain.png"
    monkeypatch.setattr(sys, "argv", ["draw_chain.py", str(path)])
    tool.main()
    with Image.open(path) as drawn, Image.open(ROOT / "docs" / "chain.png") as shown:
        # Fonts differ a little between machines.
        assert drawn.size == pytest.approx(shown.size, abs=20)
