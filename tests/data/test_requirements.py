"""What a config asks of its datasets."""

import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from kn_detectron.data import check_requirements
from kn_detectron.data.annotations import Truth
from kn_detectron.errors import InputError

_TRUTH = Truth(
    json_file="some.json",
    classes=("cat", "dog"),
    has_annotations=True,
    num_objects=5,
    num_without_mask=0,
    first_without_mask=None,
    has_encoded_masks=False,
    most_objects=3,
    fullest_image="1.png",
)


@pytest.fixture(autouse=True)
def registered():
    names = "needs_train", "needs_val"
    for name in names:
        DatasetCatalog.register(name, list)
        MetadataCatalog.get(name).set(json_file="some.json", evaluator_type="coco")
    yield
    for name in names:
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name)


def _check(*options, train=_TRUTH, val=_TRUTH):
    cfg = get_cfg()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("needs_train",), ("needs_val",)
    cfg.MODEL.MASK_ON, cfg.MODEL.ROI_HEADS.NUM_CLASSES = True, 2
    cfg.merge_from_list(list(options))
    check_requirements(cfg, {"TRAIN": {"needs_train": train}, "TEST": {"needs_val": val}})


def _other(**values):
    return _TRUTH._replace(json_file="other.json", **values)


def test_what_fits_passes(kn_log):
    _check()
    _check("MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.NUM_CLASSES", 2)
    _check("MODEL.META_ARCHITECTURE", "KNRetinaNet", "MODEL.RETINANET.NUM_CLASSES", 2)
    # A network for proposals knows no classes.
    _check("MODEL.META_ARCHITECTURE", "ProposalNetwork", "MODEL.ROI_HEADS.NUM_CLASSES", 80)
    _check("MODEL.MASK_ON", False, val=_other(num_without_mask=3, first_without_mask=0))
    _check("INPUT.MASK_FORMAT", "bitmask", train=_other(has_encoded_masks=True))
    _check(val=_other(has_encoded_masks=True))  # which only COCO's evaluation reads
    assert not kn_log.records


@pytest.mark.parametrize(
    "options, truths, pattern",
    [
        (["MODEL.ROI_HEADS.NUM_CLASSES", 3], {}, "ROI_HEADS.NUM_CLASSES is 3, .*has 2 categories"),
        (["MODEL.META_ARCHITECTURE", "RetinaNet"], {}, "RETINANET.NUM_CLASSES is 80, .* 2"),
        (["MODEL.META_ARCHITECTURE", "KNRetinaNet"], {}, "RETINANET.NUM_CLASSES is 80, .* 2"),
        ([], {"val": _other(classes=("dog", "cat"))}, "number 1 is 'cat' in one and 'dog' in the"),
        ([], {"val": _other(classes=("cat",))}, "number 2 is 'dog' in one and nothing in the"),
        (
            [],
            {"train": _other(num_objects=0)},
            "other.json has no object to learn from: .* or MODEL.MASK_ON False",
        ),
        (
            ["MODEL.MASK_ON", False],
            {"train": _other(num_objects=0)},
            "other.json has no object to learn from: .* within its image.$",
        ),
        (
            [],
            {"val": _other(num_without_mask=3, first_without_mask=8)},
            "other.json has 3 objects without segmentation, .* entry 8 .* MODEL.MASK_ON False",
        ),
        ([], {"train": _other(has_encoded_masks=True)}, 'INPUT.MASK_FORMAT to "bitmask"'),
        (["MODEL.KEYPOINT_ON", True], {}, "needs_train has no keypoint_names"),
        (["MODEL.META_ARCHITECTURE", "PanopticFPN"], {}, "PanopticFPN needs semantic segment"),
        (["MODEL.META_ARCHITECTURE", "SemanticSegmentor"], {}, "needs semantic segmentations"),
        (["MODEL.LOAD_PROPOSALS", True], {}, "PROPOSAL_FILES_TRAIN has 0 files for the 1"),
        (
            ["MODEL.LOAD_PROPOSALS", True, "DATASETS.PROPOSAL_FILES_TRAIN", ("a.pkl",)],
            {},
            "a.pkl of DATASETS.PROPOSAL_FILES_TRAIN does not exist",
        ),
        (  # an address, as detectron2's configs of Fast R-CNN have it
            ["MODEL.LOAD_PROPOSALS", True, "DATASETS.PROPOSAL_FILES_TRAIN", ("catalog://a.pkl",)],
            {},
            "catalog://a.pkl cannot be downloaded",
        ),
        (
            ["MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"],
            {},
            "LOAD_PROPOSALS is False",
        ),
    ],
)
def test_what_does_not_fit_is_a_sentence(options, truths, pattern):
    with pytest.raises(InputError, match=pattern) as caught:
        _check(*options, **truths)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_objects_may_be_in_a_dataset_of_another_format(kn_log):
    cfg = get_cfg()
    cfg.DATASETS.TRAIN, cfg.MODEL.MASK_ON = ("needs_train", "other_format"), True
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    check_requirements(cfg, {"TRAIN": {"needs_train": _other(num_objects=0)}})


def test_keypoints(kn_log):
    for name in ("needs_train", "needs_val"):
        MetadataCatalog.get(name).set(keypoint_names=["a", "b"], keypoint_flip_map=[])
    number = ["MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 2]
    for sigmas in ([], [0.1]):
        with pytest.raises(InputError, match=f"SIGMAS has {len(sigmas)} numbers, .*each of 2"):
            _check(*number, "TEST.KEYPOINT_OKS_SIGMAS", sigmas, train=_other(most_keypoints=3))
    on = [*number, "TEST.KEYPOINT_OKS_SIGMAS", [0.1, 0.1]]
    least = [*on, "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE"]
    labelled = _other(most_keypoints=3)
    _check(*on, train=labelled)
    _check(*least, 3, train=labelled)
    with pytest.raises(
        InputError, match="PER_IMAGE is 4, but no image of other.json has more than 3"
    ):
        _check(*least, 4, train=labelled)
    for number in (0, 1):
        with pytest.raises(InputError, match="no image of some.json has more than 0 labelled"):
            _check(*least, number)
    with pytest.raises(InputError, match="NUM_KEYPOINTS is 17, .*has 2 keypoint_names"):
        _check("MODEL.KEYPOINT_ON", True)


def test_number_of_classes_of_a_dataset_in_another_format():
    DatasetCatalog.register("needs_other", list)
    try:
        cfg = get_cfg()
        cfg.DATASETS.TRAIN = ("needs_other",)
        check_requirements(cfg, {"TRAIN": {}})  # it does not say which classes it has
        MetadataCatalog.get("needs_other").thing_classes = ["a", "b", "c"]
        with pytest.raises(InputError, match="is 80, but dataset needs_other has 3 categories"):
            check_requirements(cfg, {"TRAIN": {}})
    finally:
        DatasetCatalog.pop("needs_other")
        MetadataCatalog.pop("needs_other")


def test_classes_of_another_registration():
    MetadataCatalog.get("needs_val").set(thing_classes=["a", "b"])
    with pytest.raises(InputError, match="the categories cat, dog, but .* with a, b"):
        _check()


def test_more_objects_than_cocos_ap_looks_at(kn_log):
    _check(train=_TRUTH._replace(most_objects=500), val=_TRUTH._replace(most_objects=100))
    assert not kn_log.records
    _check(val=_TRUTH._replace(most_objects=101))
    assert "Image 1.png of some.json has 101 objects, but COCO's AP stops at 100" in kn_log.text


def test_nothing_to_find(kn_log):
    _check(val=_TRUTH._replace(num_objects=0, has_annotations=False))  # a test set
    assert not kn_log.records
    _check(val=_TRUTH._replace(num_objects=0))
    assert "there will be no AP" in kn_log.text
