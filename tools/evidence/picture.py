"""The pictures of docs/evidence/."""

from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Dict, List, Union

from matplotlib.figure import Figure

from . import arms
from .classification import CIFAR
from .leads import Lead, interval_over_seeds
from .tables import TASKS, by_setting, images_text, run_label

__all__ = ["draw_classification", "draw_detection", "draw_gaps", "draw_leads"]


def draw_detection(data: Dict, path: Path) -> None:
    """Draws the box and mask AP of each run, and the means as bars.

    There is one row for each arm, number of images per step and learning rate.

    Args:
        data: ``runs`` of tools/evidence/detection.py.
        path: of the picture.
    """
    groups = by_setting(data)
    figure = Figure(figsize=(10, 0.9 + 0.45 * len(groups)))
    axes = figure.subplots(1, 2, sharey=True)
    rows = list(reversed(groups.items()))
    for axis, (task, title) in zip(axes, (("bbox", "box AP"), ("segm", "mask AP"))):
        for row, ((name, *_), runs) in enumerate(rows):
            values = [run["results"][task]["AP"] for run in runs]
            is_kn = arms.ARMS[name].label.startswith("KN")
            axis.barh(row, mean(values), color="C0" if is_kn else "0.75")
            axis.plot(values, [row] * len(values), "o", color="black", markersize=4)
        axis.set(title=title, xlim=(0, None))
        axis.grid(axis="x", alpha=0.3)
    labels = [
        f"{arms.ARMS[name].label}: {images_text(images)}, rate {rate}"
        for (name, images, rate), _ in rows
    ]
    axes[0].set_yticks(range(len(rows)), labels)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def draw_leads(leads: List[Lead], path: Path) -> None:
    """Draws the leads of KN by seed (dots), their means (lines), and the intervals over seeds.

    Args:
        leads: one row each, below the network and the number of steps.
        path: of the picture.
    """
    rows: List[Union[str, Lead]] = []
    for network, group in groupby(leads, key=lambda lead: f"{lead.network}, {lead.steps} steps"):
        rows += [network, *group]
    figure = Figure(figsize=(10, 1 + 0.27 * len(rows)))
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    for axis, (task, title) in zip(axes, TASKS.items()):
        for row, lead in enumerate(rows):
            if isinstance(lead, str):  # a heading
                continue
            values = list(lead.by_seed[task].values())
            if len(values) > 2:
                interval = interval_over_seeds(values)
                axis.plot(interval, [row, row], color="C0", linewidth=6, alpha=0.3)
            axis.plot([mean(values)] * 2, [row - 0.3, row + 0.3], color="C0", linewidth=2)
            axis.plot(values, [row] * len(values), "o", color="black", markersize=4)
        axis.axvline(0, color="black", linewidth=1)
        axis.set(title=f"{title} AP of KN minus that of")
        axis.grid(axis="x", alpha=0.3)
    labels = [
        row if isinstance(row, str) else f"{row.against}, {images_text(row.images)}, {row.rates}"
        for row in rows
    ]
    axes[0].set_yticks(range(len(rows)), labels)
    for label, row in zip(axes[0].get_yticklabels(), rows):
        label.set_fontweight("bold" if isinstance(row, str) else "normal")
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def draw_classification(data: Dict, path: Path) -> None:
    """Draws one line per norm, with moving (left) and with online statistics (right).

    The lines are means over seeds, and the dots are single runs.

    Args:
        data: ``runs`` of tools/evidence/classification.py.
        path: of the picture.
    """
    figure = Figure(figsize=(10, 4))
    axes = figure.subplots(1, 2, sharey=True)
    runs = [run for run in data["runs"] if run["arm"] in CIFAR]
    sizes = sorted({run["micro_batch"] for run in runs if CIFAR[run["arm"]].shares})
    for axis, (kind, title) in zip(
        axes, (("moving", "moving averages (Option A)"), ("online", "the batch's own (Option B)"))
    ):
        for name, arm in CIFAR.items():
            tops: Dict[int, list] = {}
            for run in runs:
                if run["arm"] == name:
                    tops.setdefault(run["micro_batch"], []).append(run["results"][kind]["top1"])
            if not tops:
                continue
            if arm.shares:
                points = [(size, mean(tops[size])) for size in sorted(tops)]
            else:
                points = [(size, mean(tops[1])) for size in sizes]
            (line,) = axis.plot(*zip(*points), label=arm.label)
            if arm.shares:
                dots = [(size, top) for size in tops for top in tops[size]]
                axis.plot(*zip(*dots), "o", color=line.get_color(), markersize=4)
        axis.set(title=title, xlabel="images that share statistics", xscale="log")
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("top-1, percent")
    axes[1].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def draw_gaps(gaps: Dict[str, Dict], path: Path) -> None:
    """Draws the gap between the variance of each micro-batch and the moving one (paper, Fig. 5).

    Args:
        gaps: for each run by the name of its folder, those of tools/evidence/variance_gap.py. The
            last norm of each is drawn channel by channel.
        path: of the picture.
    """
    figure = Figure(figsize=(4.5 * (len(gaps) + 1), 4))
    axes = figure.subplots(1, len(gaps) + 1)
    last = {name: list(by_norm.values())[-1] for name, by_norm in gaps.items()}
    highest = max(gap.quantile(0.99).item() for gap in last.values())
    for axis, (name, gap) in zip(axes, last.items()):
        shown = axis.imshow(
            gap.numpy(), aspect="auto", vmin=0, vmax=highest, interpolation="nearest"
        )
        axis.set(title=run_label(name), xlabel="micro-batch", ylabel="channel of the last norm")
        figure.colorbar(shown, ax=axis)
    for name, by_norm in gaps.items():
        axes[-1].plot([gap.mean().item() for gap in by_norm.values()], "o-", label=run_label(name))
    axes[-1].set(title="average of each norm", xlabel="norm", ylim=(0, None))
    axes[-1].grid(alpha=0.3)
    axes[-1].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
