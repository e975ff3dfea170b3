"""Parts of a folder in COCO's layout, as folders of their own."""

import json
from pathlib import Path
from typing import Container, Dict, Tuple

__all__ = ["subset", "write_linked"]


def subset(content: Dict, ids: Container[int]) -> Dict:
    """Annotations in COCO's format of some of their images.

    Args:
        content: the annotations of all images.
        ids: the images to keep.
    """
    part = dict(content)
    for key, name in (("images", "id"), ("annotations", "image_id")):
        part[key] = [entry for entry in content[key] if entry[name] in ids]
    return part


def write_linked(output: Path, splits: Dict[str, Tuple[Dict, Path]]) -> None:
    """Makes a folder in COCO's layout whose photographs are links.

    Args:
        output: the folder, to be made.
        splits: by name, the annotations and the folder of the photographs.
    """
    (output / "annotations").mkdir(parents=True)
    for split, (content, photos) in splits.items():
        (output / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
        (output / split).symlink_to(photos.resolve(), target_is_directory=True)
