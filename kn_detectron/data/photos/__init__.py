"""A small set of real photographs of persons, from COCO: 100 for training and 36 for validation.

Their licences allow changed copies for any purpose: ``ATTRIBUTION.md`` beside this file names them.
``tools/evidence/photo_set.py`` made the folder.
"""

from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

__all__ = ["PHOTOS", "register_photos"]

#: The folder, in COCO's layout.
PHOTOS = Path(__file__).parent


def register_photos() -> None:
    """Registers ``photos_train`` and ``photos_val``. Doing it again changes nothing."""
    for split in ("train", "val"):
        name = f"photos_{split}"
        if name not in DatasetCatalog.list():
            annotations = PHOTOS / "annotations" / f"instances_{split}.json"
            register_coco_instances(name, {}, str(annotations), str(PHOTOS / split))
            # Otherwise known only when the annotations have been read.
            MetadataCatalog.get(name).thing_classes = ["person"]
