"""The results of a benchmark as tables, as JSON and as pictures."""

import datetime
import json
import os
import platform
from typing import Dict, List

import detectron2
import torch
import torchvision
from matplotlib import colormaps
from matplotlib.figure import Figure
from tabulate import tabulate

import kn_detectron
from kn_detectron.files import atomic_write
from kn_detectron.layers import triton as kernels

from .presets import WHATS

__all__ = [
    "describe_machine",
    "draw_bars",
    "draw_curves",
    "format_group",
    "format_summary",
    "write_json",
]


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return triton.__version__


def _describe_kernels() -> Dict:
    """Triton, and whether its kernels are switched off, and which did not pass their check so far."""
    return {
        "triton": _triton_version(),
        "kernels_off": kernels.switched_off(),
        "kernels_refused": kernels.refused(),
    }


def describe_machine() -> Dict:
    """What the figures depend on besides the code: hardware, threads, versions and kernels."""
    gpu = torch.cuda.is_available()
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "cuda": torch.version.cuda if gpu else None,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "tf32_matmul": torch.backends.cuda.matmul.allow_tf32 if gpu else None,
        "tf32_convolutions": torch.backends.cudnn.allow_tf32 if gpu else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **_describe_kernels(),
        "torchvision": torchvision.__version__,
        "detectron2": detectron2.__version__,
        "kn_detectron": kn_detectron.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _label(name: str) -> str:
    """A candidate's name, or the name of its config file without folder and ending."""
    return os.path.basename(name).removesuffix(".yaml")


def _times(numbers) -> str:
    return "x".join(str(number) for number in numbers)


def _subject(group: Dict) -> str:
    """What a group measures, without its :func:`_setting`."""
    what, (count, channels, *side) = group["what"], group["shape"]
    kernel = _times([group["kernel"]] * 2)
    if what == "layer":
        return _times(group["shape"])
    if what == "prediction":
        return "R50-C4, @ pixels of the image"
    if what == "size":
        return f"image of {group['at']} pixels, {kernel} convolution, {channels} channels"
    if what == "channels":
        return f"{channels} channels, {kernel} convolution, map of {_times(side)}"
    regions = f", {group['regions']} regions each" if what == "step" and group["regions"] else ""
    return f"{count} image{'s' * (count != 1)} of {_times(side)}{regions}"


def _setting(group: Dict) -> str:
    return f"{group['dtype']}, {group['memory_format']}, {group['device']}"


def describe_group(group: Dict) -> str:
    """What a group measures, in a line."""
    return f"{group['what']}: {_subject(group)}, {_setting(group)}"


def _bytes(row: Dict) -> int:
    return row["saved_bytes"] if row["peak_bytes"] is None else row["peak_bytes"]


def _launches(row: Dict) -> str:
    found = row["launches"]
    return f"{found['forward']} + {found['backward']}" if found else "-"


def format_group(group: Dict) -> str:
    """A group's result as a table in Markdown.

    Times are in milliseconds, with their quartiles. Memory is the peak of a run on a GPU, and what
    is saved for the backward on a CPU, with the ratio to the first base in brackets. Launches, of
    forward + backward, are kernels on a GPU and operations on a CPU.
    """
    measured = {row["name"]: row for row in group["rows"] if row["status"] == "measured"}
    bases = [base for base in group["bases"] if base in measured]
    memory = "peak MiB" if group["device"] == "cuda" else "saved MiB"
    launches = "launches" if group["device"] == "cuda" else "operations"
    head = ["", "ms", *(f"/ {_label(base)}" for base in bases), memory, launches]
    table = []
    for row in group["rows"]:
        if row["status"] != "measured":
            continue
        ms = {key: 1e3 * value for key, value in row["seconds"].items()}
        cells = [_label(row["name"]), f"{ms['median']:.4g} ({ms['q1']:.4g} to {ms['q3']:.4g})"]
        for base in bases:
            ratio = row["ratios"][base]
            cells.append(f"{ratio['median']:.3f} ({ratio['q1']:.3f} to {ratio['q3']:.3f})")
        size = f"{_bytes(row) / 2**20:.4g}"
        if bases and _bytes(measured[bases[0]]):
            size += f" ({_bytes(row) / _bytes(measured[bases[0]]):.3f})"
        table.append([*cells, size, _launches(row)])
    lines = [f"**{describe_group(group)}**", ""]
    if group.get("kernels_refused"):
        lines += [f"Without Triton's kernels {', '.join(group['kernels_refused'])}.", ""]
    if measured:
        lines += [_markdown(head, table), ""]
    for row in group["rows"]:
        if row["status"] != "measured":
            lines.append(f"- {_label(row['name'])}: {row['status']}: {row['reason']}")
    return "\n".join(lines).rstrip() + "\n"


def format_summary(groups: List[Dict]) -> str:
    """The ratios of all groups to their first base, in one table in Markdown for each measurement.

    A line is a group, and a column is a norm. "-" stands for a norm that was not measured.
    """
    parts = {}
    for group in groups:
        if group["what"] not in ("prediction", "size", "channels"):
            parts.setdefault((group["what"], group["bases"][0], group["device"]), []).append(group)
    tables = []
    for (what, base, device), part in parts.items():
        rows = (row for group in part for row in group["rows"] if base in row.get("ratios", {}))
        names = [name for name in dict.fromkeys(row["name"] for row in rows) if name != base]
        head = [f"{WHATS[what]}, time / {_label(base)}, {device}", *map(_label, names)]
        table = []
        for group in part:
            rows = {row["name"]: row.get("ratios", {}).get(base) for row in group["rows"]}
            subject = f"{_subject(group)}, {group['dtype']}, {group['memory_format']}"
            ratios = (rows.get(name) for name in names)
            table.append([subject, *(f"{r['median']:.2f}" if r else "-" for r in ratios)])
        if names:
            tables.append(_markdown(head, table) + "\n")
    return "\n".join(tables)


def _markdown(head: List[str], rows: List[List[str]]) -> str:
    return tabulate(rows, head, "github", disable_numparse=True)


def write_json(result: Dict, path: str) -> None:
    """Writes a result. If this is interrupted, the old file stays.

    A kernel is checked when it is first used, after the machine was described. So the kernels are
    described once more.
    """
    if "machine" in result:
        result = {**result, "machine": {**result["machine"], **_describe_kernels()}}
    with atomic_write(path) as file:
        file.write(json.dumps(result, indent=1).encode())


def draw_bars(groups: List[Dict], path: str) -> None:
    """Draws each measured candidate's ratio to the first base of its group, with quartiles.

    If there is nothing to draw, no file is written.
    """
    shown = {}
    for group in groups:
        rows = [row for row in group["rows"] if group["bases"][0] in row.get("ratios", {})]
        if rows and group["what"] not in ("size", "channels"):
            key = f"{WHATS[group['what']]}\n{_setting(group)}", group["bases"][0]
            shown.setdefault(key, []).append((group, rows))
    if not shown:
        return
    names = [row["name"] for part in shown.values() for _, rows in part for row in rows]
    colors = {name: colormaps["tab20"](i % 20) for i, name in enumerate(dict.fromkeys(names))}
    widest = max(sum(len(rows) + 1 for _, rows in part) for part in shown.values())
    figure = Figure(figsize=(max(8, 0.3 * widest), 3.2 * len(shown)), layout="constrained")
    parts = zip(figure.subplots(len(shown), 1, squeeze=False).flat, shown.items())
    for axes, ((title, base), part) in parts:
        at, ticks = 0, {}
        for group, rows in part:
            ticks[at + (len(rows) - 1) / 2] = _subject(group).replace(", ", "\n")
            for row in rows:
                median, q1, q3 = (row["ratios"][base][key] for key in ("median", "q1", "q3"))
                spread = [[median - q1], [q3 - median]]
                axes.bar(at, median, yerr=spread, color=colors[row["name"]], capsize=2)
                axes.text(
                    at, 0, f" {_label(row['name'])}", rotation=90, ha="center", va="bottom", size=7
                )
                at += 1
            at += 1
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_xticks(list(ticks), ticks.values(), fontsize=8)
        axes.set(xlim=(-1, widest - 1), ylabel=f"time / {_label(base)}")
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.3, axis="y")
    figure.savefig(path, dpi=120)


def draw_curves(groups: List[Dict], path: str) -> None:
    """Draws time over image size and over channels, of prediction and layer.

    If there is nothing to draw, no file is written.
    """
    parts = {}
    for group in groups:
        for row in group["rows"]:
            if group["what"] in ("size", "channels") and row["status"] == "measured":
                points = parts.setdefault(group["what"], {}).setdefault(row["name"], [])
                points.append((group["at"], 1e3 * row["seconds"]["median"]))
    if not parts:
        return
    figure = Figure(figsize=(5.5 * len(parts), 4.2), layout="constrained")
    all_axes = figure.subplots(1, len(parts), squeeze=False).flat
    for axes, (what, lines) in zip(all_axes, parts.items()):
        for name, points in lines.items():
            kind = "layer" if name in ("KN", "BN") else "prediction"
            axes.plot(*zip(*sorted(points)), "o-", label=f"{kind}: {name}")
        part = [group for group in groups if group["what"] == what]
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="image size in pixels" if what == "size" else "channels",
            ylabel="ms, forward and backward",
            title=_subject(part[0]).split(", ", 1)[1],
        )
        ticks = sorted({group["at"] for group in part})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
