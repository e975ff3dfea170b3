#!/usr/bin/env python
"""Makes the tables and pictures of docs/evidence/ from the results of the runs.

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
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Dict, List, Sequence, Tuple

import numpy as np
from pycocotools.coco import COCO

from kn_detectron.engine import command_line
from kn_detectron.errors import InputError

sys.path.insert(0, str(Path(__file__).parents[1]))
# Beside this file, not installed.
from evidence import leads, tables  # noqa: E402
from evidence.bootstrap import MatchedRun, paired_bootstrap  # noqa: E402
from evidence.picture import draw_classification, draw_detection, draw_leads  # noqa: E402
from evidence.runs import read_results  # noqa: E402

DOCS = Path(__file__).parents[2] / "docs"

# What tells two runs of one file apart.
SETTINGS = ("arm", "images", "micro_batch", "seed", "learning_rate")


def added(old: Dict, new: Dict) -> Dict:
    """The entries of one file of results with those of new runs.

    A new run replaces that of the same settings (:data:`SETTINGS`). Unless it has repeated the old
    results, the differences of the old run go with it. A new difference replaces those of some of
    its seeds.
    """

    def sides(difference):
        arms = zip((difference["ours"], difference["theirs"]), difference["learning_rates"])
        return [*arms, difference["images"]]

    def is_of(difference, run):
        *arms, images = sides(difference)
        same = run["images"] == images and run["seed"] in difference["seeds"]
        return same and (run["arm"], run["learning_rate"]) in arms

    def is_part(difference, other):
        same = sides(difference) == sides(other) and difference["task"] == other["task"]
        return same and set(difference["seeds"]) <= set(other["seeds"])

    runs = new["runs"]
    places = [_settings(run) for run in runs]
    data = {"runs": [run for run in old["runs"] if _settings(run) not in places] + runs}
    if "again" in old or new.get("again"):
        again = new.get("again", [])
        data["again"] = [run for run in old.get("again", []) if run not in again] + again
    if "differences" in new:
        before = [(_settings(run), run["results"]) for run in old["runs"]]
        changed = [run for run in runs if (_settings(run), run["results"]) not in before]
        kept = [
            difference
            for difference in old["differences"]
            if not any(is_of(difference, run) for run in changed)
            and not any(is_part(difference, other) for other in new["differences"])
        ]
        data["differences"] = kept + new["differences"]
    return data


def check_schedules(old: Dict, new: Dict) -> None:
    """Checks that new runs have the schedules of the runs that they replace.

    Args:
        old, new: entries as in :func:`added`.

    Raises:
        InputError: one is longer or shorter.
    """
    before = {tuple(_settings(run)): run for run in old["runs"]}
    for run in new["runs"]:
        replaced = before.get(tuple(_settings(run)), run)
        for length in ("steps", "epochs"):
            if run.get(length) != replaced.get(length):
                raise InputError(
                    f"A run of {run['arm']} has {run.get(length)} {length}, and the one with the same"
                    f" settings in docs/evidence has {replaced.get(length)}: expected one schedule in"
                    " a file, so give the option for that schedule, or repeat the run."
                )


def without_repeats(old: Dict, new: Dict, arms: Sequence[str]) -> Dict:
    """New results, of which the runs that only repeat old ones beside others are set apart.

    Where a machine rounds otherwise, the same run ends elsewhere. The old run then stays, with the
    differences from runs beside it, and so do the new differences. The repeat goes to "again".

    Args:
        old, new: entries as in :func:`added`.
        arms: those whose runs were repeated.
    """
    places = [_settings(run) for run in old["runs"]]
    known = [run for run in new["runs"] if run["arm"] in arms and _settings(run) in places]
    again = [run for run in known if run not in old["runs"]]  # not one that is collected twice
    return {**new, "runs": [run for run in new["runs"] if run not in again], "again": again}


def collect_detection(folder: Path, truth_file: str, samples: int = 1000) -> Dict:
    """The results of all runs of tools/evidence/detection.py, and the bootstrapped differences.

    Args:
        folder: of the runs.
        truth_file: the annotations that they were evaluated on.
        samples: of the bootstrap.

    Raises:
        InputError: two runs have the same settings.
    """
    results = read_results(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(truth_file)
    differences = []
    for images in sorted({r["images"] for r in results.values()}, reverse=True):
        for task in tables.TASKS:
            matched: Dict[Tuple[str, float], Dict[int, MatchedRun]] = {}
            for run, result in results.items():
                if result["images"] == images:
                    (found,) = (run / "inference").glob("*/coco_instances_results.json")
                    found = MatchedRun(truth, json.loads(found.read_text()), task)
                    setting = result["arm"], result["learning_rate"]
                    seeds = matched.setdefault(setting, {})
                    if result["seed"] in seeds:
                        raise InputError(
                            f"{run} has arm, learning rate, images and seed of another run in"
                            f" {folder}: expected each run once, so give a folder of one schedule."
                        )
                    seeds[result["seed"]] = found
            for pair in itertools.product(sorted(matched), repeat=2):
                (ours, our_rate), (theirs, their_rate) = pair
                seeds = sorted(set(matched[pair[0]]) & set(matched[pair[1]]))
                if (ours, theirs) not in leads.COMPARED or not seeds:
                    continue
                pair = ([matched[setting][seed] for seed in seeds] for setting in pair)
                difference = paired_bootstrap(*pair, samples=samples)
                difference = {key: np.round(value, 4).tolist() for key, value in difference.items()}
                names = {"ours": ours, "theirs": theirs, "images": images, "task": task}
                rates = {"learning_rates": [our_rate, their_rate]}
                differences.append({**names, **rates, "seeds": seeds, **difference})
    return {"runs": list(results.values()), "differences": differences}


# By NAME, what a page has between "<!-- NAME -->" and "<!-- end -->": its function, and its files.
TABLES = {
    "leads": (tables.leads_table, *leads.FILES),
    "choice": (tables.choice_table, "choice"),
    "detection": (tables.detection_tables, "detection"),
    "own_rate": (tables.detection_tables, "own_rate"),
    "parts": (tables.detection_tables, "parts"),
    "long": (tables.detection_tables, "long"),
    "own_weights": (tables.detection_tables, "own_weights"),
    "second_weights": (tables.detection_tables, "second_weights"),
    "own_choice": (tables.choice_table, "own_choice"),
    "pretraining": (tables.classification_table, "pretraining"),
    "similarity": (tables.similarity_table, "similarity"),
    "drift": (tables.drift_table, "drift"),
    "variance_gap": (tables.variance_gap_table, "variance_gap"),
    "zoo": (tables.zoo_table, "long"),
    "zoo_own_weights": (tables.zoo_table, "own_weights"),
    "summary": (tables.summary_table, "own_rate"),
    "classification": (tables.classification_table, "classification"),
    "against_paper": (tables.against_paper_table, "classification"),
    "paper_variant": (tables.classification_table, "paper_variant"),
}
PAGES = (
    DOCS / "evidence.md",
    *sorted((DOCS / "evidence").glob("*.md")),
    DOCS.parent / "README.md",
    DOCS.parent / "MODEL_ZOO.md",
)


def with_tables(page: str, folder: Path) -> str:
    """A page with its tables made anew from the files in a folder.

    Args:
        page: Markdown with the marks of :data:`TABLES`.
        folder: the folder of the JSON files.
    """
    for name, (table, *files) in TABLES.items():
        paths = [folder / f"{file}.json" for file in files]
        if f"<!-- {name} -->" in page and all(path.is_file() for path in paths):
            text = f"<!-- {name} -->\n\n{table(*map(_read, paths))}\n\n<!-- end -->"
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
    parser.add_argument("--parts", metavar="FOLDER", help="KN with one of its parts changed")
    parser.add_argument(
        "--long", metavar="FOLDER", help="those of --own-rate, with a longer schedule"
    )
    parser.add_argument("--own-weights", metavar="FOLDER", help="those of the arms R50_*")
    parser.add_argument(
        "--second-weights", metavar="FOLDER", help="those from a second pre-training of each norm"
    )
    parser.add_argument(
        "--repeated", nargs="+", default=[], metavar="ARM", help="run again beside others only"
    )
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
    for name in ("detection", "own_rate", "parts", "long", "own_weights", "second_weights"):
        if getattr(args, name):
            if not args.truth:
                parser.error("detectors need --truth FILE")
            data = collect_detection(Path(getattr(args, name)), args.truth)
            _add(folder / f"{name}.json", data, args.repeated)
    for name in ("choice", "own_choice", "classification", "paper_variant", "pretraining"):
        if getattr(args, name):
            runs = list(read_results(Path(getattr(args, name))).values())
            _add(folder / f"{name}.json", {"runs": runs})
    for page in PAGES:
        page.write_text(with_tables(page.read_text(), folder))
    for name in ("own_rate", "own_weights"):
        draw_detection(_read(folder / f"{name}.json"), folder / f"{name}.png")
    files = [_read(folder / f"{name}.json") for name in leads.FILES]
    draw_leads(leads.kn_leads(files), folder / "leads.png")
    draw_classification(_read(folder / "classification.json"), folder / "classification.png")


def _read(path: Path) -> Dict:
    return json.loads(path.read_text())


def _settings(run: Dict) -> List:
    return [run.get(key) for key in SETTINGS]


def _add(path: Path, new: Dict, repeated: Sequence[str] = ()) -> None:
    data = new
    if path.is_file():
        old = _read(path)
        check_schedules(old, new)
        data = added(old, without_repeats(old, new, repeated))
    path.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(command_line.run(main))
