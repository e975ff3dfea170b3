"""The shapes dataset under names that a detectron2 config can use."""

import functools
import os

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from .shapes import CATEGORIES, SPLITS, generate_shapes, shapes_paths

__all__ = ["prepare_dataset", "register_shapes", "register_shapes_lazily"]


def register_shapes(root, spec=None):
    """Generates the shapes dataset if it is not there and registers `shapes_train`, `shapes_val`.

    Calling it again, also with another folder, replaces the registration.

    Args:
        root (str or Path): folder of the dataset.
        spec (ShapesSpec or None): its parameters. None takes the dataset that is there, or else the
            default parameters.

    Raises:
        InputError: `root` holds something else, or shapes with other parameters.
    """
    generate_shapes(root, spec)
    register_shapes_lazily(root, spec)


def register_shapes_lazily(root=None, spec=None):
    """Registers `shapes_train` and `shapes_val`, and generates them when they are first used.

    The first use is loading the dataset, or `prepare_dataset`. Any process may come first; the
    others wait for the one that writes.

    Args:
        root (str or Path or None): folder of the dataset; None is `shapes` in the folder of
            detectron2's datasets, `$DETECTRON2_DATASETS` or else `datasets`.
        spec (ShapesSpec or None): as for `register_shapes`.
    """
    if root is None:
        root = os.path.join(os.getenv("DETECTRON2_DATASETS", "datasets"), "shapes")
    root = os.path.expanduser(root)
    for split in SPLITS:
        name = f"shapes_{split}"
        json_file, image_root = shapes_paths(root, split)
        # Metadata refuses to change a value, so an earlier registration has to go as a whole.
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)
        # As `register_coco_instances` does, and with generating before loading.
        DatasetCatalog.register(name, functools.partial(_load, name))
        MetadataCatalog.get(name).set(
            json_file=json_file,
            image_root=image_root,
            evaluator_type="coco",
            thing_classes=list(CATEGORIES),
            thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(CATEGORIES))},
            prepare=functools.partial(generate_shapes, root, spec),
        )


def prepare_dataset(name):
    """Writes the files of a registered dataset that is generated; does nothing for the others.

    Args:
        name (str): name of a registered dataset.
    """
    prepare = MetadataCatalog.get(name).get("prepare")
    if prepare is not None:
        prepare()


def _load(name):
    prepare_dataset(name)
    metadata = MetadataCatalog.get(name)
    return load_coco_json(metadata.json_file, metadata.image_root, name)
