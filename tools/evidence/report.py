#!/usr/bin/env python
"""Makes the tables and pictures of docs/evidence.md from the results of the runs.

Examples:
    python tools/evidence/report.py --detection output/evidence --truth persons/annotations/instances_val.json
    python tools/evidence/report.py --choice output/choice --classification output/cifar
    python tools/evidence/report.py

The results of the runs are kept in docs/evidence/*.json. New ones are added to those, and a run
with the same settings as an earlier one takes its place. Tables and pictures are made from these
files, without arguments too. A test compares the tables with the files.
"""

import argparse
import contextlib
import io
import json
import re
import sys
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Dict, List

from pycocotools.coco import COCO
from tabulate import tabulate

from kn_detectron.model_zoo import released_weights

sys.path.insert(0, str(Path(__file__).parents[1]))
from evidence import arms, classification  # noqa: E402  # beside this file, not installed
from evidence.bootstrap import MatchedRun, paired_bootstrap  # noqa: E402
from evidence.picture import draw_classification, draw_detection  # noqa: E402
from evidence.runs import read_results  # noqa: E402

DOCS = Path(__file__).parents[2] / "docs"
TASKS = {"bbox": "box", "segm": "mask"}
# The differences that docs/evidence.md reports: (ours, theirs).
COMPARED = (
    ("KN", "BN_frozen"),
    ("KN", "BN_affine"),
    ("KN", "BN"),
    ("KN", "KN_gain0"),
    ("KN_gain0", "BN_frozen"),
    ("KN_gain0", "BN_affine"),
    ("KN_gain0", "BN"),
    ("KN_gain0", "GN"),
    ("GN", "BN_frozen"),
    ("BN_affine", "BN_frozen"),
    ("R50_KN_gain0", "R50_BN_frozen"),
    ("R50_KN_gain0", "R50_GN"),
    ("R50_KN_gain0", "R50_KN_from_BN"),
    ("R50_KN_from_BN", "R50_BN_frozen"),
    ("R50_GN", "R50_BN_frozen"),
    ("R50_GKN", "R50_BN_frozen"),
    ("R50_GKN", "R50_GN"),
)

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

# What tells two runs, or two differences, of one file apart.
SETTINGS = {
    "runs": ("arm", "images", "micro_batch", "seed", "learning_rate"),
    "differences": ("ours", "theirs", "images", "task", "seeds"),
}


def added(old: Dict, new: Dict) -> Dict:
    """The entries of one file of results with those of new runs, which replace entries of the same
    settings (:data:`SETTINGS`)."""

    def place(entry, keys):
        return [entry.get(key) for key in keys]

    data = {}
    for kind, entries in new.items():
        keys = SETTINGS[kind]
        places = [place(entry, keys) for entry in entries]
        kept = [entry for entry in old[kind] if place(entry, keys) not in places]
        data[kind] = kept + entries
    return data


def collect_detection(folder: Path, truth_file: str, samples: int = 1000) -> Dict:
    """The results of all runs of tools/evidence/detection.py, and the bootstrapped differences.

    Args:
        folder: of the runs.
        truth_file: the annotations that they were evaluated on.
        samples: of the bootstrap.
    """
    results = read_results(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(truth_file)
    differences = []
    for images in sorted({r["images"] for r in results.values()}, reverse=True):
        for task in TASKS:
            matched: Dict[str, Dict[int, MatchedRun]] = {}
            for run, result in results.items():
                if result["images"] == images:
                    (found,) = (run / "inference").glob("*/coco_instances_results.json")
                    found = MatchedRun(truth, json.loads(found.read_text()), task)
                    matched.setdefault(result["arm"], {})[result["seed"]] = found
            for ours, theirs in COMPARED:
                seeds = sorted(set(matched.get(ours, ())) & set(matched.get(theirs, ())))
                if not seeds:
                    continue
                pair = ([matched[arm][seed] for seed in seeds] for arm in (ours, theirs))
                difference = paired_bootstrap(*pair, samples=samples)
                difference = {key: round(value, 2) for key, value in difference.items()}
                names = {"ours": ours, "theirs": theirs, "images": images, "task": task}
                differences.append({**names, "seeds": seeds, **difference})
    return {"runs": list(results.values()), "differences": differences}


def detection_tables(data: Dict) -> str:
    """The tables of the detectors in Markdown, one pair for each number of images per step."""
    parts = []
    for images in sorted({run["images"] for run in data["runs"]}, reverse=True):
        rows = []
        for name, arm in arms.ARMS.items():
            runs = [r for r in data["runs"] if (r["arm"], r["images"]) == (name, images)]
            if runs:
                rates = {run["learning_rate"] for run in runs}
                rate = ", ".join(map(str, sorted(rates)))
                rows.append([arm.label, rate, len(runs), *_average_precisions(runs)])
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
        what = f"{images} image{'s' if images > 1 else ''} per step"
        parts.append(f"**{what}**, mean (lowest to highest of the seeds):")
        parts.append(tabulate(rows, header, tablefmt="github"))
        rows = _difference_rows([d for d in data["differences"] if d["images"] == images])
        if rows:
            parts.append(f"Differences at {what}, in AP, with the 95% interval over photographs:")
            header = ["", "of seeds", "box", "mask"]
            parts.append(tabulate(rows, header, tablefmt="github"))
    return _escaped("\n\n".join(parts))


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


def _difference_rows(differences: List[Dict]) -> List[List]:
    def place(difference):
        return COMPARED.index((difference["ours"], difference["theirs"])), difference["seeds"]

    rows = []
    for (pair, seeds), found in groupby(sorted(differences, key=place), key=place):
        by_task = {d["task"]: d for d in found}
        cells = [
            f"{d['difference']:+.1f} ({d['low']:+.1f} to {d['high']:+.1f})"
            for d in (by_task[task] for task in TASKS)
        ]
        names = " minus ".join(arms.ARMS[name].label for name in COMPARED[pair])
        rows.append([names, ", ".join(map(str, seeds)), *cells])
    return rows


def summary_table(data: Dict) -> str:
    """One line for each arm and number of images per step in Markdown, for README."""
    rows = []
    for images in sorted({run["images"] for run in data["runs"]}, reverse=True):
        for name, arm in arms.ARMS.items():
            runs = [r for r in data["runs"] if (r["arm"], r["images"]) == (name, images)]
            if runs:
                box, mask, *_ = _average_precisions(runs)
                rate = runs[0]["learning_rate"]
                rows.append([arm.label, images, rate, len(runs), box, mask])
    header = ["norm in the backbone", "images", "learning rate", "seeds", "box AP", "mask AP"]
    return _escaped(tabulate(rows, header, tablefmt="github"))


def zoo_table(data: Dict) -> str:
    """One line for each run in Markdown, with its config and its released weights, for MODEL_ZOO.md."""
    released = released_weights()
    rows = []
    for name, arm in arms.ARMS.items():
        for run in data["runs"]:
            if run["arm"] == name:
                weights = f"{Path(arm.config).stem}.pth"
                as_released = not arm.options and not arm.change and run["seed"] == 1
                is_released = weights in released and as_released
                rows.append(
                    [
                        arm.label,
                        f"{run['steps']} x {run['images']} images",
                        run["learning_rate"],
                        run["seed"],
                        f"{run['results']['bbox']['AP']:.1f}",
                        f"{run['results']['segm']['AP']:.1f}",
                        f"[config](kn_detectron/model_zoo/configs/{arm.config})",
                        f"`kn://{weights}`" if is_released else "",
                    ]
                )
    header = ["norm", "schedule", "learning rate", "seed", "box AP", "mask AP", "config", "weights"]
    return _escaped(tabulate(rows, header, tablefmt="github"))


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
    header = ["norm", *(f"{size} image{'s' if size > 1 else ''}" for size in sizes)]
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


def _label(run: str) -> str:
    """The label of a run of tools/evidence/classification.py, by the name of its folder."""
    return classification.ARMS[re.sub(r"_m\d+_seed\d+$", "", run)].label


def similarity_table(data: Dict) -> str:
    """The results of tools/evidence/similarity.py in Markdown."""
    rows = [[_label(run), f"{value:.2f}"] for run, value in data.items()]
    return tabulate(rows, ["norm", "average cosine"], tablefmt="github", disable_numparse=True)


def variance_gap_table(data: Dict) -> str:
    """The results of tools/evidence/variance_gap.py in Markdown: the average over all norms."""
    rows = [[_label(run), f"{mean(by_norm.values()):.3f}"] for run, by_norm in data.items()]
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


# By NAME, what a page has between "<!-- NAME -->" and "<!-- end -->": its file, and its function.
TABLES = {
    "choice": ("choice", choice_table),
    "detection": ("detection", detection_tables),
    "own_rate": ("own_rate", detection_tables),
    "long": ("long", detection_tables),
    "own_weights": ("own_weights", detection_tables),
    "own_choice": ("own_choice", choice_table),
    "pretraining": ("pretraining", classification_table),
    "similarity": ("similarity", similarity_table),
    "drift": ("drift", drift_table),
    "variance_gap": ("variance_gap", variance_gap_table),
    "zoo": ("long", zoo_table),
    "summary": ("own_rate", summary_table),
    "classification": ("classification", classification_table),
    "against_paper": ("classification", against_paper_table),
    "paper_variant": ("paper_variant", classification_table),
}
PAGES = (DOCS / "evidence.md", DOCS.parent / "README.md", DOCS.parent / "MODEL_ZOO.md")


def with_tables(page: str, folder: Path) -> str:
    """A page with its tables made anew from the files in a folder.

    Args:
        page: Markdown with the marks of :data:`TABLES`.
        folder: the folder of the JSON files.
    """
    for name, (file, table) in TABLES.items():
        path = folder / f"{file}.json"
        if path.is_file() and f"<!-- {name} -->" in page:
            text = f"<!-- {name} -->\n\n{table(_read(path))}\n\n<!-- end -->"
            page = re.sub(rf"<!-- {name} -->.*?<!-- end -->", lambda _: text, page, flags=re.DOTALL)
    return page


def main():
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--detection", metavar="FOLDER", help="the runs of detection.py")
    parser.add_argument(
        "--own-rate", metavar="FOLDER", help="runs with a learning rate for each arm"
    )
    parser.add_argument("--long", metavar="FOLDER", help="the same, with a longer schedule")
    parser.add_argument("--own-weights", metavar="FOLDER", help="those of the arms R50_*")
    parser.add_argument("--truth", metavar="FILE", help="annotations that these were evaluated on")
    parser.add_argument(
        "--choice", metavar="FOLDER", help="runs of detection.py on the folder of hold_out.py"
    )
    parser.add_argument("--own-choice", metavar="FOLDER", help="those of the arms R50_*")
    parser.add_argument("--pretraining", metavar="FOLDER", help="R50_* of classification.py")
    parser.add_argument("--classification", metavar="FOLDER", help="the runs of classification.py")
    parser.add_argument("--paper-variant", metavar="FOLDER", help="those with pre-activation")
    args = parser.parse_args()
    folder = DOCS / "evidence"
    folder.mkdir(exist_ok=True)
    for name in ("detection", "own_rate", "long", "own_weights"):
        if getattr(args, name):
            if not args.truth:
                parser.error("detectors need --truth FILE")
            data = collect_detection(Path(getattr(args, name)), args.truth)
            _add(folder / f"{name}.json", data)
    for name in ("choice", "own_choice", "classification", "paper_variant", "pretraining"):
        if getattr(args, name):
            runs = list(read_results(Path(getattr(args, name))).values())
            _add(folder / f"{name}.json", {"runs": runs})
    for page in PAGES:
        page.write_text(with_tables(page.read_text(), folder))
    draw_detection(_read(folder / "own_rate.json"), folder / "own_rate.png")
    draw_classification(_read(folder / "classification.json"), folder / "classification.png")


def _read(path: Path) -> Dict:
    return json.loads(path.read_text())


def _add(path: Path, new: Dict) -> None:
    data = added(_read(path), new) if path.is_file() else new
    path.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
