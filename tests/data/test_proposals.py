"""Files of precomputed proposals: what detectron2 reads passes, all else is a sentence."""

import copy
import pickle

import numpy as np
import pytest
from detectron2.data.build import load_proposals_into_dataset
from detectron2.structures import BoxMode

from kn_detectron.data.proposals import check_proposals
from kn_detectron.errors import InputError

_DICTS = [{"image_id": 7}, {"image_id": 9}]
_SOUND = {
    "ids": [9, 7, 8],
    "boxes": [np.array([[1.0, 2, 30, 20], [4, 5, 6, 7]], np.float32)] * 3,
    "objectness_logits": [np.array([0.5, 2.0], np.float32)] * 3,
}


def _without(key, **values):
    return {k: v for k, v in {**_SOUND, **values}.items() if k != key}


def _changed(key, place, value):
    content = copy.deepcopy(_SOUND)
    content[key][place] = value
    return content


@pytest.mark.parametrize(
    "content",
    [
        _SOUND,
        {**_SOUND, "bbox_mode": BoxMode.XYXY_ABS},
        {**_SOUND, "bbox_mode": 1},
        {**_SOUND, "ids": ["9", "7", "8"]},
        {**_SOUND, "ids": np.array([9, 7, 8])},
        {new: _SOUND[old] for new, old in zip(("indexes", "boxes", "scores"), _SOUND)},
        _changed("boxes", 2, None),  # of an image that the dataset does not have
        {
            **_SOUND,
            "boxes": [np.zeros((0, 4), np.float32)] * 3,
            "objectness_logits": [np.zeros(0, np.float32)] * 3,
        },
    ],
)
def test_what_detectron2_reads_passes(tmp_path, content):
    path = tmp_path / "proposals.pkl"
    path.write_bytes(pickle.dumps(content))
    check_proposals(str(path), _DICTS)
    first, _ = load_proposals_into_dataset(copy.deepcopy(_DICTS), str(path))
    assert first["proposal_boxes"].shape[1:] == (4,)


_NAN = np.array([[0, 0, 1, np.nan]] * 2, np.float32)


@pytest.mark.parametrize(
    "content, pattern",
    [
        ([1, 2], "is no file of proposals"),
        ({"ids": print}, "is no file of proposals"),
        (_without("boxes"), "has no list 'boxes'"),
        (_without("ids"), "has no list 'ids'"),
        ({**_SOUND, "objectness_logits": 3}, "has no list 'objectness_logits'"),
        ({**_SOUND, "ids": [9, 7]}, "2 ids, 3 boxes, 3 objectness_logits"),
        ({**_SOUND, "ids": [9, 7, "9"]}, "image id 9 twice, in entries 0 and 2"),
        ({**_SOUND, "ids": [9, 6, 8]}, "has none for image id 7"),
        ({**_SOUND, "bbox_mode": 2}, "bbox_mode 2, where 0 "),
        (_changed("boxes", 1, _NAN), "image id 7, in entry 1, boxes that are not finite"),
        (_changed("boxes", 0, [[1, 2, 3, 4]]), "image id 9, in entry 0, boxes that are no array"),
        (_changed("objectness_logits", 0, np.array(["a", "b"])), "logits that are no array"),
        (_changed("boxes", 0, np.zeros((3, 4))), r"boxes of shape \(3, 4\) and .* shape \(2,\)"),
        (_changed("boxes", 0, np.zeros((2, 5))), r"boxes of shape \(2, 5\)"),
    ],
)
def test_all_else_is_a_sentence(tmp_path, content, pattern):
    path = tmp_path / "proposals.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match=pattern) as caught:
        check_proposals(str(path), _DICTS)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_no_pickle_at_all(tmp_path):
    path = tmp_path / "proposals.pkl"
    path.write_text('{"ids": []}')
    with pytest.raises(InputError, match="is no file of proposals"):
        check_proposals(str(path), _DICTS)
