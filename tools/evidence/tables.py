"""The tables of docs/evidence/, README and MODEL_ZOO.md in Markdown, from the results of runs."""

import re
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Dict, List, Tuple

from tabulate import tabulate

from kn_detectron.model_zoo import get_config, released_weights

from . import arms, classification
from .leads import COMPARED, by_comparison, interval_over_seeds, kn_leads

__all__ = [
    "TASKS",
    "against_paper_table",
    "by_setting",
    "choice_table",
    "classification_table",
    "detection_tables",
    "drift_table",
    "images_text",
    "leads_table",
    "run_label",
    "similarity_table",
    "summary_table",
    "variance_gap_table",
    "zoo_table",
]

TASKS = {"bbox": "box", "segm": "mask"}
# The paper's top-1 on CIFAR-10 (Tables 7 and 8), by arm.
PAPER_NETWORKS = ("Inception, 2", "Inception, 128", "ResNet-32, 2", "ResNet-110, 128")
PAPER = {
    "BN": ("89.4", "92.1", "91.2", "93.8"),
    "BRN": ("90.4", "", "", ""),
    "WN": ("87.8", "", "", ""),
    "LN": ("77.7", "", "", ""),
    "GN": ("", "", "91.3", "92.6"),
    "GKN": ("", "", "", ""),
    "KN": ("90.9", "", "92.7", "94.3"),
    "KN_annealed": ("", "", "", ""),
    "KN_gain0": ("", "", "", ""),
}
_NOT_RUN = "not run"
_SEED_HEADER = ("box, by seed", "box", "mask, by seed", "mask")
# GitHub shows what is between these marks when a reader asks for it.
_FOLDED = """<details><summary>{}</summary>

{}

</details>"""


def detection_tables(data: Dict) -> str:
    """The tables of the detectors in Markdown: means and differences by images per step."""
    parts = []
    for images in sorted({run["images"] for run in data["runs"]}, reverse=True):
        rows = [
            [arms.ARMS[name].label, rate, len(runs), *_average_precisions(runs)]
            for (name, of_images, rate), runs in by_setting(data).items()
            if of_images == images
        ]
        header = [
            "norm",
            "learning rate",
            "seeds",
            "box AP",
            "mask AP",
            "box AP50",
            "mask AP50",
            "box APs / m / l",
        ]
        what = f"{images_text(images)} per step"
        parts.append(f"**{what}**, mean (lowest to highest of the seeds):")
        parts.append(tabulate(rows, header, tablefmt="github", disable_numparse=True))
        rows = _seed_rows(data, images)
        if rows:
            parts.append(
                f"Differences at {what}, in AP, by seed, and their mean; from three seeds on with its"
                " 95% interval over seeds:"
            )
            header = ["", "seeds", *_SEED_HEADER]
            parts.append(tabulate(rows, header, tablefmt="github", disable_numparse=True))
            rows = _difference_rows(data, images)
            header = ["", "of seeds", "box", "mask"]
            table = tabulate(rows, header, tablefmt="github", disable_numparse=True)
            summary = "The same with the 95% interval over photographs, by what ran side by side"
            parts.append(_FOLDED.format(summary, table))
    return _escaped("\n\n".join(parts))


def by_setting(data: Dict) -> Dict[Tuple[str, int, float], List[Dict]]:
    """The runs that differ in their seed only, by (arm, images per step, learning rate).

    The most images per step come first, then the arms as arms.py has them, then the lowest rate.
    """
    found: Dict[Tuple[str, int, float], List[Dict]] = {}
    for run in data["runs"]:
        found.setdefault((run["arm"], run["images"], run["learning_rate"]), []).append(run)
    names = list(arms.ARMS)
    order = sorted(found, key=lambda setting: (-setting[1], names.index(setting[0]), setting[2]))
    return {setting: found[setting] for setting in order}


def images_text(count: int) -> str:
    """A number of images, in words."""
    return "1 image" if count == 1 else f"{count} images"


def _rates(data: Dict, name: str, images: int) -> List[float]:
    """The learning rates at which an arm was run with so many images per step."""
    return [rate for *what, rate in by_setting(data) if what == [name, images]]


def _average_precisions(runs: List[Dict]) -> List[str]:
    def values(task, key):
        return [run["results"][task][key] for run in runs]

    def spread(task, key):
        found = values(task, key)
        text = f"{mean(found):.1f}"
        return f"{text} ({min(found):.1f} to {max(found):.1f})" if len(found) > 1 else text

    sizes = " / ".join(f"{mean(values('bbox', key)):.1f}" for key in ("APs", "APm", "APl"))
    overall = [spread(task, key) for key in ("AP", "AP50") for task in TASKS]
    return [*overall, sizes]


def _difference_rows(data: Dict, images: int) -> List[List]:
    def place(difference):
        pair = COMPARED.index((difference["ours"], difference["theirs"]))
        return pair, difference["learning_rates"], difference["seeds"]

    differences = [d for d in data["differences"] if d["images"] == images]
    rows = []
    for (pair, rates, seeds), found in groupby(sorted(differences, key=place), key=place):
        by_task = {d["task"]: d for d in found}
        cells = [
            _with_interval(mean(d["by_seed"]), d["low"], d["high"])
            for d in (by_task[task] for task in TASKS)
        ]
        names = _comparison(data, *COMPARED[pair], images, *rates)
        rows.append([names, ", ".join(map(str, seeds)), *cells])
    return rows


def _comparison(data: Dict, ours: str, theirs: str, images: int, *rates: float) -> str:
    """What is compared, with the learning rates where an arm has several."""

    def label(name, rate):
        several = len(_rates(data, name, images)) > 1
        return arms.ARMS[name].label + (f", at {rate}" if several else "")

    return " minus ".join(map(label, (ours, theirs), rates))


def _with_interval(centre: float, low: float, high: float) -> str:
    return f"{centre:+.1f} ({low:+.1f} to {high:+.1f})"


def _seed_rows(data: Dict, images: int) -> List[List]:
    """A line for each comparison, of the seeds of all machines."""
    rows = []
    for comparison, by_task in by_comparison(data["differences"]).items():
        seeds = by_task["bbox"]
        if comparison[2] == images:
            cells = [cell for task in TASKS for cell in _seed_cells(by_task[task])]
            rows.append([_comparison(data, *comparison), ", ".join(map(str, seeds)), *cells])
    return rows


def _seed_cells(by_seed: Dict[int, float]) -> Tuple[str, str]:
    """Differences by seed, and their mean; two seeds are too few for an interval."""
    values = list(by_seed.values())
    centre = f"{mean(values):+.1f}"
    if len(values) > 2:
        centre = _with_interval(mean(values), *interval_over_seeds(values))
    return ", ".join(f"{value:+.1f}" for value in values), centre


def leads_table(*files: Dict) -> str:
    """The leads of :func:`~evidence.leads.kn_leads`, one line each, in Markdown.

    Args:
        files: as in :func:`~evidence.leads.kn_leads`.
    """
    rows = []
    for lead in kn_leads(files):
        schedule = f"{lead.steps} x {images_text(lead.images)}"
        cells = [cell for task in TASKS for cell in _seed_cells(lead.by_seed[task])]
        rows.append([lead.network, schedule, lead.against, lead.rates, *cells])
    header = ["", "schedule", "KN minus", "learning rates", *_SEED_HEADER]
    return _escaped(tabulate(rows, header, tablefmt="github", disable_numparse=True))


def summary_table(data: Dict) -> str:
    """One line for each arm, number of images per step and learning rate in Markdown, for README."""
    rows = []
    for (name, images, rate), runs in by_setting(data).items():
        box, mask, *_ = _average_precisions(runs)
        lead = _lead(data, name, images, rate)
        rows.append([arms.ARMS[name].label, images, rate, len(runs), box, mask, lead])
    header = ["norm in the backbone", "images", "learning rate", "seeds", "box AP", "mask AP"]
    header.append("minus BN*, side by side (seeds)")
    return _escaped(tabulate(rows, header, tablefmt="github", disable_numparse=True))


def _lead(data: Dict, name: str, images: int, rate: float) -> str:
    """Box / mask AP minus that of BN* at its lowest rate, over the seeds that ran beside it."""
    comparison = name, "BN_frozen", images, rate, *_rates(data, "BN_frozen", images)[:1]
    found = by_comparison(data["differences"]).get(comparison)
    if found is None:
        return ""
    means = " / ".join(f"{mean(found[task].values()):+.1f}" for task in TASKS)
    return f"{means} ({len(found['bbox'])})"


def zoo_table(data: Dict) -> str:
    """One line for each arm, number of images per step and learning rate in Markdown, for MODEL_ZOO.md.

    It has the AP of every seed, the config, and the name of the released weights.
    """
    rows = []
    for (name, images, rate), runs in by_setting(data).items():
        runs = sorted(runs, key=lambda run: run["seed"])
        steps = runs[0]["steps"]
        found = [[f"{run['results'][task]['AP']:.1f}" for run in runs] for task in TASKS]
        arm = arms.ARMS[name]
        rows.append(
            [
                arm.label,
                f"{steps} x {images_text(images)}",
                rate,
                *(", ".join(values) for values in ([str(run["seed"]) for run in runs], *found)),
                f"[config](kn_detectron/model_zoo/configs/{arm.config})",
                _released(arm, images, rate),
            ]
        )
    header = ["norm", "schedule", "learning rate", "seeds", "box AP", "mask AP", "base config"]
    header.append("weights of seed 1")
    if not any(weights for *_, weights in rows):
        header, rows = header[:-1], [row[:-1] for row in rows]
    return _escaped(tabulate(rows, header, tablefmt="github", disable_numparse=True))


def _released(arm: arms.Arm, images: int, rate: float) -> str:
    """The name of the weights that come with the package, if runs with these settings made them."""
    weights = f"{Path(arm.config).stem}.pth"
    if weights not in released_weights() or arm.options or arm.change:
        return ""
    solver = get_config(arm.config).SOLVER
    is_as_configured = (solver.IMS_PER_BATCH, solver.BASE_LR) == (images, rate)
    return f"`kn://{weights}`" if is_as_configured else ""


def _escaped(table: str) -> str:
    """A table in which Markdown shows the star of BN* as a star."""
    return table.replace("BN*", r"BN\*")


def choice_table(data: Dict) -> str:
    """Box / mask AP over the learning rate in Markdown, on photographs held out of the training."""
    rates = sorted({run["learning_rate"] for run in data["runs"]})
    rows = []
    for name, arm in arms.ARMS.items():
        runs = [run for run in data["runs"] if run["arm"] == name]
        by_rate = {run["learning_rate"]: run["results"] for run in runs}
        cells = [
            (
                " / ".join(f"{by_rate[rate][task]['AP']:.1f}" for task in TASKS)
                if rate in by_rate
                else ""
            )
            for rate in rates
        ]
        if runs:
            rows.append([arm.label, *(cell or _NOT_RUN for cell in cells)])
    return _escaped(tabulate(rows, ["norm", *map(str, rates)], tablefmt="github"))


def classification_table(data: Dict) -> str:
    """Top-1 over images per micro-batch in Markdown, with moving and with online statistics.

    Cells are means over seeds; the number of seeds stands behind them if it is not 1.
    """
    arms_shown = {**classification.CIFAR, **classification.R50}
    runs = [run for run in data["runs"] if run["arm"] in arms_shown]
    sizes = sorted({run["micro_batch"] for run in runs if arms_shown[run["arm"]].shares})
    rows = []
    for name, arm in arms_shown.items():
        cells = [_top1(runs, name, size) for size in sizes]
        if any(cell != _NOT_RUN for cell in cells):
            rows.append([arm.label, *cells])
    header = ["norm", *map(images_text, sizes)]
    return tabulate(rows, header, tablefmt="github")


def _top1(runs: List[Dict], name: str, size: int, kinds=("moving", "online")) -> str:
    """One cell: means over the seeds of an arm for ``size`` images that share statistics."""
    wanted = size if classification.ARMS[name].shares else 1
    found = [run["results"] for run in runs if (run["arm"], run["micro_batch"]) == (name, wanted)]
    if not found:
        return _NOT_RUN
    cell = " / ".join(f"{mean(results[kind]['top1'] for results in found):.1f}" for kind in kinds)
    return f"{cell} ({len(found)})" if len(found) > 1 else cell


def against_paper_table(data: Dict) -> str:
    """Top-1 with moving statistics beside the paper's on CIFAR-10 (Tables 7 and 8), in Markdown."""
    rows = [
        [
            classification.ARMS[name].label,
            *(_top1(data["runs"], name, size, ("moving",)) for size in (2, 64)),
            *paper,
        ]
        for name, paper in PAPER.items()
    ]
    header = ["norm", "ours, 2 images", "ours, 64", *(f"paper, {what}" for what in PAPER_NETWORKS)]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)


def run_label(run: str) -> str:
    """The label of a run of tools/evidence/classification.py, by the name of its folder."""
    return classification.ARMS[re.sub(r"_m\d+_seed\d+$", "", run)].label


def similarity_table(data: Dict) -> str:
    """The results of tools/evidence/similarity.py in Markdown."""
    rows = [[run_label(run), f"{value:.2f}"] for run, value in data.items()]
    return tabulate(rows, ["norm", "average cosine"], tablefmt="github", disable_numparse=True)


def variance_gap_table(data: Dict) -> str:
    """The results of tools/evidence/variance_gap.py in Markdown: the average over all norms."""
    rows = [[run_label(run), f"{mean(by_norm.values()):.3f}"] for run, by_norm in data.items()]
    return tabulate(rows, ["norm", "average gap"], tablefmt="github", disable_numparse=True)


def drift_table(data: List[Dict]) -> str:
    """The results of tools/evidence/drift.py in Markdown."""
    rows = [["none", "", "", *data[0]["before"]]]
    for run in data:
        schedule = f"{run['steps']} x {run['images']}"
        rows.append([arms.ARMS[run["arm"]].label, run["learning_rate"], schedule, *run["after"]])
    rows = [[*row[:3], *(f"{value:.2f}" for value in row[3:])] for row in rows]
    header = ["fine-tuned with", "learning rate", "steps", "of the variance", "of the mean"]
    return _escaped(tabulate(rows, header, tablefmt="github", disable_numparse=True))
