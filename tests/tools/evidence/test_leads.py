import json

import numpy as np
import pytest
from evidence import leads, report
from evidence.picture import draw_leads
from PIL import Image

from .results import run


def difference(ours, theirs, seeds, values, images=2, rates=(0.02, 0.01), task="bbox"):
    names = {"ours": ours, "theirs": theirs, "images": images, "task": task}
    return {**names, "learning_rates": list(rates), "seeds": seeds, "by_seed": values}


def both_tasks(*args, **kwargs):
    return [difference(*args, task=task, **kwargs) for task in ("bbox", "segm")]


def test_the_interval_over_seeds_has_the_mean_of_all_seeds_in_95_percent():
    """Monte Carlo, to within four standard deviations of such a share."""
    generator = np.random.default_rng(0)
    for count in (2, 3, 5, 10):
        drawn = generator.normal(0.7, 2.0, (1000, count))
        intervals = [leads.interval_over_seeds(values.tolist()) for values in drawn]
        share = np.mean([low < 0.7 < high for low, high in intervals])
        assert abs(share - 0.95) < 4 * (0.95 * 0.05 / 1000) ** 0.5
    # With more seeds it is that of ten, of as large a spread: too wide, not too narrow.
    drawn = generator.normal(0.7, 2.0, (1000, 40))
    intervals = [leads.interval_over_seeds(values.tolist()) for values in drawn]
    assert np.mean([low < 0.7 < high for low, high in intervals]) > 0.95


def test_seeds_that_were_compared_apart_come_together():
    """A seed that was compared twice counts once, as in the comparison of the most seeds."""
    entries = [
        difference("KN", "BN", [3], [0.3]),
        difference("KN", "BN", [1], [9.0]),
        difference("KN", "BN", [2, 1], [0.2, 0.1]),
        difference("KN", "BN", [1], [7.0], rates=(0.02, 0.02)),
        difference("KN", "BN", [1], [5.0], images=1),
        difference("KN", "BN", [1], [4.0], task="segm"),
    ]
    found = leads.by_comparison(entries)
    assert found == {
        ("KN", "BN", 2, 0.02, 0.01): {"bbox": {1: 0.1, 2: 0.2, 3: 0.3}, "segm": {1: 4.0}},
        ("KN", "BN", 2, 0.02, 0.02): {"bbox": {1: 7.0}},
        ("KN", "BN", 1, 0.02, 0.01): {"bbox": {1: 5.0}},
    }
    assert list(found["KN", "BN", 2, 0.02, 0.01]["bbox"]) == [1, 2, 3]


def files(*more):
    """The contents of leads.FILES, of which the first has all runs."""
    entries = [
        *both_tasks("KN_gain0", "BN_frozen", [1], [1.5], images=1),
        *both_tasks("KN_gain0", "GN", [1], [2.5]),
        *both_tasks("KN_gain0", "BN_frozen", [1, 2], [1.0, -1.0]),
        *both_tasks("KN", "BN_frozen", [1], [9.0]),  # with a gain: not among these leads
        *both_tasks("KN_gain0", "BN", [1], [9.0]),
        *more,
    ]
    runs = [{**run("KN_gain0", images, 1, 1.0), "steps": 80 // images} for images in (1, 2)]
    return [{"runs": runs, "differences": entries}] + [{"runs": [], "differences": []}] * 4


def test_the_leads_of_kn_come_in_order():
    found = leads.kn_leads(files())
    assert [(lead.against, lead.images, lead.steps, lead.rates) for lead in found] == [
        (r"BN*, frozen", 2, 40, "0.02 / 0.01"),
        ("GN with BN's scale and shift", 2, 40, "0.02 / 0.01"),
        (r"BN*, frozen", 1, 80, "0.02 / 0.01"),
    ]
    assert found[0].by_seed == {"bbox": {1: 1.0, 2: -1.0}, "segm": {1: 1.0, 2: -1.0}}


def test_the_files_are_those_of_the_documents():
    for name in leads.FILES:
        data = json.loads((report.DOCS / "evidence" / f"{name}.json").read_text())
        assert data["differences"]
        for entry in data["differences"]:
            assert len(entry["by_seed"]) == len(entry["seeds"]) > 0
            # The interval is of their mean, over photographs; 3 is far from any of these.
            assert abs(np.mean(entry["by_seed"]) - (entry["low"] + entry["high"]) / 2) < 3


@pytest.mark.parametrize("seeds, bars", [(2, False), (3, True)])
def test_the_picture_has_intervals_from_three_seeds_on(tmp_path, seeds, bars):
    entries = both_tasks("KN_gain0", "BN_affine", list(range(seeds)), [1.0, 3.0, 5.0][:seeds])
    draw_leads(leads.kn_leads(files(*entries)), tmp_path / "leads.png")
    with Image.open(tmp_path / "leads.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3).astype(int)
    pale = (pixels[:, 2] - pixels[:, 0] > 40) & (pixels[:, 0] > 160)
    assert (pale.sum() > 500) == bars
