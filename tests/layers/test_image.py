"""The belief about the images."""

import torch

from kn_detectron.layers.image import ImageBelief


def test_it_is_kept_through_a_network_without_values():
    with torch.device("meta"):
        image = ImageBelief([0.5, 1.0], [2.0, 3.0])
    assert image.belief().mean.is_meta
    image.to_empty(device="cpu")
    assert image.belief().mean.tolist() == [[0.5, 1.0]]
    assert image.belief().var.tolist() == [[4.0, 9.0]]


def test_it_is_kept_in_half_precision():
    mean, var = (
        ImageBelief([0.1], [300.0]).half().belief()
    )  # beyond the range of float16 when squared
    assert mean.dtype == var.dtype == torch.float32
    torch.testing.assert_close((mean, var), (torch.tensor([[0.1]]), torch.tensor([[9e4]])))


def test_it_is_in_no_checkpoint():
    assert not ImageBelief([0.0], [1.0]).state_dict()
