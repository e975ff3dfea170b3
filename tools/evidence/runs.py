"""Runs of an experiment, one after the other, each with a folder and a result."""

import json
import subprocess
from pathlib import Path
from typing import Callable, Dict, Iterable, List

import torch
import tqdm

import kn_detectron
from kn_detectron.errors import InputError
from kn_detectron.files import atomic_write

__all__ = ["read_results", "run_all", "run_apart", "write_result"]

_NAME = "result.json"
_TOOLS = Path(__file__).parents[1]


def run_all(folders: Iterable[Path], do: Callable[[Path], None]) -> None:
    """Does the runs that have no result yet, and shows the progress with the time that is left.

    Args:
        folders: the folders of the runs.
        do: does the run of a folder, and calls :func:`write_result` at its end.

    Raises:
        InputError: the package is not that of this checkout, whose commit the results name.
    """
    package, checkout = (Path(file).resolve().parent for file in (kn_detectron.__file__, _TOOLS))
    if package.parent != checkout:
        raise InputError(
            f"kn_detectron is imported from {package}, but the results would name the commit of "
            f"{checkout}: set PYTHONPATH to {checkout}."
        )
    folders = list(folders)
    to_do = [folder for folder in folders if not (folder / _NAME).is_file()]
    print(f"{len(folders)} runs, of which {len(folders) - len(to_do)} are done.", flush=True)
    for folder in tqdm.tqdm(to_do, unit="run"):
        folder.mkdir(parents=True, exist_ok=True)
        do(folder)


def run_apart(command: List[str], folder: Path) -> None:
    """Runs a command in a process of its own, which prints into ``printed.txt`` of a run's folder.

    Raises:
        InputError: the run failed.
    """
    with open(folder / "printed.txt", "a") as printed:
        code = subprocess.run(command, stdout=printed, stderr=subprocess.STDOUT).returncode
    if code:
        raise InputError(f"The run in {folder} failed: {folder}/printed.txt says why.")


def write_result(folder: Path, settings: Dict) -> None:
    """Writes the result of a run: its evaluation, its settings, and the version of its code.

    Args:
        folder: the folder of the run, with ``inference/results.json``.
        settings: the settings that tell the run from others.
    """
    results = json.loads((folder / "inference" / "results.json").read_text())
    made_with = {"commit": _commit(), "torch": torch.__version__}
    with atomic_write(str(folder / _NAME)) as file:
        file.write(json.dumps({**settings, **made_with, "results": results}, indent=1).encode())


def read_results(output: Path) -> Dict[Path, Dict]:
    """The results of all runs below a folder, by the folders of the runs, which are sorted.

    Raises:
        InputError: there are none.
    """
    paths: List[Path] = sorted(Path(output).rglob(_NAME))
    if not paths:
        raise InputError(
            f"{output} has no {_NAME}: give the folder that was the --output of finished runs."
        )
    return {path.parent: json.loads(path.read_text()) for path in paths}


def _commit() -> str:
    """The commit of the repository, with "-dirty" where files were changed since."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
