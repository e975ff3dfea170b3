import json
import re
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from PIL import Image

from benchmark import (
    Group,
    describe_machine,
    draw_bars,
    draw_curves,
    format_group,
    format_summary,
    write_json,
)
from kn_detectron.layers import triton


def row(name, seconds, ratio, **fields):
    spread = {"median": ratio, "q1": ratio - 0.125, "q3": ratio + 0.25}
    measured = dict(
        name=name,
        status="measured",
        seconds={"median": seconds, "q1": seconds / 2, "q3": seconds * 2},
        ratios={"BN": spread},
        launches={"forward": 6, "backward": 10},
        saved_bytes=3 * 2**20,
        peak_bytes=None,
    )
    return {**measured, **fields}


def result(group, rows, device="cpu"):
    return {**asdict(group), "device": device, "rows": rows}


def layer_result(device="cpu", **fields):
    group = Group("layer", ("BN", "KN", "SyncBN"), ("BN",), (1, 64, 8, 9))
    rows = [
        row("BN", 0.002, 1.0, **fields),
        row("KN", 0.003, 1.5, saved_bytes=6 * 2**20, **fields),
        dict(name="SyncBN", status="not run", reason="no GPU"),
    ]
    return result(group, rows, device)


def curve_results():
    return [
        result(
            Group("size", ("closed form", "KN"), ("closed form",), (1, 4, 2, 2), at=at),
            [row("closed form", 0.001, 1.0), row("KN", 1e-5 * at, 1.0)],
        )
        for at in (200, 400)
    ]


def test_table_has_times_ratios_memory_launches_and_what_was_not_run():
    title, _, head, _, bn, kn, _, missing = format_group(layer_result()).splitlines()
    assert title == "**layer: 1x64x8x9, float32, contiguous, cpu**"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, bn, kn)]
    assert cells[0] == ["", "ms", "/ BN", "saved MiB", "operations"]
    assert cells[1] == ["BN", "2 (1 to 4)", "1.000 (0.875 to 1.250)", "3 (1.000)", "6 + 10"]
    assert cells[2] == ["KN", "3 (1.5 to 6)", "1.500 (1.375 to 1.750)", "6 (2.000)", "6 + 10"]
    assert missing == "- SyncBN: not run: no GPU"
    assert len({len(line) for line in (head, bn, kn)}) == 1


def test_table_of_a_gpu_has_the_peak_and_kernels():
    table = format_group(layer_result("cuda", peak_bytes=5 * 2**20, launches=None))
    table = re.sub(" +", " ", table)
    assert "| peak MiB | launches |" in table and "saved" not in table
    assert table.count("| 5 (1.000) | - |") == 2


def test_table_of_nothing_but_reasons():
    group = layer_result()
    group["rows"] = group["rows"][2:]
    lines = format_group(group).splitlines()
    assert lines[1:] == ["", "- SyncBN: not run: no GPU"]


def test_table_names_the_kernels_that_were_refused():
    group = {
        **layer_result(),
        "kernels_refused": ["Rectify (16,) on cuda:0", "Filter (1,) on cuda:0"],
    }
    title, _, refused, _, head, *_ = format_group(group).splitlines()
    assert refused == "Without Triton's kernels Rectify (16,) on cuda:0, Filter (1,) on cuda:0."
    assert head.startswith("|")


def test_the_machine_has_its_kernels(monkeypatch):
    monkeypatch.setattr(triton, "_verdicts", {})
    for value, off in (("1", False), ("0", True)):
        monkeypatch.setenv("KN_DETECTRON_TRITON", value)
        assert describe_machine()["kernels_off"] is off
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="1.2.3"))
    assert describe_machine()["triton"] == "1.2.3"
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    assert describe_machine()["triton"] == "none"


def test_json_has_the_kernels_that_were_refused_after_the_machine_was_described(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(triton, "_verdicts", {})
    content = {"machine": describe_machine(), "groups": []}
    assert content["machine"]["kernels_refused"] == []
    triton._verdicts["Rectify", (16,), "cuda:0"] = False
    write_json(content, str(tmp_path / "benchmark.json"))
    machine = json.loads((tmp_path / "benchmark.json").read_text())["machine"]
    assert machine == {**content["machine"], "kernels_refused": ["Rectify (16,) on cuda:0"]}


def test_json_is_whole_or_the_old_one(tmp_path):
    path = tmp_path / "benchmark.json"
    content = {"machine": describe_machine(), "groups": [layer_result()]}
    write_json(content, str(path))
    read = json.loads(path.read_text())
    assert read["groups"][0]["rows"][1]["ratios"]["BN"]["median"] == 1.5
    assert {"cpu", "threads", "torch", "detectron2", "gpu", "date"} <= set(read["machine"])
    with pytest.raises(TypeError):
        write_json({"groups": object()}, str(path))
    assert json.loads(path.read_text()) == read
    assert [p.name for p in tmp_path.iterdir()] == ["benchmark.json"]


def test_pictures_are_drawn_where_there_is_something_to_draw(tmp_path):
    bars, curves = str(tmp_path / "ratios.png"), str(tmp_path / "curves.png")
    draw_bars([layer_result(), layer_result(), *curve_results()], bars)
    draw_curves([layer_result(), *curve_results()], curves)
    for path in (bars, curves):
        with Image.open(path) as picture:
            assert min(picture.size) > 200
    nothing = layer_result()
    nothing["rows"] = nothing["rows"][2:]
    draw_bars([nothing, *curve_results()], str(tmp_path / "a.png"))
    unmeasured = {**curve_results()[0], "rows": nothing["rows"]}
    draw_curves([nothing, unmeasured], str(tmp_path / "b.png"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "ratios.png"]


def test_summary_has_a_line_for_each_group_and_a_column_for_each_norm():
    other = layer_result()
    other["rows"] = other["rows"][:1]
    other["dtype"] = "bfloat16"
    head, _, first, second = format_summary([layer_result(), other, *curve_results()]).splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in (head, first, second)]
    assert cells[0] == ["one layer, forward and backward, time / BN, cpu", "KN"]
    assert cells[1] == ["1x64x8x9, float32, contiguous", "1.50"]
    assert cells[2] == ["1x64x8x9, bfloat16, contiguous", "-"]
    assert format_summary(curve_results()) == ""


def test_a_config_goes_by_its_name():
    group = layer_result()
    group["rows"][1]["name"] = "configs/mine.yaml"
    assert "| mine " in format_group(group)
    assert format_summary([group]).splitlines()[0].split("|")[2].strip() == "mine"
