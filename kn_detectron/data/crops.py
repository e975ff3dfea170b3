"""Generated shapes as a classification dataset, for pre-training: one shape per image."""

import itertools
import logging

from tqdm import tqdm

from .drawing import CATEGORIES
from .once import write_once
from .shapes import SPLITS, ShapesSpec, draw_image, write_image

__all__ = ["generate_classification_shapes"]

# Part of what identifies a dataset on disk: raise it with every change that alters a pixel.
_VERSION = 1


def generate_classification_shapes(root, num_train=10000, num_val=1000, size=96, seed=0):
    """Writes single shapes in ImageNet's layout, unless they are there already.

    The images are those of :func:`~kn_detectron.data.draw_image` that show one object and no crowd,
    so they have the colours, textures and proportions of the detection dataset, and with another
    seed none of its images. Image i is ``<split>/<category>/<i>.png``.

    Args:
        root (str or Path): folder to write to; it gets `train/` and `val/`.
        num_train, num_val (int): number of images.
        size (int): length of the shorter side in pixels.
        seed (int): of the images; the detection dataset of the same seed has other images, since
            it has another size.

    Raises:
        InputError: a parameter is out of range, or `root` holds something else.
    """
    spec = ShapesSpec(num_train, num_val, size, max_shapes=1, seed=seed)
    identity = dict(
        kind="classes", version=_VERSION, num_train=num_train, num_val=num_val, size=size, seed=seed
    )
    write_once(root, identity, lambda folder: _write(folder, spec))


def _write(folder, spec):
    counts = dict(zip(SPLITS, (spec.num_train, spec.num_val)))
    logging.getLogger(__name__).info(
        "Generating the shapes to classify: %d + %d images", *counts.values()
    )
    with tqdm(total=sum(counts.values()), desc="shapes", delay=2, mininterval=1) as progress:
        for split, count in counts.items():
            for name in CATEGORIES:
                (folder / split / name).mkdir(parents=True)
            for index, (image, category) in enumerate(itertools.islice(_draw(spec, split), count)):
                write_image(folder / split / CATEGORIES[category] / f"{index:06d}.png", image)
                progress.update()


def _draw(spec, split):
    """Yields the images that show one object, with its category from 0."""
    for index in itertools.count():
        image, annotations = draw_image(spec, split, index)
        if len(annotations) == 1 and not annotations[0]["iscrowd"]:
            yield image, annotations[0]["category_id"] - 1
