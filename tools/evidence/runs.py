"""What the experiments share: many runs, one after the other, each with a folder and a result."""

import json
import subprocess
import time
from pathlib import Path
from typing import Callable, Dict, Iterable, List

import torch

__all__ = ["read_results", "run_all", "write_result"]

_NAME = "result.json"


def run_all(folders: Iterable[Path], do: Callable[[Path], None]) -> None:
    """Does the runs that have no result yet, and says how long the rest will take.

    Args:
        folders: of the runs.
        do: does the run of a folder, and calls :func:`write_result` at its end.
    """
    folders = list(folders)
    to_do = [folder for folder in folders if not (folder / _NAME).is_file()]
    print(f"{len(folders)} runs, of which {len(folders) - len(to_do)} are done.", flush=True)
    started = time.time()
    for done, folder in enumerate(to_do):
        folder.mkdir(parents=True, exist_ok=True)
        do(folder)
        left = (time.time() - started) / (done + 1) * (len(to_do) - done - 1)
        print(f"{folder.name} is done; about {left / 60:.0f} min are left.", flush=True)


def write_result(folder: Path, result: Dict) -> None:
    """Notes the result of a run, and what it was made with, in its folder."""
    made_with = {"commit": _commit(), "torch": torch.__version__}
    partial = folder / f"{_NAME}.partial"
    partial.write_text(json.dumps({**result, **made_with}, indent=1))
    partial.rename(folder / _NAME)


def read_results(output: Path) -> Dict[Path, Dict]:
    """The results of all runs in a folder and below, by the folder of each, in the order of names."""
    paths: List[Path] = sorted(Path(output).rglob(_NAME))
    return {path.parent: json.loads(path.read_text()) for path in paths}


def _commit() -> str:
    """The commit of the repository, with "-dirty" where files were changed since."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
