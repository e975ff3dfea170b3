"""Which pixels share statistics."""

import numpy as np
import pytest
import torch

from kn_detectron.layers import passes
from kn_detectron.layers.sets import Sets

from .inputs import features
from .test_passes import DTYPES, FORMATS

LAYOUTS = pytest.mark.parametrize(
    "rows, groups", [(1, 6), (2, 6), (4, 6), (4, 2), (4, 3), (4, 1), (1, 2), (2, 1), (1, 1)]
)


@FORMATS
@LAYOUTS
@DTYPES
def test_moments_are_those_of_the_pixels_of_each_set(memory_format, rows, groups, dtype):
    x = features(dtype, memory_format)
    mean, var = Sets(4, 6, rows, groups).moments(x)
    assert mean.dtype == var.dtype == passes.statistics_dtype(x)
    pixels = x.double().contiguous().view(rows, 4 // rows, groups, 6 // groups, -1).numpy()
    np.testing.assert_allclose(mean.double(), pixels.mean((1, 3, 4)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(var.double(), pixels.var((1, 3, 4)), rtol=1e-4, atol=1e-5)


@LAYOUTS
def test_spread_gives_each_channel_of_each_image_the_number_of_its_set(rows, groups):
    numbers = torch.arange(float(rows * groups)).view(rows, groups)
    got = Sets(4, 6, rows, groups).spread(numbers)
    want = [
        [numbers[image * rows // 4, channel * groups // 6].item() for channel in range(6)]
        for image in range(4)
    ]
    assert got.view(-1, 6).tolist() == (want[:1] if (rows, groups) == (1, 6) else want)


@LAYOUTS
def test_spread_is_dense_whatever_it_gets(rows, groups):
    # torch's kernels for channels_last read vectors at their address, without regard to strides.
    numbers = torch.arange(2.0 * rows * groups).view(rows, groups, 2)[..., 0]
    got = Sets(4, 6, rows, groups).spread(numbers)
    assert got.is_contiguous()
    assert torch.equal(got, Sets(4, 6, rows, groups).spread(numbers.contiguous()))


def test_one_row_may_stand_for_all():
    numbers = torch.arange(3.0)[None]
    assert Sets(4, 6, 4, 3).spread(numbers).view(4, 6).tolist() == [[0, 0, 1, 1, 2, 2]] * 4
