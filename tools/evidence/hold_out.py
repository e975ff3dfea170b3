#!/usr/bin/env python
"""Splits the training photographs of a folder into a new folder: every fifth is for validation.

Example:
    python tools/evidence/hold_out.py persons output/persons_held_out

Settings are chosen on the new folder, so that the true validation photographs take no part in the
choice. The photographs are not copied: train/ and val/ are links.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from evidence.subsets import subset, write_linked  # noqa: E402  # beside this file, not installed

EVERY = 5


def hold_out(folder: Path, output: Path) -> None:
    """Splits the training photographs of a folder.

    Args:
        folder: in COCO's layout, with annotations/instances_train.json and train/.
        output: the new folder, in the same layout.
    """
    content = json.loads((folder / "annotations" / "instances_train.json").read_text())
    ids = [image["id"] for image in content["images"]]
    held_out = set(ids[::EVERY])
    photos = folder / "train"
    train, val = subset(content, set(ids) - held_out), subset(content, held_out)
    write_linked(output, {"train": (train, photos), "val": (val, photos)})


def main():
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="in COCO's layout")
    parser.add_argument("output", type=Path, help="folder to be made")
    args = parser.parse_args()
    hold_out(args.folder, args.output)


if __name__ == "__main__":
    sys.exit(main())
