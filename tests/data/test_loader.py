import copy
import itertools
import pickle
import random

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm

from kn_detectron.data import TrainLoader, build_test_loader, build_train_loader
from kn_detectron.errors import InputError

from .conftest import SPEC


def _take(loader, count):
    return list(itertools.islice(loader, count))


def _draws(dataset_dict):
    """A mapper that shows the random numbers it is given."""
    draws = random.random(), np.random.rand(), torch.rand(()).item()
    return {"index": dataset_dict["image_id"], "draws": draws}


def _dicts(count):
    return [
        dict(image_id=i, file_name=f"{i}", width=10 + i % 3, height=11, annotations=[])
        for i in range(count)
    ]


def _loader(count=10, **options):
    return TrainLoader(_dicts(count), _draws, **{"batch_size": 2, "seed": 3, **options})


def _assert_same(batches, others):
    assert len(batches) == len(others) > 0
    for batch, other in zip(batches, others):
        assert [s["file_name"] for s in batch] == [s["file_name"] for s in other]
        for sample, twin in zip(batch, other):
            assert torch.equal(sample["image"], twin["image"])
            ours, theirs = sample["instances"], twin["instances"]
            assert torch.equal(ours.gt_boxes.tensor, theirs.gt_boxes.tensor)
            assert torch.equal(ours.gt_classes, theirs.gt_classes)
            assert torch.equal(ours.gt_masks.tensor, theirs.gt_masks.tensor)


@pytest.mark.parametrize("grouping", [True, False])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_resumed_stream_is_the_uninterrupted_one(cfg, batch_size, grouping):
    cfg.SOLVER.IMS_PER_BATCH = batch_size
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = grouping
    count = 2 * SPEC.num_train // batch_size  # two epochs
    uninterrupted = _take(build_train_loader(cfg), count)
    assert all(len(batch) == batch_size for batch in uninterrupted)
    for num_workers, start in ((0, 7), (2, 0), (2, 7)):
        cfg.DATALOADER.NUM_WORKERS = num_workers
        # What the process drew before, and what its model draws in between, makes no difference.
        torch.manual_seed(start)
        np.random.seed(start)
        loader = build_train_loader(cfg)
        loader.start_iter = start
        resumed = []
        for batch in itertools.islice(loader, count - start):
            resumed.append(batch)
            random.random(), np.random.rand(), torch.rand(3)
        _assert_same(resumed, uninterrupted[start:])


def test_batches_hold_one_orientation(cfg):
    cfg.SOLVER.IMS_PER_BATCH = 3
    for grouping in (True, False):
        cfg.DATALOADER.ASPECT_RATIO_GROUPING = grouping
        batches = _take(build_train_loader(cfg), 20)
        mixed = [len({s["width"] > s["height"] for s in batch}) > 1 for batch in batches]
        assert any(mixed) != grouping


def test_grouping_loses_no_image():
    # 60 batches of 2 out of 12 images: 10 epochs, less at most one image that waits per group.
    seen = [s["index"] for batch in _take(_loader(12), 60) for s in batch]
    counts = np.bincount(seen, minlength=12)
    assert counts.min() >= 9 and counts.max() <= 11


def test_augmentation_differs_between_epochs_images_and_seeds():
    streams = [[s for b in _take(_loader(seed=seed), 15) for s in b] for seed in (3, 4)]
    draws = [s["draws"] for stream in streams for s in stream]
    for column in zip(*draws):
        assert len(set(column)) == len(column) == 60
    assert [s["index"] for s in streams[0]] != [s["index"] for s in streams[1]]


def test_pictures_of_one_image_differ_between_epochs(cfg):
    cfg.SOLVER.IMS_PER_BATCH = 1
    sizes = {}
    for (sample,) in _take(build_train_loader(cfg), 6 * SPEC.num_train):
        sizes.setdefault(sample["file_name"], set()).add(sample["image"].shape)
    assert np.mean([len(s) for s in sizes.values()]) > 1.5


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loading_leaves_the_generators_of_the_process_alone(num_workers):
    def state():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = state()
    _take(_loader(num_workers=num_workers), 3)
    assert state() == before


def test_nothing_starts_before_the_first_batch(monkeypatch):
    started = []
    monkeypatch.setattr("kn_detectron.data.loader.DataLoader", lambda *a, **k: started.append(1))
    stream = iter(_loader())
    assert not started
    with pytest.raises(TypeError):  # what stands in for the DataLoader yields nothing
        next(stream)
    assert started


def test_start_and_seed_count_when_the_first_batch_is_asked_for():
    loader = _loader(seed=1)
    stream = iter(loader)
    loader.start_iter, loader.seed = 4, 3
    assert next(stream) == _take(_loader(seed=3), 5)[4]


def test_ranks_share_the_epoch_and_draw_differently(monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 3)
    samples = []
    for rank in range(3):
        monkeypatch.setattr(comm, "get_rank", lambda: rank)
        samples += [s for batch in _take(_loader(12, batch_size=1), 4) for s in batch]
    assert sorted(s["index"] for s in samples) == list(range(12))
    assert len({s["draws"] for s in samples}) == 12


def test_batch_size_is_shared_among_ranks(cfg, monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 4)
    cfg.SOLVER.IMS_PER_BATCH = 8
    assert build_train_loader(cfg).batch_size == 2
    for wrong in (6, 0):
        cfg.SOLVER.IMS_PER_BATCH = wrong
        with pytest.raises(InputError, match="IMS_PER_BATCH is .*processes, 4"):
            build_train_loader(cfg)


def test_repeat_factor_sampler_repeats_and_resumes(cfg):
    cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    cfg.DATALOADER.REPEAT_THRESHOLD = 0.5
    dicts = _dicts(20)
    for d in dicts:
        d["annotations"] = [{"category_id": int(d["image_id"] == 0)}]
    whole = _take(build_train_loader(cfg, _draws, dicts), 100)
    counts = np.bincount([s["index"] for batch in whole for s in batch])
    # A category in 1 of 20 images, so sqrt(0.5 / 0.05) = 3.2 times as often as the others.
    assert counts[0] > 2 * counts[1:].max()
    loader = build_train_loader(cfg, _draws, dicts)
    loader.start_iter = 60
    assert _take(loader, 40) == whole[60:]


@pytest.fixture
def persons():
    """A dataset of one person each: without keypoints, with one, with two, and nobody."""
    dicts = _dicts(4)
    for d, visible in zip(dicts, (0, 1, 2)):
        keypoints = [1.0, 1.0, 2.0] * visible + [0.0, 0.0, 0.0] * (2 - visible)
        d["annotations"] = [dict(iscrowd=0, category_id=0, bbox=[0, 0, 5, 5], keypoints=keypoints)]
    DatasetCatalog.register("some_persons", lambda: copy.deepcopy(dicts))
    MetadataCatalog.get("some_persons").thing_classes = ["person"]
    yield "some_persons"
    DatasetCatalog.pop("some_persons")
    MetadataCatalog.pop("some_persons")


@pytest.mark.parametrize(
    "options, wanted",
    [
        ([], {0, 1, 2}),
        (["DATALOADER.FILTER_EMPTY_ANNOTATIONS", False], {0, 1, 2, 3}),
        (["MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE", 2], {2}),
    ],
)
def test_images_that_teach_nothing_are_left_out(cfg, persons, options, wanted):
    cfg.DATASETS.TRAIN = (persons,)
    cfg.merge_from_list(options)
    batches = _take(build_train_loader(cfg, _draws), 40)
    assert {sample["index"] for batch in batches for sample in batch} == wanted


def test_proposals_come_with_their_images(cfg, persons, tmp_path):
    boxes = [np.full((1, 4), float(i)) for i in range(4)]
    content = dict(ids=list(range(4)), boxes=boxes, objectness_logits=[np.ones(1)] * 4, bbox_mode=0)
    path = tmp_path / "proposals.pkl"
    path.write_bytes(pickle.dumps(content))
    cfg.DATASETS.TRAIN, cfg.DATASETS.PROPOSAL_FILES_TRAIN = (persons,), (str(path),)
    cfg.MODEL.LOAD_PROPOSALS = True
    seen = []
    _take(build_train_loader(cfg, lambda d: seen.append(d) or _draws(d)), 2)
    assert all((d["proposal_boxes"] == d["image_id"]).all() for d in seen) and seen


def test_unknown_sampler(cfg):
    cfg.DATALOADER.SAMPLER_TRAIN = "RandomSubsetTrainingSampler"
    with pytest.raises(InputError, match="SAMPLER_TRAIN is 'RandomSubset"):
        build_train_loader(cfg)


def test_without_a_name_the_dataset_has_to_be_given(cfg):
    cfg.DATASETS.TRAIN = ()
    with pytest.raises(InputError, match="^DATASETS.TRAIN is empty: name at least one dataset"):
        build_train_loader(cfg)
    assert build_train_loader(cfg, _draws, _dicts(3)).batch_size == 2


@pytest.mark.parametrize("missing", [FileNotFoundError(2, "No such file", "VOC2007"), ImportError])
def test_files_of_other_datasets_that_are_missing_are_a_sentence(cfg, missing):
    """Only those in COCO's format are checked before."""

    def load():
        raise missing

    DatasetCatalog.register("voc_like", load)
    try:
        cfg.DATASETS.TRAIN = ("voc_like",)
        with pytest.raises(InputError, match="^voc_like cannot be loaded .*: put the files there"):
            build_train_loader(cfg)
        with pytest.raises(InputError, match="^voc_like cannot be loaded .*DETECTRON2_DATASETS"):
            build_test_loader(cfg, "voc_like")
    finally:
        DatasetCatalog.remove("voc_like")


def test_images_without_size_cannot_be_grouped(cfg):
    dicts = _dicts(3)
    del dicts[1]["width"]
    with pytest.raises(InputError, match="Image 1 of the dataset has no width"):
        build_train_loader(cfg, _draws, dicts)
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    assert build_train_loader(cfg, _draws, dicts).batch_size == 2


def test_seed_comes_from_the_config_or_is_drawn(cfg):
    assert build_train_loader(cfg).seed == 11
    cfg.SEED = 0
    assert build_train_loader(cfg).seed == 0
    cfg.SEED = -1
    drawn = {build_train_loader(cfg).seed for _ in range(3)}
    assert len(drawn) == 3 and min(drawn) >= 0


def test_resuming_late_loads_nothing_before():
    loaded = []
    loader = TrainLoader(_dicts(100), loaded.append, batch_size=2, seed=3)
    loader.start_iter = 28_000
    next(iter(loader))
    assert len(loaded) == 2


def test_test_loader_gives_every_image_once(cfg):
    names = [batch[0]["file_name"] for batch in build_test_loader(cfg, "shapes_val")]
    assert names == [d["file_name"] for d in DatasetCatalog.get("shapes_val")]
