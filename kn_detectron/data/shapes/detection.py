"""A generated instance segmentation dataset in COCO's format: textured, overlapping shapes.

There are five categories, which differ only in their shape; colours, textures and backgrounds are
random. The dataset stands in for COCO where nothing can be downloaded and time is short.
"""

import dataclasses
import json
import logging
import os
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as mask_util
from tqdm import tqdm

from ...errors import InputError
from ..once import write_once
from .drawing import CATEGORIES, cover, outline, rim, texture

__all__ = ["SPLITS", "ShapesSpec", "draw_image", "generate_shapes", "shapes_paths"]

SPLITS = ("train", "val")

# Part of what identifies a dataset on disk: raise it with every change that alters a pixel.
_VERSION = 1

_EMPTY_SHARE = 0.05  # of the images, those without objects
_CROWD_SHARE = 0.08  # of the images, those with a crowd region
_SMALL_SHARE = 0.12  # of the objects, those smaller than the usual sizes
_MIN_VISIBLE = 0.4  # of an object's area; what is hidden further is left out of the image
_MIN_PIXELS = 16


@dataclasses.dataclass(frozen=True)
class ShapesSpec:
    """What a shapes dataset consists of.

    Attributes:
        num_train: number of training images.
        num_val: number of validation images.
        size: length of the shorter side of every image in pixels; the longer one is up to 1.3
            times as long.
        max_shapes: largest number of objects in an image, crowd regions not counted.
        seed: image i of a split depends on this seed, `size`, `max_shapes` and i alone.
    """

    num_train: int = 1000
    num_val: int = 200
    size: int = 160
    max_shapes: int = 4
    seed: int = 0

    def __post_init__(self):
        for name, lowest in dict(num_train=1, num_val=1, size=32, max_shapes=1, seed=0).items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < lowest:
                raise InputError(
                    f"{name} of the shapes dataset is {value!r}: give a whole number of at least "
                    f"{lowest}."
                )


def shapes_paths(root, split):
    """Gives the paths of a split of a shapes dataset.

    Args:
        root (str or Path): folder of the dataset.
        split (str): "train" or "val".

    Returns:
        tuple[str, str]: the annotation file and the folder of the images.
    """
    root = Path(root)
    return str(root / "annotations" / f"instances_{split}.json"), str(root / split)


def generate_shapes(root, spec=None):
    """Writes a shapes dataset, unless it is there already.

    The dataset appears under its name only when it is complete. Processes that ask for the same
    folder at the same time wait for the one that writes it.

    Args:
        root (str or Path): folder to write to; it gets `annotations/`, `train/`, `val/` and
            `shapes.json`.
        spec (ShapesSpec or None): what to generate. None takes whatever shapes dataset is there,
            and generates the default one where there is none.

    Raises:
        InputError: `root` holds something else, or a shapes dataset with other parameters.
    """
    wanted = spec or ShapesSpec()
    write_once(root, _identity(wanted), lambda folder: _write_dataset(folder, wanted), spec is None)


def draw_image(spec, split, index):
    """Draws one image of a shapes dataset.

    Args:
        spec (ShapesSpec): parameters of the dataset; the numbers of images do not matter here.
        split (str): "train" or "val".
        index (int): position in the split, from 0.

    Returns:
        tuple: the image, uint8 of shape (H, W, 3) in BGR order, and its annotations, a list of
        dicts with COCO's keys `category_id`, `iscrowd`, `area`, `bbox` and `segmentation`.
    """
    rng = np.random.Generator(np.random.PCG64([spec.seed, SPLITS.index(split), index]))
    height, width = spec.size, round(spec.size * rng.uniform(1.0, 1.3))
    if rng.random() < 0.5:
        height, width = width, height

    objects = []  # (category id, crowd flag, outlines), from back to front
    if rng.random() >= _EMPTY_SHARE:
        if rng.random() < _CROWD_SHARE:
            objects.append(_random_crowd(rng, spec.size, height, width))
        for _ in range(rng.integers(1, spec.max_shapes + 1)):
            objects.append(_random_object(rng, spec.size, height, width))
    image, objects = render(rng, objects, height, width)
    return image, [_annotate(category, crowd, mask) for category, crowd, _, mask in objects]


def render(rng, objects, height, width):
    """Paints objects onto a textured ground, with noise over all of it.

    Args:
        rng (numpy.random.Generator): source of all choices.
        objects (list[tuple]): (category id, crowd flag, outlines), from back to front.
        height (int), width (int): size of the image in pixels.

    Returns:
        tuple: the image, uint8 of shape (height, width, 3) in BGR order, and the objects that are
        visible: (category id, crowd flag, coverage, visible mask), from back to front.
    """
    objects = _visible_objects(objects, height, width)
    ground = rng.uniform(30, 225, 3)
    image = texture(rng, height, width, ground, contrast=rng.uniform(10, 60))
    for _, _, alpha, _ in objects:
        _paint(rng, image, ground, alpha)
    image += rng.standard_normal((height, width, 3)) * rng.uniform(2, 8)
    return np.rint(np.clip(image, 0, 255)).astype(np.uint8), objects


def write_image(path, image):
    """Writes an image, uint8 of shape (H, W, 3) in BGR order, as a PNG file."""
    if not cv2.imwrite(str(path), image, [cv2.IMWRITE_PNG_COMPRESSION, 1]):
        raise OSError(f"could not write {path}")


def _identity(spec):
    return {"kind": "instances", "version": _VERSION, **dataclasses.asdict(spec)}


def _write_dataset(folder, spec):
    logger = logging.getLogger(__name__)
    logger.info("Generating the shapes dataset: %d + %d images", spec.num_train, spec.num_val)
    (folder / "annotations").mkdir()
    with tqdm(
        total=spec.num_train + spec.num_val, desc="shapes", delay=2, mininterval=1
    ) as progress:
        for split, count in zip(SPLITS, (spec.num_train, spec.num_val)):
            json_file, image_root = shapes_paths(folder, split)
            os.mkdir(image_root)
            images, annotations = [], []
            for index in range(count):
                image, objects = draw_image(spec, split, index)
                record = {
                    "id": index + 1,
                    "file_name": f"{index:06d}.png",
                    "height": image.shape[0],
                    "width": image.shape[1],
                }
                images.append(record)
                for annotation in objects:
                    # COCO's evaluation takes id 0 for "no match", hence from 1.
                    number = len(annotations) + 1
                    annotations.append({"id": number, "image_id": index + 1, **annotation})
                write_image(os.path.join(image_root, record["file_name"]), image)
                progress.update()
            content = {
                "info": {"description": "kn_detectron shapes", **_identity(spec)},
                "images": images,
                "annotations": annotations,
                "categories": [{"id": i + 1, "name": n} for i, n in enumerate(CATEGORIES)],
            }
            Path(json_file).write_text(json.dumps(content, separators=(",", ":")))


def _random_object(rng, short_side, height, width):
    category = int(rng.integers(len(CATEGORIES)))
    low, high = (0.1, 0.2) if rng.random() < _SMALL_SHARE else (0.22, 0.65)
    size = short_side * rng.uniform(low, high)
    # Centres keep away from the border by a third of the size, so that few shapes are cut off.
    center = (
        rng.uniform(size / 3, width - size / 3),
        rng.uniform(size / 3, height - size / 3),
    )
    angle = rng.uniform(0, 2 * np.pi)
    shape = outline(CATEGORIES[category], center, size, angle, squash=rng.uniform(0.8, 1.0))
    return category, 0, [shape]


def _random_crowd(rng, short_side, height, width):
    """A cluster of tiny shapes of one category on a jittered grid."""
    category = int(rng.integers(len(CATEGORIES)))
    columns, rows = rng.integers(3, 6), rng.integers(2, 4)
    pitch = short_side * 0.12
    left = rng.uniform(0, width - pitch * columns)
    top = rng.uniform(0, height - pitch * rows)
    shapes = []
    for row in range(rows):
        for column in range(columns):
            dx, dy = rng.uniform(0.4, 0.6, 2)
            center = (left + pitch * (column + dx), top + pitch * (row + dy))
            size = pitch * rng.uniform(0.6, 0.85)
            angle = rng.uniform(0, 2 * np.pi)
            shapes.append(outline(CATEGORIES[category], center, size, angle, squash=1.0))
    return category, 1, shapes


def _visible_objects(objects, height, width):
    """Leaves out the objects that those in front hide, and finds the visible part of the others.

    An object left out is not painted either, so that no object in an image lacks an annotation.

    Args:
        objects (list[tuple]): (category id, crowd flag, outlines), from back to front.
        height (int), width (int): size of the image in pixels.

    Returns:
        list[tuple]: (category id, crowd flag, coverage, visible mask), from back to front; the
        last two have shape (height, width), float64 and bool.
    """
    kept = []
    hidden = np.zeros((height, width), bool)
    for category, crowd, shapes in reversed(objects):
        alpha = cover(shapes, height, width)
        mask = alpha >= 0.5
        visible = mask & ~hidden
        if visible.sum() >= max(_MIN_PIXELS, _MIN_VISIBLE * mask.sum()):
            kept.append((category, crowd, alpha, visible))
            hidden |= mask
    return kept[::-1]


def _paint(rng, image, ground, alpha):
    """Paints what `alpha` covers with a texture unlike the background, darker along its edge.

    Args:
        rng (numpy.random.Generator): source of all choices.
        image (ndarray): float64 of shape (H, W, 3), painted in place.
        ground (ndarray): colour of the background, shape (3,).
        alpha (ndarray): float64 of shape (H, W), the share of each pixel to paint.
    """
    color = rng.uniform(20, 235, 3)
    while np.abs(color - ground).max() < 80:
        color = rng.uniform(20, 235, 3)
    rows, columns = (np.flatnonzero(alpha.any(axis=axis)) for axis in (1, 0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    edge, alpha = rim(alpha)[box][:, :, None], alpha[box][:, :, None]
    paint = texture(rng, *alpha.shape[:2], color, contrast=rng.uniform(20, 70))
    paint *= 1 - 0.6 * edge
    image[box] += (paint - image[box]) * alpha


def _annotate(category, crowd, mask):
    """Turns a mask, bool of shape (H, W), into a COCO annotation without ids."""
    rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
    polygon = None if crowd else _polygon_of(mask)
    return {
        "category_id": category + 1,
        "iscrowd": crowd,
        "area": int(mask_util.area(rle)),
        "bbox": [int(v) for v in mask_util.toBbox(rle)],
        "segmentation": (
            {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}
            if polygon is None
            else [polygon]
        ),
    }


def _polygon_of(mask):
    """Gives the polygon along the pixel edges of a mask, which rasterises to exactly that mask.

    Args:
        mask (ndarray): bool of shape (H, W).

    Returns:
        list[int] or None: x1, y1, x2, y2, ...; None for a mask that has holes or several parts.
    """
    parts, _ = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    # Pixels become 2 x 2 blocks: the centres of a block's cells then fall on either side of the
    # pixel's middle and round to its left or right (upper or lower) edge.
    double = mask.astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    contours, _ = cv2.findContours(double, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    if parts != 2 or len(contours) != 1:  # the background counts as a part
        return None
    corners = (contours[0][:, 0, :].astype(np.int64) + 1) // 2
    corners = corners[(corners != np.roll(corners, 1, axis=0)).any(axis=1)]
    before, after = corners - np.roll(corners, 1, axis=0), np.roll(corners, -1, axis=0) - corners
    turns = before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]
    corners = corners[turns]
    # Where a contour starts and which way it runs differs between OpenCV's releases: from the
    # highest corner, of these the leftmost, along the upper edge to the right.
    first = np.lexsort((corners[:, 0], corners[:, 1]))[0]
    corners = np.roll(corners, -first, axis=0)
    if corners[1, 1] != corners[0, 1]:
        corners = np.roll(corners[::-1], 1, axis=0)
    return corners.ravel().tolist()
