"""What cannot be the tensors of a network is refused by name."""

import math

import numpy as np
import pytest
import torch

from kn_detectron import InputError
from kn_detectron.files import check_variances, checked_tensors


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6.0).reshape(2, 3),
        np.arange(6, dtype=">f4").reshape(2, 3),  # the other byte order on most machines
        np.broadcast_to(np.float32(1.0), (2, 3)),  # read-only
    ],
)
def test_arrays_become_tensors_of_their_own(array):
    state = {"a": array, "b": torch.ones(1)}
    assert checked_tensors(state, "file.pth") is state
    assert torch.equal(state["a"], torch.tensor(array.tolist(), dtype=state["a"].dtype))
    state["a"].zero_()
    assert array.any()


@pytest.mark.parametrize(
    "state, sentence",
    [
        ([], "file.pth is not a checkpoint of a model: a dict of tensors was expected"),
        ({}, "file.pth is not a checkpoint of a model: a dict of tensors was expected"),
        ({3: torch.ones(1)}, "the name of its entry 3 is no text"),
        ({"a": "text"}, "its entry 'a' is of type str where a dense tensor"),
        ({"a": torch.zeros(2).to(torch.float8_e4m3fn)}, "'a' is a tensor of torch.float8_e4m3fn"),
        ({"a": torch.zeros(2).to_sparse()}, "'a' is a tensor of torch.float32, torch.sparse_coo"),
        ({"a": torch.ones(1, dtype=torch.cfloat)}, "its entry 'a' is a tensor of torch.complex64"),
        (
            {"a": torch.ones(1), "b": torch.tensor([1.0, math.nan]), "c": torch.tensor(math.inf)},
            "not finite in 2 of 3 tensors, the first b",
        ),
    ],
)
def test_what_is_refused(state, sentence):
    with pytest.raises(InputError, match=sentence):
        checked_tensors(state, "file.pth")


def test_infinity_where_it_is_allowed_but_never_nan():
    state = {"gain": torch.tensor(math.inf)}
    assert checked_tensors(state, "file.pth", may_be_infinite=lambda name: name == "gain") is state
    with pytest.raises(InputError, match="the first gain"):
        checked_tensors({"gain": torch.tensor(math.nan)}, "file.pth", lambda name: True)


def test_negative_variances():
    good = {"n.running_var": torch.zeros(2), "n.running_mean": -torch.ones(2)}
    check_variances(good, "file.pth")
    with pytest.raises(InputError, match="file.pth has negative variances in 1 .* n.running_var"):
        check_variances({**good, "n.running_var": torch.tensor([1.0, -1.0])}, "file.pth")
