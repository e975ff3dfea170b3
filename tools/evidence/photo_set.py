#!/usr/bin/env python
"""Makes the small set of photographs that the package contains, and the folder without them.

Example:
    python tools/evidence/photo_set.py persons kn_detectron/data/photos --rest output/persons_rest

Only photographs whose licence allows changed copies for any purpose are taken. Each split of the set
comes from the same split of the folder. REST has all other training photographs, so that a detector
that is trained on them has seen none of the set.
"""

import argparse
import json
import random
import sys
from pathlib import Path

from PIL import Image

from kn_detectron.engine.command_line import run
from kn_detectron.errors import InputError

sys.path.insert(0, str(Path(__file__).parents[1]))
from evidence.subsets import subset, write_linked  # noqa: E402  # beside this file, not installed

# In COCO's numbering: CC BY, CC BY-SA, no known copyright restrictions, work of the US government.
LICENSES = (4, 5, 7, 8)
LONG_SIDE = 320
SMALLEST = 0.02  # area of a person / area of the photograph: less is hard to make out
MOST_PERSONS = 4


def choose(content, count, seed=0):
    """Chooses free photographs with a few persons, who are upright and large enough to be made out.

    Args:
        content (dict): annotations in COCO's format.
        count (int): how many to take.
        seed (int): of the choice among those that are fit.

    Returns:
        list[int]: ids of images, sorted.

    Raises:
        InputError: too few are fit.
    """
    persons = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        persons[annotation["image_id"]].append(annotation)

    def fits(image):
        found = persons[image["id"]]
        area = image["width"] * image["height"]
        return (
            image["license"] in LICENSES
            and 0 < len(found) <= MOST_PERSONS
            and not any(annotation["iscrowd"] for annotation in found)
            and min(annotation["area"] for annotation in found) >= SMALLEST * area
            and all(_is_upright(annotation["bbox"], image) for annotation in found)
        )

    fit = sorted(image["id"] for image in content["images"] if fits(image))
    if len(fit) < count:
        raise InputError(
            f"Only {len(fit)} photographs are fit for a set of {count}: give a smaller --count."
        )
    return sorted(random.Random(seed).sample(fit, count))


def _is_upright(box, image):
    """Whether a person is higher than wide, and at most one edge of the photograph cuts it off."""
    left, top, width, height = box
    right, bottom = image["width"] - left - width, image["height"] - top - height
    return height > width and sum(gap < 2 for gap in (left, top, right, bottom)) <= 1


def resize(content, ids, photos, output, split):
    """Writes one split of the set: smaller photographs, and their annotations in the same scale.

    Args:
        content (dict): annotations of the split in COCO's format.
        ids (list[int]): of the images to take.
        photos (Path): folder of the photographs.
        output (Path): folder of the set.
        split (str): "train" or "val".

    Returns:
        dict: the annotations of the split.
    """
    (output / split).mkdir(parents=True)
    chosen, images, factors = subset(content, ids), [], {}
    for image in chosen["images"]:
        factor = factors[image["id"]] = LONG_SIDE / max(image["width"], image["height"])
        size = [round(image[side] * factor) for side in ("width", "height")]
        with Image.open(photos / image["file_name"]) as photo:
            photo = photo.convert("RGB").resize(size, Image.Resampling.LANCZOS)
            photo.save(output / split / image["file_name"], quality=85, optimize=True)
        kept = {key: image[key] for key in ("id", "file_name", "license", "flickr_url", "coco_url")}
        images.append({**kept, "width": size[0], "height": size[1]})
    annotations = [_scaled(a, factors[a["image_id"]]) for a in chosen["annotations"]]
    part = {key: content[key] for key in ("licenses", "categories")}
    part.update(images=images, annotations=annotations)
    (output / "annotations").mkdir(exist_ok=True)
    path = output / "annotations" / f"instances_{split}.json"
    path.write_text(json.dumps(part, separators=(",", ":")) + "\n")
    return part


def _scaled(annotation, factor):
    def scaled(numbers):
        return [round(number * factor, 1) for number in numbers]

    kept = {key: annotation[key] for key in ("id", "image_id", "category_id", "iscrowd")}
    return {
        **kept,
        "bbox": scaled(annotation["bbox"]),
        "area": round(annotation["area"] * factor**2, 1),
        "segmentation": [scaled(polygon) for polygon in annotation["segmentation"]],
    }


def attribution(parts):
    """Who must be named for what, in Markdown.

    Args:
        parts (dict[str, dict]): annotations by split.

    Returns:
        str
    """
    lines = [
        "# Photographs and their licences",
        "",
        "The photographs in `train/` and `val/` are from [COCO 2017](https://cocodataset.org). Their",
        "photographers published them on Flickr under the licences below, which are the ones that",
        "COCO's annotations name. The link leads to the page of a photograph, which names the",
        f"photographer. **Changed:** each was resized to a long side of {LONG_SIDE} pixels and saved as",
        "JPEG again. The resized photographs are under the same licences as the originals.",
        "",
        "The annotations in `annotations/` are COCO's, by the COCO Consortium, under",
        "[CC BY 4.0](https://creativecommons.org/licenses/by/4.0/). **Changed:** they were scaled with",
        "the photographs, and only persons were kept.",
        "",
        "The released person detector was trained on none of these photographs.",
        "`tools/evidence/photo_set.py` chose and resized them, and wrote this page.",
        "",
        "| photograph | page at Flickr | licence |",
        "|---|---|---|",
    ]
    for split, part in parts.items():
        names = {entry["id"]: f"[{entry['name']}]({entry['url']})" for entry in part["licenses"]}
        for image in part["images"]:
            number = image["flickr_url"].rsplit("/", 1)[1].split("_")[0]
            page = f"[{number}](https://www.flickr.com/photo.gne?id={number})"
            lines.append(f"| {split}/{image['file_name']} | {page} | {names[image['license']]} |")
    return "\n".join(lines) + "\n"


def main():
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="in COCO's layout, of persons")
    parser.add_argument("output", type=Path, help="folder of the set, to be made")
    parser.add_argument("--rest", type=Path, help="folder of all others, to be made")
    parser.add_argument("--count", nargs=2, type=int, default=[100, 36], help="train, val (100 36)")
    args = parser.parse_args()
    parts, rest = {}, {}
    for split, count in zip(("train", "val"), args.count):
        path = args.folder / "annotations" / f"instances_{split}.json"
        content, photos = json.loads(path.read_text()), args.folder / split
        ids = choose(content, count)
        parts[split] = resize(content, ids, photos, args.output, split)
        if split == "train":
            content = subset(content, {image["id"] for image in content["images"]} - set(ids))
        rest[split] = content, photos
    (args.output / "ATTRIBUTION.md").write_text(attribution(parts))
    if args.rest:
        write_linked(args.rest, rest)


if __name__ == "__main__":
    sys.exit(run(main))
