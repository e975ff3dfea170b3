"""Folders of images in ImageNet's layout, as batches for the classifier."""

import os

import numpy as np
import torch
from detectron2.utils import comm
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from ..data import TrainLoader, read_rgb
from ..errors import InputError, one_line
from .config import micro_batch

__all__ = ["build_eval_loader", "build_train_loader", "open_folders", "training_transform"]

# The image size from which on ImageNet's crops are used. In smaller images objects are small
# already.
_LARGE = 128

# Folders of the images that are evaluated, the first that is there.
_VALIDATION = ("val", "test")

# The label of an image that only fills a batch up.
IGNORED = -1


def open_folders(folder):
    """Lists the images of a folder.

    Args:
        folder (str): it holds train/<class>/ and val/<class>/, or test/<class>/ where there is no
            val/, with the same classes.

    Returns:
        tuple[ImageFolder, ImageFolder]: training and validation; ``samples`` has path and label of
        each image, ``classes`` the names.

    Raises:
        InputError: something is missing or empty, or the classes differ.
    """
    if not os.path.isdir(folder):
        raise InputError(f"--data {folder} is not a folder: give one with train/ and val/ in it.")
    train = _open(folder, "train")
    val = _open(folder, *_VALIDATION)
    if train.classes != val.classes:
        only = sorted(set(train.classes) ^ set(val.classes))[0]
        here, there = (train.root, val.root) if only in train.classes else (val.root, train.root)
        raise InputError(
            f"{here} has the class {only} and {there} does not: give both the same class folders."
        )
    return train, val


def _open(folder, *names):
    root = next((r for r in (os.path.join(folder, n) for n in names) if os.path.isdir(r)), None)
    if root is None:
        raise InputError(
            f"{folder} has no folder {' or '.join(names)}: expected ImageNet's layout, "
            "train/<class>/<image> and val/<class>/<image>."
        )
    try:
        return ImageFolder(root)
    except FileNotFoundError as error:  # no class, or one without images
        raise InputError(
            f"{root} cannot be used ({one_line(error)}): expected a folder per class with at least "
            "one image in it."
        ) from error


def training_transform(size):
    """A random crop, resized to ``size``, and a flip.

    A crop covers at least 8% of the image, as usual for ImageNet, and at least 50% where ``size``
    is below 128 pixels.
    """
    smallest = 0.08 if size >= _LARGE else 0.5
    return v2.Compose(
        [v2.RandomResizedCrop(size, (smallest, 1.0), antialias=True), v2.RandomHorizontalFlip()]
    )


def _validation_transform(size):
    """The middle 87.5% of the short edge, as usual for ImageNet; all of it below 128 pixels."""
    short_edge = round(size / 0.875) if size >= _LARGE else size
    return v2.Compose([v2.Resize(short_edge, antialias=True), v2.CenterCrop(size)])


class _ImageMapper:
    """Turns path and label into an array (3, S, S) of bytes, in the order of channels of the
    config, and the label."""

    def __init__(self, transform, pixel_format):
        if pixel_format not in ("RGB", "BGR"):
            raise InputError(f'INPUT.FORMAT is {pixel_format!r}: give "RGB" or "BGR".')
        self._transform = transform
        self._step = 1 if pixel_format == "RGB" else -1

    def __call__(self, sample):
        image = Image.fromarray(read_rgb(sample["file_name"]))
        pixels = np.asarray(self._transform(image))
        return pixels[:, :, :: self._step].transpose(2, 0, 1), sample["label"]


def _collate(samples):
    pixels, labels = zip(*samples)
    return {"image": torch.from_numpy(np.stack(pixels)), "label": torch.tensor(labels)}


def build_train_loader(cfg):
    """The training images, in batches that depend on seed, rank and iteration only.

    Args:
        cfg (CfgNode): of :func:`~kn_detectron.pretraining.classification_config`.

    Returns:
        TrainLoader: of dicts with ``image``, bytes of shape (N, 3, S, S) in the channel order
        INPUT.FORMAT, and ``label``, shape (N,).

    Raises:
        InputError: the folder, the format or the batch size cannot be used.
    """
    train = _open(cfg.PRETRAINING.DATA, "train")
    return TrainLoader(
        [{"file_name": path, "label": label} for path, label in train.samples],
        _ImageMapper(training_transform(cfg.PRETRAINING.IMAGE_SIZE), cfg.INPUT.FORMAT),
        batch_size=batch_size_of_a_process(cfg),
        seed=cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed(),
        aspect_ratio_grouping=False,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate=_collate,
    )


def batch_size_of_a_process(cfg):
    """The number of images of a process per step, which micro-batches have to divide."""
    world_size = comm.get_world_size()
    batch_size, remainder = divmod(cfg.SOLVER.IMS_PER_BATCH, world_size)
    together = micro_batch(cfg) or 1
    if remainder or batch_size % together:
        raise InputError(
            f"A batch of {cfg.SOLVER.IMS_PER_BATCH} images cannot be shared by {world_size} "
            f"process(es) in groups of {together}: give a --batch-size that is a multiple of "
            f"{world_size * together}."
        )
    return batch_size


class _EvalDataset(Dataset):
    def __init__(self, samples, mapper):
        self._samples = samples
        self._mapper = mapper

    def __len__(self):
        return len(self._samples)

    def __getitem__(self, token):
        index, counts = token
        path, label = self._samples[index]
        pixels, label = self._mapper({"file_name": path, "label": label})
        return pixels, label if counts else IGNORED


def build_eval_loader(cfg):
    """The validation images in a fixed random order, in whole batches of the training's size.

    Statistics of a batch make sense only if the batch is like those of the training: as large, and
    not all of one class, as it would be in the order of the folders. The last batch is filled up
    with images whose label is :data:`IGNORED`.

    Args:
        cfg (CfgNode): of :func:`~kn_detectron.pretraining.classification_config`.

    Returns:
        DataLoader: of this process's share, as :func:`build_train_loader` describes it.
    """
    val = _open(cfg.PRETRAINING.DATA, *_VALIDATION)
    batch_size, world_size = batch_size_of_a_process(cfg), comm.get_world_size()
    order = np.random.RandomState(0).permutation(len(val))
    whole = -(-len(val) // (batch_size * world_size)) * batch_size * world_size
    tokens = list(zip(np.resize(order, whole).tolist(), np.arange(whole) < len(val)))
    mine = tokens[comm.get_rank() :: world_size]
    return DataLoader(
        _EvalDataset(
            val.samples,
            _ImageMapper(_validation_transform(cfg.PRETRAINING.IMAGE_SIZE), cfg.INPUT.FORMAT),
        ),
        batch_sampler=[mine[i : i + batch_size] for i in range(0, len(mine), batch_size)],
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=_collate,
        generator=torch.Generator().manual_seed(0),  # leaves the global one alone
    )
