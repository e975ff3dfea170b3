#!/usr/bin/env python
"""Makes the photographs of persons that docs/evidence.md is about, from COCO 2017.

Example:
    python tools/evidence/persons.py datasets/coco persons

It takes the photographs whose ids are in persons.json beside this file, makes their long side at
most 480 pixels, and scales the annotations of their persons. COCO has them in train2017 and val2017;
which of ours are for training is another matter, and persons.json says so.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as run_lengths
from tqdm import tqdm

from kn_detectron.engine.command_line import run
from kn_detectron.errors import InputError

LONG_SIDE = 480
IDS = Path(__file__).with_suffix(".json")
_PERSON = 1
_SPLITS = ("train2017", "val2017")


def collect(coco, splits, output):
    """Writes a folder in COCO's layout.

    Args:
        coco (Path): COCO 2017: ``annotations/``, ``train2017/`` and ``val2017/``.
        splits (dict[str, list[int]]): ids of photographs by split.
        output (Path): the folder, to be made.

    Raises:
        InputError: a file of COCO or a photograph is missing.
    """
    images, persons, shared = _read(coco)
    missing = [number for ids in splits.values() for number in ids if number not in images]
    if missing:
        raise InputError(
            f"{coco} lacks {len(missing)} photographs, the first {missing[0]}: give COCO 2017 with "
            f"{' and '.join(_SPLITS)}."
        )
    (output / "annotations").mkdir(parents=True)
    for split, ids in splits.items():
        (output / split).mkdir()
        content = {**shared, "images": [], "annotations": []}
        for number in tqdm(ids, desc=split, unit="photo"):
            image, folder = images[number]
            size = _shrink(folder / image["file_name"], output / split / image["file_name"])
            content["images"].append({**image, "width": size[0], "height": size[1]})
            factor = max(size) / max(image["width"], image["height"])
            content["annotations"] += [_scaled(a, factor, size) for a in persons.get(number, [])]
        path = output / "annotations" / f"instances_{split}.json"
        path.write_text(json.dumps(content) + "\n")


def _read(coco):
    """Images with their folders and persons, by the id of the image, and what all splits share."""
    images, persons = {}, {}
    for split in _SPLITS:
        path = coco / "annotations" / f"instances_{split}.json"
        if not path.is_file():
            raise InputError(f"{path} does not exist: give the folder of COCO 2017.")
        content = json.loads(path.read_text())
        images.update({image["id"]: (image, coco / split) for image in content["images"]})
        for annotation in content["annotations"]:
            if annotation["category_id"] == _PERSON:
                persons.setdefault(annotation["image_id"], []).append(annotation)
    categories = [c for c in content["categories"] if c["id"] == _PERSON]
    return images, persons, {"licenses": content["licenses"], "categories": categories}


def _shrink(source, target):
    """Writes a photograph whose long side is at most LONG_SIDE, and returns its width and height."""
    if not source.is_file():
        raise InputError(f"{source} does not exist: give the folder of COCO 2017 with its images.")
    with Image.open(source) as photo:
        factor = min(1.0, LONG_SIDE / max(photo.size))
        size = tuple(round(side * factor) for side in photo.size)
        photo = photo.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    photo.save(target, quality=90)
    return size


def _scaled(annotation, factor, size):
    def scaled(numbers):
        return [round(number * factor, 2) for number in numbers]

    shape = annotation["segmentation"]
    return {
        **annotation,
        "bbox": scaled(annotation["bbox"]),
        "area": round(annotation["area"] * factor**2, 2),
        "segmentation": (
            _resized(shape, size) if isinstance(shape, dict) else list(map(scaled, shape))
        ),
    }


def _resized(shape, size):
    """Run lengths of a mask that is resized to a width and a height."""
    if isinstance(shape["counts"], list):
        shape = run_lengths.frPyObjects(shape, *shape["size"])
    mask = Image.fromarray(run_lengths.decode(shape)).resize(size, Image.Resampling.NEAREST)
    encoded = run_lengths.encode(np.asfortranarray(mask))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def main():
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("coco", type=Path, help="folder of COCO 2017")
    parser.add_argument("output", type=Path, help="folder to be made")
    args = parser.parse_args()
    collect(args.coco, json.loads(IDS.read_text()), args.output)


if __name__ == "__main__":
    sys.exit(run(main))
