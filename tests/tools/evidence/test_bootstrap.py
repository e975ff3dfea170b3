import contextlib
import io

import numpy as np
import pytest
from evidence.bootstrap import MatchedRun, paired_bootstrap
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

NUM_PHOTOS = 12


@pytest.fixture(scope="module")
def truth():
    generator = np.random.default_rng(0)
    coco = COCO()
    boxes = generator.uniform(10, 60, (NUM_PHOTOS, 4, 4))
    coco.dataset = {
        "images": [{"id": i, "width": 200, "height": 200} for i in range(NUM_PHOTOS)],
        "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {
                "id": 1 + 4 * i + j,
                "image_id": i,
                "category_id": 1 + j % 2,
                "bbox": box.tolist(),
                "area": float(box[2] * box[3]),
                "iscrowd": int(j == 3),  # neither it nor what is found in it counts
            }
            for i in range(NUM_PHOTOS)
            for j, box in enumerate(boxes[i])
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def detections(truth, shift, seed):
    """The truth, each box moved by some pixels at random, with random scores."""
    generator = np.random.default_rng(seed)
    return [
        {
            "image_id": a["image_id"],
            "category_id": a["category_id"],
            "bbox": (np.array(a["bbox"]) + [*generator.normal(0, shift, 2), 0, 0]).tolist(),
            "score": float(generator.uniform()),
        }
        for a in truth.dataset["annotations"]
    ]


def run(truth, shift, seed=1):
    return MatchedRun(truth, detections(truth, shift, seed), "bbox")


def test_all_photos_once_give_pycocotools_own_average_precision(truth):
    with contextlib.redirect_stdout(io.StringIO()):
        whole = COCOeval(truth, truth.loadRes(detections(truth, 3, 1)), "bbox")
        whole.evaluate()
        whole.accumulate()
        whole.summarize()
    got = run(truth, 3).average_precision(np.arange(NUM_PHOTOS))
    assert got == pytest.approx(100 * whole.stats[0], abs=1e-9)
    assert 0 < got < 100


def test_a_sample_is_evaluated_as_photos_of_their_own(truth):
    """A photo that was drawn twice counts as two photos with the same content."""
    sample = np.array([0, 0, 1, 2, 3, 4, 5, 5, 5, 9, 10, 11])
    found = detections(truth, 3, 1)
    copied, copies = COCO(), []
    annotations = []
    for new, old in enumerate(sample):
        for a in truth.dataset["annotations"]:
            if a["image_id"] == old:
                annotations.append({**a, "id": len(annotations) + 1, "image_id": new})
        copies += [{**d, "image_id": new} for d in found if d["image_id"] == old]
    copied.dataset = {**truth.dataset, "annotations": annotations}
    with contextlib.redirect_stdout(io.StringIO()):
        copied.createIndex()
    want = MatchedRun(copied, copies, "bbox").average_precision(np.arange(NUM_PHOTOS))
    assert run(truth, 3).average_precision(sample) == pytest.approx(want, abs=1e-9)


def test_equal_runs_do_not_differ_and_better_ones_do(truth):
    good, bad = run(truth, 1), run(truth, 8)
    same = paired_bootstrap([good], [good], samples=20)
    assert same == {"by_seed": [0.0], "low": 0.0, "high": 0.0}
    better = paired_bootstrap([good], [bad], samples=50)
    assert 0 < better["low"] <= better["by_seed"][0] <= better["high"]
    worse = paired_bootstrap([bad], [good], samples=50)
    assert worse["high"] == pytest.approx(-better["low"])


def test_the_interval_is_that_of_the_mean_over_the_pairs(truth):
    good, middle, bad = (run(truth, shift) for shift in (1, 4, 8))
    both = paired_bootstrap([good, middle], [middle, bad], samples=50)
    assert both["by_seed"] == [
        paired_bootstrap([a], [b], samples=1)["by_seed"][0]
        for a, b in ((good, middle), (middle, bad))
    ]
    # The sum of the two differences is that of the best and the worst run.
    ends = paired_bootstrap([good], [bad], samples=50)
    assert both["low"] == pytest.approx(ends["low"] / 2)
    assert both["high"] == pytest.approx(ends["high"] / 2)


def test_the_interval_leaves_out_a_fortieth_of_the_samples_at_either_end(truth):
    good, bad = run(truth, 1), run(truth, 8)
    found = paired_bootstrap([good], [bad], samples=41)
    generator = np.random.default_rng(0)
    samples = [generator.integers(0, NUM_PHOTOS, NUM_PHOTOS) for _ in range(41)]
    drawn = sorted(good.average_precision(s) - bad.average_precision(s) for s in samples)
    assert (found["low"], found["high"]) == pytest.approx((drawn[1], drawn[-2]))
    assert found["low"] < found["by_seed"][0] < found["high"]


def test_a_run_that_detects_nothing_has_an_average_precision_of_0(truth):
    nothing = MatchedRun(truth, [], "bbox")
    assert nothing.average_precision(np.arange(NUM_PHOTOS)) == 0
    good = run(truth, 1)
    found = paired_bootstrap([good], [nothing], samples=5)
    assert found["by_seed"] == [good.average_precision(np.arange(NUM_PHOTOS))]


def test_a_category_of_which_there_is_nothing_does_not_count(truth):
    want = run(truth, 3).average_precision(np.arange(NUM_PHOTOS))
    other = COCO()
    cat = {"id": 3, "name": "cat"}
    other.dataset = {**truth.dataset, "categories": [*truth.dataset["categories"], cat]}
    with contextlib.redirect_stdout(io.StringIO()):
        other.createIndex()
    assert run(other, 3).average_precision(np.arange(NUM_PHOTOS)) == want
