"""Top-1 over the number of images that share statistics."""

from pathlib import Path
from statistics import mean
from typing import Dict

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  # after the choice of the backend

from .classification import ARMS  # noqa: E402

__all__ = ["draw_classification"]


def draw_classification(data: Dict, path: Path) -> None:
    """Draws one line per norm, with moving (left) and with online statistics (right).

    Args:
        data: ``runs`` of tools/evidence/classification.py.
        path: of the picture.
    """
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    sizes = sorted({r["micro_batch"] for r in data["runs"] if ARMS[r["arm"]].shares})
    for axis, (kind, title) in zip(
        axes, (("moving", "moving averages (Option A)"), ("online", "the batch's own (Option B)"))
    ):
        for name, arm in ARMS.items():
            tops: Dict[int, list] = {}
            for run in data["runs"]:
                if run["arm"] == name:
                    tops.setdefault(run["micro_batch"], []).append(run["results"][kind]["top1"])
            if not tops:
                continue
            if arm.shares:
                points = [(size, mean(tops[size])) for size in sorted(tops)]
            else:
                points = [(size, mean(tops[1])) for size in sizes]
            axis.plot(*zip(*points), marker="o" if arm.shares else None, label=arm.label)
        axis.set(title=title, xlabel="images that share statistics", xscale="log")
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("top-1, percent")
    axes[1].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)
