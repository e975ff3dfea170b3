"""Loaders whose stream of images goes on exactly where a run was interrupted."""

import itertools
import logging
import random
import traceback
from contextlib import contextmanager

import numpy as np
import torch
from detectron2.data import (
    DatasetFromList,
    DatasetMapper,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.build import trivial_batch_collator
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from ..errors import InputError, one_line
from .mapper import CheckedMapper, first_sentence

__all__ = ["TrainLoader", "build_test_loader", "build_train_loader"]


def build_train_loader(cfg, mapper=None, dataset=None):
    """Builds the training loader of a config.

    Every rank has to call it, since the ranks agree on a seed where the config gives none.

    Args:
        cfg (CfgNode): detectron2's config; DATASETS, DATALOADER, INPUT, SOLVER.IMS_PER_BATCH and
            SEED are used.
        mapper (callable or None): turns a dataset dict into a sample; None is detectron2's
            `DatasetMapper`. Its randomness must come from the global generators of `random`,
            numpy and torch, and it must return a sample for every image, not None.
        dataset (list[dict] or None): what to load; None is DATASETS.TRAIN.

    Returns:
        TrainLoader

    Raises:
        InputError: SOLVER.IMS_PER_BATCH or DATALOADER.SAMPLER_TRAIN does not fit, or there is no
            dataset.
    """
    if dataset is None and not cfg.DATASETS.TRAIN:
        raise InputError("DATASETS.TRAIN is empty: name at least one dataset.")
    world_size = comm.get_world_size()
    if cfg.SOLVER.IMS_PER_BATCH <= 0 or cfg.SOLVER.IMS_PER_BATCH % world_size:
        raise InputError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}: give a positive multiple of the "
            f"number of processes, {world_size}."
        )
    if cfg.DATALOADER.SAMPLER_TRAIN not in ("TrainingSampler", "RepeatFactorTrainingSampler"):
        raise InputError(
            f"DATALOADER.SAMPLER_TRAIN is {cfg.DATALOADER.SAMPLER_TRAIN!r}: expected "
            '"TrainingSampler" or "RepeatFactorTrainingSampler", the ones that can be resumed.'
        )
    if dataset is None:
        dataset = _training_dicts(cfg)
    repeat_factors = None
    if cfg.DATALOADER.SAMPLER_TRAIN == "RepeatFactorTrainingSampler":
        # Square roots are the default, and all that detectron2 0.4 knows.
        options = {} if cfg.DATALOADER.get("REPEAT_SQRT", True) else {"sqrt": False}
        repeat_factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            dataset, cfg.DATALOADER.REPEAT_THRESHOLD, **options
        )
    return TrainLoader(
        dataset,
        CheckedMapper(mapper if mapper is not None else DatasetMapper(cfg, is_train=True)),
        batch_size=cfg.SOLVER.IMS_PER_BATCH // world_size,
        seed=cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed(),
        aspect_ratio_grouping=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        repeat_factors=repeat_factors,
    )


def build_test_loader(cfg, dataset_name):
    """Builds detectron2's test loader with a mapper that names an image it cannot use.

    Args:
        cfg (CfgNode): detectron2's config.
        dataset_name (str): a registered dataset.

    Returns:
        torch.utils.data.DataLoader: as `build_detection_test_loader` returns it. An InputError
        of a worker process comes with a traceback in it: see `first_sentence`.

    Raises:
        InputError: the files of the dataset are missing.
    """
    mapper = CheckedMapper(DatasetMapper(cfg, is_train=False))
    with _explained([dataset_name]):
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)


class TrainLoader:
    """An endless stream of batches, a function of the seed, the rank and the world size only.

    Batch k is the same whether the stream starts at 0 or at k, for any number of workers. The
    images of a batch are chosen before any is loaded, and the position of an image in the stream
    seeds its augmentation.

    The loader starts when the first batch is asked for. Until then the attributes may be set.

    Attributes:
        start_iter (int): number of batches of the stream to leave out, 0 at first.
        seed (int): seed of the order and of the augmentations; the same on every rank.
    """

    def __init__(
        self,
        dataset,
        mapper,
        *,
        batch_size,
        seed,
        aspect_ratio_grouping=True,
        num_workers=0,
        repeat_factors=None,
        collate=None,
    ):
        """
        Args:
            dataset (list[dict]): images in detectron2's dataset format.
            mapper (callable): turns one of them into a sample.
            batch_size (int): images per batch on this rank.
            seed (int): at least 0, the same on every rank.
            aspect_ratio_grouping (bool): whether a batch holds either images that are wider than
                high or others.
            num_workers (int): processes that load; 0 loads in this one.
            repeat_factors (Tensor or None): shape (len(dataset),); how often an image is taken
                per epoch on average. None takes each once.
            collate (callable or None): makes a batch of a list of samples; None leaves the list,
                which is what detectron2's models take.
        """
        self.start_iter = 0
        self.seed = seed
        self.batch_size = batch_size
        self.num_workers = num_workers
        self._mapper = mapper
        self._collate = collate or trivial_batch_collator
        self._repeat_factors = repeat_factors
        self._groups = _aspect_groups(dataset) if aspect_ratio_grouping else None
        # One block of bytes, which worker processes share instead of copying it.
        self._dicts = DatasetFromList(dataset, copy=False)
        logging.getLogger(__name__).info(
            "Training on %d images, %d per batch and process", len(self._dicts), batch_size
        )

    def __iter__(self):
        loader = DataLoader(
            _SeededDataset(self._dicts, self._mapper, self.seed, comm.get_rank()),
            batch_sampler=itertools.islice(self._batches(), self.start_iter, None),
            num_workers=self.num_workers,
            collate_fn=self._collate,
            # Of its own, or DataLoader would draw from the global generator, and a resumed run
            # would then see other random numbers in its model than an uninterrupted one.
            generator=torch.Generator().manual_seed(self.seed),
        )
        try:
            yield from loader
        except InputError as error:
            # The frames hold the worker processes, in a cycle. Freed by the garbage collector,
            # these miss the signal to stop and are waited for in vain, 5 seconds each.
            traceback.clear_frames(error.__traceback__)
            raise InputError(first_sentence(error)) from error

    def _batches(self):
        """Yields lists of (position in the stream of this rank, index into the dataset)."""
        if self._repeat_factors is None:
            sampler = TrainingSampler(len(self._dicts), seed=self.seed)
        else:
            sampler = RepeatFactorTrainingSampler(self._repeat_factors, seed=self.seed)
        groups, batch_size = self._groups, self.batch_size
        waiting = [], []
        for token in enumerate(sampler):
            batch = waiting[groups[token[1]] if groups is not None else 0]
            batch.append(token)
            if len(batch) == batch_size:
                yield batch[:]
                batch.clear()


class _SeededDataset(Dataset):
    """Maps (position, index) to a sample whose augmentation depends on nothing but that."""

    def __init__(self, dicts, mapper, seed, rank):
        self._dicts = dicts
        self._mapper = mapper
        self._seed = seed
        self._rank = rank

    def __len__(self):
        return len(self._dicts)

    def __getitem__(self, token):
        position, index = token
        with _seeded([self._seed, self._rank, position]):
            return self._mapper(self._dicts[index])


@contextmanager
def _seeded(entropy):
    """Context that seeds the global generators, and restores them at its end.

    With 0 workers these are the generators of the training process, which the model draws from.

    Args:
        entropy (list[int]): numbers of at least 0, from which the seeds are derived.
    """
    seeds = [int(s) for s in np.random.SeedSequence(entropy).generate_state(3)]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    torch_state = torch.get_rng_state()
    random.seed(seeds[0])
    np.random.seed(seeds[1])
    # Not torch.manual_seed, which seeds the generators of the GPUs too.
    torch.default_generator.manual_seed(seeds[2])
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


def _training_dicts(cfg):
    with _explained(cfg.DATASETS.TRAIN):
        return get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=(
                cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
            ),
            proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
        )


@contextmanager
def _explained(names):
    """Says what to do where datasets that are not in COCO's format, and so unchecked, cannot be read.

    Raises:
        InputError: a file or a package is missing.
    """
    try:
        yield
    except (OSError, ImportError) as error:
        raise InputError(
            f"{', '.join(names)} cannot be loaded ({one_line(error)}): put the files there, set "
            "DETECTRON2_DATASETS to the folder that has them, or install the package that is named."
        ) from error


def _aspect_groups(dataset):
    """Gives one byte per image: 0 for those that are wider than high, 1 for the others."""
    missing = [d["file_name"] for d in dataset if "width" not in d or "height" not in d]
    if missing:
        raise InputError(
            f"Image {missing[0]} of the dataset has no width and height: add them or set "
            "DATALOADER.ASPECT_RATIO_GROUPING to False."
        )
    return bytes(0 if d["width"] > d["height"] else 1 for d in dataset)
