import pytest
import torch

from kn_detectron.checkpoint import Conventions
from kn_detectron.checkpoint.conventions import differences

from ..models import build_backbone, build_rcnn, rcnn_cfg, resnet_cfg

RGB = Conventions("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375), False)
BGR = Conventions("BGR", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0), True)


@pytest.mark.parametrize("norm", ["KN", "BN"])
@pytest.mark.parametrize("in_1x1", [True, False])
def test_a_model_shows_those_of_its_config(norm, in_1x1):
    cfg = rcnn_cfg(norm, MODEL__RESNETS__STRIDE_IN_1X1=in_1x1, MODEL__PIXEL_STD=[57.4, 57.1, 58.4])
    want = Conventions("BGR", (103.53, 116.28, 123.675), (57.4, 57.1, 58.4), in_1x1)
    assert Conventions.of_config(cfg) == want
    assert Conventions.of_model(build_rcnn(cfg)) == want


def test_what_a_module_does_not_show_is_not_known():
    assert Conventions.of_model(build_backbone(resnet_cfg())) == Conventions(stride_in_1x1=True)
    assert not Conventions.of_model(torch.nn.Linear(2, 2)).known
    basic = resnet_cfg(MODEL__RESNETS__DEPTH=18, MODEL__RESNETS__RES2_OUT_CHANNELS=64)
    assert Conventions.of_model(build_backbone(basic)).stride_in_1x1 is None
    assert Conventions.of_config(basic).stride_in_1x1 is None


def test_they_go_through_a_checkpoint(tmp_path):
    for conventions in (RGB, BGR, Conventions()):
        torch.save(conventions.to_dict(), tmp_path / "a.pth")
        content = torch.load(tmp_path / "a.pth", weights_only=True)
        assert Conventions.from_dict(content) == conventions
    assert Conventions.from_dict({"pixel_format": "RGB", "later": 1}) == Conventions("RGB")


@pytest.mark.parametrize(
    "content",
    [3, {"pixel_format": 3}, {"pixel_mean": "gray"}, {"pixel_std": ["a"]}, {"stride_in_1x1": "no"}],
)
def test_what_is_not_written_by_us_is_refused(content):
    with pytest.raises(ValueError):
        Conventions.from_dict(content)


def test_differences_name_the_key_and_both_values():
    assert differences(RGB, RGB) == differences(RGB, Conventions()) == []
    assert differences(Conventions(), RGB) == []
    clauses = differences(RGB, BGR)
    assert [clause.split()[0] for clause in clauses] == [
        "INPUT.FORMAT",
        "MODEL.PIXEL_MEAN",
        "MODEL.PIXEL_STD",
        "MODEL.RESNETS.STRIDE_IN_1X1",
    ]
    assert "RGB" in clauses[0] and "BGR" in clauses[0]
    assert "other channel order" in clauses[1] and "[123.675, 116.28, 103.53]" in clauses[1]
    assert "other channel order" not in clauses[2]


def test_rounding_is_no_difference():
    assert (
        differences(
            Conventions(pixel_mean=(103.53, 116.28)),
            Conventions(pixel_mean=(103.530001, 116.279999)),
        )
        == []
    )
    assert differences(Conventions(pixel_std=(57.4,)), Conventions(pixel_std=(58.4,)))


def test_another_number_of_channels_is_a_difference():
    gray, rgb = Conventions(pixel_mean=(103.53,)), Conventions(pixel_mean=(103.53, 116.28, 123.675))
    for source, model in ((gray, rgb), (rgb, gray)):
        (clause,) = differences(source, model)
        assert "channel order" not in clause
