"""The tables of docs/evidence.md are those of the runs."""

import json
import re

import numpy as np
import pytest
from evidence import report
from evidence.picture import draw_detection
from PIL import Image


def run(arm, images, seed, ap):
    numbers = {"AP": ap, "AP50": 2 * ap, "APs": 1.0, "APm": 2.0, "APl": 3.0}
    return {
        "arm": arm,
        "images": images,
        "seed": seed,
        "learning_rate": 0.01,
        "results": {"bbox": numbers, "segm": numbers},
    }


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: page.name)
def test_the_pages_have_the_tables_of_the_files(page):
    text = page.read_text()
    assert report.with_tables(text, report.DOCS / "evidence") == text
    marks = re.findall(r"<!-- (\w+) -->", text)
    for name in set(marks) - {"end"}:
        file, _ = report.TABLES[name]
        assert (report.DOCS / "evidence" / f"{file}.json").is_file()
    assert marks.count("end") == len(marks) / 2 > 0


def test_a_table_has_means_ranges_and_differences():
    data = {
        "runs": [run("BN_frozen", 2, 1, 10.0), run("BN_frozen", 2, 2, 12.0), run("KN", 2, 1, 13.0)],
        "differences": [
            {
                **{"ours": "KN", "theirs": "BN_frozen", "images": 2, "task": task, "seeds": seeds},
                **{"difference": value, "low": -0.5, "high": 4.25},
            }
            for seeds, value in (([1], 3.0), ([2, 3], 2.0))
            for task in ("bbox", "segm")
        ],
    }
    text = report.detection_tables(data)
    assert "11.0 (10.0 to 12.0)" in text and "22.0 (20.0 to 24.0)" in text
    assert "| 1          | +3.0 (-0.5 to +4.2)" in text
    assert "| 2, 3       | +2.0 (-0.5 to +4.2)" in text and "1.0 / 2.0 / 3.0" in text
    assert "1 image per step" not in text


def test_new_runs_join_the_old_ones_and_replace_those_with_their_settings():
    def difference(seeds, value):
        names = {"ours": "KN", "theirs": "BN", "images": 2, "task": "bbox", "seeds": seeds}
        return {**names, "difference": value}

    old = {
        "runs": [run("KN", 2, 1, 1.0), run("KN", 2, 2, 2.0)],
        "differences": [difference([1], 0.1), difference([2], 0.2)],
    }
    new = {
        "runs": [run("KN", 2, 2, 3.0), run("KN", 1, 2, 4.0)],
        "differences": [difference([2], 0.3)],
    }
    data = report.added(old, new)
    found = [(r["images"], r["seed"], r["results"]["bbox"]["AP"]) for r in data["runs"]]
    assert found == [(2, 1, 1.0), (2, 2, 3.0), (1, 2, 4.0)]
    assert [(d["seeds"], d["difference"]) for d in data["differences"]] == [([1], 0.1), ([2], 0.3)]


def test_norms_that_share_nothing_have_one_result_for_all_micro_batches():
    def result(arm, size, moving, online):
        results = {"moving": {"top1": moving}, "online": {"top1": online}}
        return {"arm": arm, "micro_batch": size, "seed": 1, "results": results}

    runs = [result("GN", 1, 50.0, 50.0), result("BN", 2, 40.0, 41.0), result("BN", 64, 60.0, 61.0)]
    lines = report.classification_table({"runs": runs}).splitlines()
    assert lines[2].count("50.0 / 50.0") == 2
    assert "40.0 / 41.0 " in lines[3] and "60.0 / 61.0 " in lines[3]
    second = {**result("BN", 2, 44.0, 42.0), "seed": 2}
    assert "42.0 / 41.5 (2)" in report.classification_table({"runs": [*runs, second]})
    assert len(lines) == 4  # norms without any run have no line


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
    for arm, shift in (("KN", 0), ("BN_frozen", 12)):
        folder = tmp_path / "runs" / f"{arm}_2im_seed1"
        (folder / "inference" / "val").mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(run(arm, 2, 1, 1.0)))
        found = [
            {
                **{"image_id": i, "category_id": 1, "score": 0.9, "bbox": [10 + shift, 10, 30, 30]},
                "segmentation": {"size": [100, 100], "counts": rle(10 + shift)},
            }
            for i in range(4)
        ]
        (folder / "inference" / "val" / "coco_instances_results.json").write_text(json.dumps(found))
    data = report.collect_detection(tmp_path / "runs", str(tmp_path / "truth.json"), samples=5)
    assert len(data["runs"]) == 2
    # An overlap of 18 / 42: a match at no threshold.
    assert {d["task"]: d["difference"] for d in data["differences"]} == {"bbox": 100, "segm": 100}


def rle(left):
    import numpy as np
    from pycocotools import mask

    image = np.zeros((100, 100), np.uint8, order="F")
    image[10:40, left : left + 30] = 1
    return mask.encode(image)["counts"].decode()


def test_learning_rates_are_compared():
    runs = [run("KN", 2, 1, 3.0), {**run("BN", 2, 1, 1.0), "learning_rate": 0.02}]
    lines = report.choice_table({"runs": runs}).splitlines()
    assert "0.01" in lines[0] and "0.02" in lines[0]
    assert "1.0 / 1.0" in lines[2] and "not run" in lines[2] and "3.0 / 3.0" in lines[3]


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


def test_the_paper_stands_beside_our_runs_and_has_no_part_in_them():
    def result(arm, size, seed, top1):
        results = {"moving": {"top1": top1}, "online": {"top1": 0.0}}
        return {"arm": arm, "micro_batch": size, "seed": seed, "results": results}

    runs = [result("BRN", 2, 1, 40.0), result("BRN", 2, 2, 41.0), result("WN", 1, 1, 30.0)]
    header, _, *lines = report.against_paper_table({"runs": runs}).splitlines()
    cells = {row[0]: row[1:] for row in ([c.strip() for c in li.split("|")[1:-1]] for li in lines)}
    assert cells["BRN"][:3] == ["40.5 (2)", "not run", "90.4"]
    assert cells["WN"][:3] == ["30.0", "30.0", "87.8"]
    assert "ours, 64" in header and "paper, Inception, 2" in header
    # The rows of the other table are those of the picture.
    assert "BRN" not in report.classification_table({"runs": runs + [result("BN", 2, 1, 1.0)]})
