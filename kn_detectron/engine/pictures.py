"""Pictures of a run: predictions, curves, and what each layer trusts."""

import contextlib
import json
import os
from typing import Dict, List

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.utils.visualizer import Visualizer
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import nn

from ..data import build_test_loader
from ..errors import InputError
from ..layers import kalman_layers
from ..layers.modes import in_mode
from .prediction import shown

__all__ = ["BrightVisualizer", "draw_curves", "draw_gains", "draw_predictions", "read_metrics"]

# Bright and far from each other. detectron2's random colours have black, white and greys, which
# look like no mask at all on many photographs.
_COLORS = [
    *("#ff3b30", "#34c759", "#0a84ff", "#ffd60a", "#ff2dd4", "#00e5ff", "#ff9f0a", "#7d5fff"),
    *("#a8ff04", "#ff8f8f"),
]

_WIDTH = 9  # of the picture of predictions, in inches


class BrightVisualizer(Visualizer):
    """detectron2's Visualizer, with bright colours given to the objects from left to right.

    So an object mostly has the same colour in the ground truth and in every prediction, whose
    objects come in different orders.
    """

    def overlay_instances(self, *, boxes=None, assigned_colors=None, **others):
        """See detectron2's ``Visualizer.overlay_instances``."""
        if assigned_colors is None and boxes is not None and len(boxes):
            corners = self._convert_boxes(boxes)
            rank = np.argsort(np.argsort(corners[:, 0] + corners[:, 2]))
            assigned_colors = [to_rgb(_COLORS[i % len(_COLORS)]) for i in rank]
        return super().overlay_instances(boxes=boxes, assigned_colors=assigned_colors, **others)


def read_metrics(output_dir: str) -> List[Dict]:
    """The lines of ``metrics.json``, oldest first; of an iteration that was resumed, the last."""
    lines = {}
    with open(os.path.join(output_dir, "metrics.json")) as file:
        for line in file:
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # cut short by a kill or a full disk, before the run was resumed
            lines.setdefault(entry["iteration"], {}).update(entry)
    return [lines[iteration] for iteration in sorted(lines)]


def _save(figure: Figure, path: str) -> None:
    figure.savefig(path, dpi=120, bbox_inches="tight")


@torch.no_grad()
def draw_predictions(
    cfg: CfgNode, models: Dict[str, nn.Module], path: str, count: int = 4, min_score: float = 0.35
) -> None:
    """Draws the ground truth and what each model predicts on the first test images with objects.

    Args:
        cfg: its DATASETS.TEST[0] is drawn.
        models: detectron2 detectors by the title of their column; each module keeps its mode.
        path: of the picture.
        count: number of images.
        min_score: predictions below are left out.

    Raises:
        InputError: there is no such dataset, or no image of it has objects.
    """
    if not cfg.DATASETS.TEST:
        raise InputError("DATASETS.TEST is empty: name the dataset to draw.")
    name = cfg.DATASETS.TEST[0]
    metadata = MetadataCatalog.get(name)
    truth = {d["file_name"]: d for d in DatasetCatalog.get(name)}
    rows = []
    with contextlib.ExitStack() as modes:
        for model in models.values():
            modes.enter_context(in_mode(model, training=False))
        for (inputs,) in build_test_loader(cfg, name):
            record = truth[inputs["file_name"]]
            if not record["annotations"]:
                continue
            image = utils.read_image(inputs["file_name"], "RGB")
            scale = max(1.0, 320 / min(image.shape[:2]))

            def visualizer():
                return BrightVisualizer(image, metadata, scale)

            drawn = [visualizer().draw_dataset_dict(record)]
            for model in models.values():
                found = shown(model([inputs])[0]["instances"].to("cpu"), min_score)
                drawn.append(visualizer().draw_instance_predictions(found))
            rows.append(np.concatenate([picture.get_image() for picture in drawn], axis=1))
            if len(rows) == count:
                break
    if not rows:
        raise InputError(f"No image of the dataset {name} has objects: name another one to draw.")
    titles = ["ground truth", *models]
    heights = [row.shape[0] / row.shape[1] for row in rows]
    figure = Figure(figsize=(_WIDTH, _WIDTH * sum(heights)), layout="constrained")
    ratios = {"height_ratios": heights}
    places = figure.subplots(len(rows), 1, squeeze=False, gridspec_kw=ratios).flatten()
    for axes, row in zip(places, rows):
        axes.imshow(row)
        axes.axis("off")
    places[0].axis("on")
    width = rows[0].shape[1] / len(titles)
    places[0].set_xticks([(k + 0.5) * width for k in range(len(titles))], titles)
    places[0].set_yticks([])
    places[0].spines[:].set_visible(False)
    places[0].tick_params(top=False, labeltop=True, bottom=False, labelbottom=False)
    _save(figure, path)


def draw_curves(output_dir: str, path: str) -> None:
    """Draws the losses of a run, and its APs where it was evaluated, over the iterations.

    Args:
        output_dir: of the run, with its ``metrics.json``.
        path: of the picture.
    """
    metrics = read_metrics(output_dir)
    figure = Figure(figsize=(11, 4))
    losses, aps = figure.subplots(1, 2)
    names = sorted({key for entry in metrics for key in entry if "loss" in key})
    for key in names:
        points = [(e["iteration"], e[key]) for e in metrics if key in e]
        losses.plot(*zip(*points), label=key, linewidth=2 if key == "total_loss" else 1)
    losses.set(xlabel="iteration", ylabel="loss", title="training losses")
    losses.legend(fontsize=8)
    for key in ("bbox/AP", "bbox/AP50", "segm/AP", "segm/AP50"):
        points = [(e["iteration"], e[key]) for e in metrics if key in e]
        if points:
            aps.plot(*zip(*points), "o-", label=key)
    aps.set(xlabel="iteration", ylabel="AP in percent", title="COCO evaluation", ylim=(0, None))
    if aps.has_data():
        aps.legend(fontsize=8)
    for axes in (losses, aps):
        axes.grid(alpha=0.3)
    _save(figure, path)


def draw_gains(output_dir: str, model: nn.Module, path: str) -> None:
    """Draws what each layer trusts: its gain, and how far its measurements are from its prior.

    The gain is the one in effect, as annealing has scaled it.

    Args:
        output_dir: of the run, with the innovations in its ``metrics.json``.
        model: after the run.
        path: of the picture.
    """
    gains = {name: layer.gain.item() for name, layer in kalman_layers(model).items()}
    latest = {}
    for entry in read_metrics(output_dir):
        latest.update(entry)
    figure = Figure(figsize=(max(8, 0.2 * len(gains)), 6))
    axes = figure.subplots(3, 1, sharex=True)
    at = range(len(gains))
    axes[0].bar(at, gains.values(), color="tab:blue")
    axes[0].set(ylabel="gain q", title="weight of the measurement against the prediction, by layer")
    if not any(gains.values()):  # as at the end of an annealed run
        axes[0].set_ylim(0, 1)
        said = "all gains are 0: each layer normalises by its prediction alone"
        axes[0].text(0.5, 0.5, said, ha="center", va="center", transform=axes[0].transAxes)
    for row, kind, label in (
        (axes[1], "innovation_mean", "|mean innovation|\n(prior std)"),
        (axes[2], "innovation_logvar", "|log variance\nratio|"),
    ):
        row.bar(at, [latest.get(f"kn/{kind}/{name}", 0.0) for name in gains], color="tab:orange")
        row.set_ylabel(label)
    short = [
        n.replace("backbone.", "").replace("roi_heads.", "").replace(".norm", "") for n in gains
    ]
    axes[2].set_xticks(at, short, rotation=90, fontsize=6)
    for row in axes:
        row.grid(alpha=0.3, axis="y")
    _save(figure, path)
