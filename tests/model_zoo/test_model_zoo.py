import os

import pytest

from kn_detectron import InputError
from kn_detectron.model_zoo import get_config, get_config_file


def test_get_config_file_and_config():
    path = get_config_file("mask_rcnn_R50_C4_KN.yaml")
    assert os.path.isfile(path)
    cfg = get_config("mask_rcnn_R50_C4_KN.yaml")
    assert cfg.MODEL.RESNETS.NORM == "KN" and cfg.SOLVER.MAX_ITER == 280000
    cfg.MODEL.KN.GAIN = 0.5  # not frozen


def test_an_unknown_config_is_answered_with_those_there_are():
    with pytest.raises(InputError, match="no config R50.yaml: .* mask_rcnn_R50_C4_KN.yaml"):
        get_config_file("R50.yaml")
