"""The tables of docs/evidence/ are those of the runs."""

import json
import re
import shutil

import numpy as np
import pytest
from evidence import report
from evidence.picture import draw_detection
from PIL import Image

from kn_detectron import InputError

from .results import run


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: page.name)
def test_the_pages_have_the_tables_of_the_files(page):
    text = page.read_text()
    assert report.with_tables(text, report.DOCS / "evidence") == text
    marks = re.findall(r"<!-- (\w+) -->", text)
    for name in set(marks) - {"end"}:
        _, *files = report.TABLES[name]
        assert all((report.DOCS / "evidence" / f"{file}.json").is_file() for file in files)
    assert marks.count("end") == len(marks) / 2 > 0


def difference(seeds, value):
    names = {"ours": "KN", "theirs": "BN", "images": 2, "task": "bbox", "seeds": seeds}
    return {**names, "learning_rates": [0.01, 0.01], "by_seed": [value] * len(seeds)}


def test_new_runs_join_the_old_ones_and_replace_those_with_their_settings():
    old = {
        "runs": [run("KN", 2, 1, 1.0), run("KN", 2, 2, 2.0)],
        "differences": [difference([1], 0.1), difference([2], 0.2), difference([1, 2], 0.15)],
    }
    new = {
        "runs": [run("KN", 2, 2, 3.0), run("KN", 1, 2, 4.0)],
        "differences": [difference([2], 0.3)],
    }
    data = report.added(old, new)
    found = [(r["images"], r["seed"], r["results"]["bbox"]["AP"]) for r in data["runs"]]
    assert found == [(2, 1, 1.0), (2, 2, 3.0), (1, 2, 4.0)]
    found = [(d["seeds"], d["by_seed"]) for d in data["differences"]]
    assert found == [([1], [0.1]), ([2], [0.3])]


def test_a_run_of_another_schedule_does_not_replace_one():
    run = dict(arm="BN", images=2, seed=1, learning_rate=0.1, steps=800)
    report.check_schedules({"runs": [run]}, {"runs": [run, {**run, "seed": 2, "steps": 900}]})
    with pytest.raises(InputError, match="A run of BN has 3000 steps, .* has 800"):
        report.check_schedules({"runs": [run]}, {"runs": [{**run, "steps": 3000}]})


def test_a_run_that_repeats_the_old_results_leaves_its_differences():
    kept = [difference([1, 2], 0.15), {**difference([1], 0.4), "task": "segm"}]
    old = {"runs": [run("KN", 2, 1, 1.0)], "differences": [difference([1], 0.1), *kept]}
    new = {"runs": [run("KN", 2, 1, 1.0)], "differences": [difference([1, 3], 0.3)]}
    assert report.added(old, new)["differences"] == [*kept, difference([1, 3], 0.3)]


def test_results_that_are_collected_again_are_there_once():
    data = {
        "runs": [run("KN", 2, 1, 1.0), run("KN", 2, 2, 2.0)],
        "differences": [difference([1], 0.1), difference([1, 2], 0.15)],
    }
    assert report.added(data, data) == data


def test_a_run_that_was_repeated_beside_others_leaves_the_old_one_and_is_kept():
    old = {"runs": [run("BN", 2, 1, 1.0)], "differences": [difference([1], 0.1)]}
    repeat, other = run("BN", 2, 1, 1.5), run("BN", 2, 2, 2.0)
    new = {"runs": [repeat, other], "differences": [difference([2], 0.3)]}
    data = report.added(old, report.without_repeats(old, new, ["BN"]))
    assert data["runs"] == [*old["runs"], other] and data["again"] == [repeat]
    assert [d["by_seed"] for d in data["differences"]] == [[0.1], [0.3]]
    assert report.added(data, {"runs": []})["again"] == [repeat]
    assert report.added(data, report.without_repeats(old, new, ["BN"]))["again"] == [repeat]
    assert report.without_repeats(old, new, [])["runs"] == [repeat, other]
    assert report.without_repeats(data, {"runs": [other]}, ["BN"]) == {"runs": [other], "again": []}


def test_results_of_runs_are_collected_with_their_differences(tmp_path):
    truth = {
        "images": [{"id": i, "width": 100, "height": 100} for i in range(4)],
        "categories": [{"id": 1, "name": "person"}],
        "annotations": [
            {
                **{"id": i + 1, "image_id": i, "category_id": 1, "iscrowd": 0, "area": 900.0},
                **{"bbox": [10, 10, 30, 30], "segmentation": [[10, 10, 40, 10, 40, 40, 10, 40]]},
            }
            for i in range(4)
        ],
    }
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    for arm, shift, rate in (("KN", 0, 0.01), ("BN_frozen", 12, 0.01), ("BN_frozen", 0, 0.02)):
        folder = tmp_path / "runs" / str(rate) / f"{arm}_2im_seed1"
        (folder / "inference" / "val").mkdir(parents=True)
        (folder / "result.json").write_text(
            json.dumps({**run(arm, 2, 1, 1.0), "learning_rate": rate})
        )
        found = [
            {
                **{"image_id": i, "category_id": 1, "score": 0.9, "bbox": [10 + shift, 10, 30, 30]},
                "segmentation": {"size": [100, 100], "counts": rle(10 + shift)},
            }
            for i in range(4)
        ]
        (folder / "inference" / "val" / "coco_instances_results.json").write_text(json.dumps(found))
    data = report.collect_detection(tmp_path / "runs", str(tmp_path / "truth.json"), samples=5)
    assert len(data["runs"]) == 3
    found = {(d["task"], *d["learning_rates"]): d["by_seed"] for d in data["differences"]}
    # An overlap of 18 / 42: a match at no threshold.
    assert found == {
        (task, 0.01, rate): [value]
        for task in ("bbox", "segm")
        for rate, value in ((0.01, 100), (0.02, 0))
    }

    (tmp_path / "runs" / "again").mkdir()
    shutil.copytree(folder, tmp_path / "runs" / "again" / folder.name)
    with pytest.raises(InputError, match="seed of another run .* each run once"):
        report.collect_detection(tmp_path / "runs", str(tmp_path / "truth.json"), samples=5)


def rle(left):
    import numpy as np
    from pycocotools import mask

    image = np.zeros((100, 100), np.uint8, order="F")
    image[10:40, left : left + 30] = 1
    return mask.encode(image)["counts"].decode()


def test_the_pictures_show_every_run(tmp_path):
    few = {"runs": [run("BN_frozen", 2, 1, 10.0)]}
    more = {"runs": [*few["runs"], run("KN", 2, 1, 13.0)]}
    heights = []
    for name, data in (("few", few), ("more", more)):
        draw_detection(data, tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as picture:
            heights.append(picture.height)
            pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3).astype(int)
        blue = ((pixels[:, 2] - pixels[:, 0]) > 80).any()
        assert blue == (name == "more")  # the bar of KN
    assert heights[0] < heights[1]
