"""The generated shapes as a classification dataset, for pre-training: one shape fills each image."""

import dataclasses
import logging

import numpy as np
from tqdm import tqdm

from ...errors import InputError
from ..once import write_once
from .detection import SPLITS, render, write_image
from .drawing import CATEGORIES, outline

__all__ = ["SingleShapesSpec", "draw_single_shape", "generate_single_shapes"]

# Part of what identifies a dataset on disk: raise it with every change that alters a pixel.
_VERSION = 1


@dataclasses.dataclass(frozen=True)
class SingleShapesSpec:
    """What a dataset of single shapes consists of.

    Attributes:
        num_train: number of training images.
        num_val: number of validation images.
        size: height and width of every image in pixels.
        seed: image i of a split depends on this seed, `size` and i alone.
    """

    num_train: int = 10000
    num_val: int = 1000
    size: int = 80
    seed: int = 0

    def __post_init__(self):
        for name, lowest in dict(num_train=5, num_val=5, size=32, seed=0).items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < lowest:
                raise InputError(
                    f"{name} of the single shapes is {value!r}: give a whole number of at least "
                    f"{lowest}."
                )


def generate_single_shapes(root, spec=None):
    """Writes single shapes in ImageNet's layout, unless they are there already.

    Image i is ``<split>/<category>/<i>.png``; the categories take turns. See
    :func:`~kn_detectron.data.generate_shapes` for the dataset to detect them in.

    Args:
        root (str or Path): folder to write to; it gets `train/`, `val/` and `shapes.json`.
        spec (SingleShapesSpec or None): what to generate, None for the default.

    Raises:
        InputError: `root` holds something else, or single shapes with other parameters.
    """
    spec = spec or SingleShapesSpec()
    identity = {"kind": "classes", "version": _VERSION, **dataclasses.asdict(spec)}
    write_once(root, identity, lambda folder: _write_dataset(folder, spec))


def draw_single_shape(spec, split, index):
    """Draws one image of a dataset of single shapes, painted like those of the shapes dataset.

    Args:
        spec (SingleShapesSpec): parameters of the dataset; the numbers do not matter here.
        split (str): "train" or "val".
        index (int): position in the split, from 0; the category is this modulo 5.

    Returns:
        ndarray: uint8 of shape (size, size, 3) in BGR order.
    """
    # A fourth number, which the images of the shapes dataset do not have, keeps the two apart.
    rng = np.random.Generator(np.random.PCG64([spec.seed, SPLITS.index(split), index, 1]))
    category = index % len(CATEGORIES)
    extent = spec.size * rng.uniform(0.55, 0.8)
    center = tuple(spec.size * rng.uniform(0.45, 0.55, 2))
    angle = rng.uniform(0, 2 * np.pi)
    shape = outline(CATEGORIES[category], center, extent, angle, squash=rng.uniform(0.8, 1.0))
    return render(rng, [(category, 0, [shape])], spec.size, spec.size)[0]


def _write_dataset(folder, spec):
    counts = dict(zip(SPLITS, (spec.num_train, spec.num_val)))
    logging.getLogger(__name__).info(
        "Generating the single shapes: %d + %d images", *counts.values()
    )
    with tqdm(total=sum(counts.values()), desc="shapes", delay=2, mininterval=1) as progress:
        for split, count in counts.items():
            for name in CATEGORIES:
                (folder / split / name).mkdir(parents=True)
            for index in range(count):
                category = CATEGORIES[index % len(CATEGORIES)]
                path = folder / split / category / f"{index:06d}.png"
                write_image(path, draw_single_shape(spec, split, index))
                progress.update()
