"""convert_weights writes once and for all what loading does each time."""

import os

import pytest
import torch

from kn_detectron import InputError
from kn_detectron.checkpoint import Conventions, KNCheckpointer, convert_weights
from kn_detectron.layers import KN_STATE

from ..models import build_backbone, build_rcnn, randomize, rcnn_cfg, resnet_cfg
from . import formats
from .networks import trained_batch_norm

RGB = dict(
    INPUT__FORMAT="RGB",
    MODEL__PIXEL_MEAN=[123.675, 116.280, 103.530],
    MODEL__PIXEL_STD=[58.395, 57.120, 57.375],
    MODEL__KN__IMAGE_STD=[58.395, 57.120, 57.375],
    MODEL__RESNETS__STRIDE_IN_1X1=False,
)
PAPER = dict(MODEL__KN__VARIANT="paper")
FPN = dict(
    MODEL__BACKBONE__NAME="build_resnet_fpn_backbone",
    MODEL__RESNETS__OUT_FEATURES=["res2", "res3", "res4", "res5"],
    MODEL__FPN__IN_FEATURES=["res2", "res3", "res4", "res5"],
    MODEL__FPN__OUT_CHANNELS=8,
)
KN_FPN = dict(FPN, MODEL__BACKBONE__NAME="build_kn_resnet_fpn_backbone")


@pytest.fixture(scope="module")
def detector():
    """The state of a trained Mask R-CNN C4 with BatchNorm."""
    return trained_batch_norm().state_dict()


@pytest.fixture(scope="module")
def kn_detector():
    """That of one with KN, whose filters are not what calibration would set."""
    model = trained_batch_norm("KN")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] in KN_STATE:
                parameter.add_(torch.rand(parameter.shape))
    return model.state_dict()


def _load(path, build, cfg):
    model = build(cfg, seed=3)
    KNCheckpointer(model).load(path, [])
    return model.state_dict()


def _assert_same_model(one, other, build, cfg):
    """Two files give the same model, and not just the one that was there before."""
    one, other, before = _load(one, build, cfg), _load(other, build, cfg), build(cfg, seed=3)
    for name, value in one.items():
        if "num_batches" not in name:
            assert torch.equal(value, other[name]), name
    assert any(not torch.equal(value, one[name]) for name, value in before.state_dict().items())


def _content(path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("variant", ["network", "paper"])
@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("source", ["torchvision", "MSRA", "BN detector", "KN detector"])
def test_the_result_loads_as_the_source_does(
    tmp_path, detector, kn_detector, source, variant, learned
):
    bare = formats.bare(detector)
    content, name, options = {
        "torchvision": (formats.torchvision(bare), "r.safetensors", RGB),
        "MSRA": (formats.msra(bare), "r.pkl", {}),
        "BN detector": (formats.model_zoo(detector), "model_final.pkl", {}),
        "KN detector": ({"model": kn_detector, "iteration": 3}, "model_final.pth", {}),
    }[source]
    path, out = formats.write(tmp_path, content, name), str(tmp_path / "out.pth")
    convert_weights(path, out, variant=variant)
    options = dict(options, MODEL__KN__VARIANT=variant, MODEL__KN__LEARN_GAIN=learned)
    _assert_same_model(path, out, build_rcnn, rcnn_cfg("KN", **options))


def test_the_result_loads_as_the_source_does_for_other_images(tmp_path, detector):
    """The file must not settle what depends on the config that loads it."""
    path = formats.write(tmp_path, formats.torchvision(formats.bare(detector)), "r.safetensors")
    out = str(tmp_path / "out.pth")
    convert_weights(path, out)
    options = dict(RGB, MODEL__KN__IMAGE_STD=[30.0, 20.0, 10.0])
    _assert_same_model(path, out, build_rcnn, rcnn_cfg("KN", **options))


def test_of_gray_images(tmp_path, detector):
    gray = {**formats.bare(detector), "stem.conv1.weight": torch.rand(8, 1, 7, 7)}
    out = str(tmp_path / "out.pth")
    convert_weights(formats.write(tmp_path, formats.torchvision(gray), "r.safetensors"), out)
    (stem,) = (v for n, v in _content(out)["model"].items() if n.endswith("stem.conv1.weight"))
    assert torch.equal(stem, gray["stem.conv1.weight"])


@pytest.mark.parametrize("norm", ["BN", "GKN", "GN"])
@pytest.mark.parametrize("source", ["BN", "KN"])
def test_other_norms_load_as_the_source_does(tmp_path, detector, kn_detector, source, norm):
    path = formats.write(tmp_path, dict(BN=detector, KN=kn_detector)[source])
    out = str(tmp_path / "out.pth")
    convert_weights(path, out, norm)
    if norm != "GN":  # of 32 groups, which are too many here
        _assert_same_model(path, out, build_rcnn, rcnn_cfg(norm))
    state = _content(out)["model"]
    kn, statistics = (
        [n for n in state if n.endswith(tuple(ends))]
        for ends in (KN_STATE, ("running_mean", "running_var", "num_batches_tracked"))
    )
    assert not kn and len(statistics) == (53 * 3 if norm == "BN" else 0)
    for name, value in state.items():
        assert torch.equal(value, detector[name]), name


def test_filters_in_half_precision(tmp_path, kn_detector):
    """Only what has more than one axis: gains and statistics stay as they are."""
    source, target = str(tmp_path / "in.pth"), str(tmp_path / "out.pth")
    torch.save(kn_detector, source)
    convert_weights(source, target, "same", half=True)
    state = _content(target)["model"]
    assert set(state) == set(kn_detector)
    for name, tensor in kn_detector.items():
        assert torch.equal(state[name], tensor.half() if tensor.dim() > 1 else tensor), name


def test_what_float16_cannot_hold_stays_as_it_is(tmp_path):
    source, target = str(tmp_path / "in.pth"), str(tmp_path / "out.pth")
    state = {"index": torch.arange(2040, 2060).view(4, 5), "large": torch.tensor([[1.0, 1e5]])}
    # Old versions of detectron2 have these in their checkpoints.
    anchors = "proposal_generator.anchor_generator.cell_anchors.0"
    state.update({"pixel_mean": torch.full((3, 1, 1), 116.28), anchors: torch.full((3, 4), 22.627)})
    torch.save(state, source)
    convert_weights(source, target, "same", half=True)
    for name, tensor in _content(target)["model"].items():
        assert tensor.dtype == state[name].dtype and torch.equal(tensor, state[name])


def test_a_fpn_detector(tmp_path):
    source = randomize(build_backbone(resnet_cfg("BN", **FPN)))
    state = {f"backbone.{n}": v for n, v in source.state_dict().items()}
    path, out = formats.write(tmp_path, state), str(tmp_path / "out.pth")
    convert_weights(path, out)
    new = _content(out)["model"]
    assert set(state) < set(new)
    assert {n.rpartition(".")[2] for n in set(new) - set(state)} == {"mean_offset", "log_var_scale"}
    assert any(name.startswith("backbone.fpn_lateral") for name in new)
    # Its stem is left to the loading, where the images are known.
    assert "backbone.bottom_up.stem.conv1.norm.mean_offset" not in new
    assert "backbone.bottom_up.res5.2.conv3.norm.mean_offset" in new

    class Detector(torch.nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.backbone = build_backbone(resnet_cfg("KN", **KN_FPN), seed)

    _assert_same_model(path, out, lambda cfg, seed: Detector(seed), None)


@pytest.mark.parametrize(
    "options",
    [
        dict(MODEL__RESNETS__DEPTH=18, MODEL__RESNETS__RES2_OUT_CHANNELS=64),
        dict(MODEL__RESNETS__DEPTH=101),
        dict(MODEL__RESNETS__NUM_GROUPS=4, MODEL__RESNETS__WIDTH_PER_GROUP=2),
    ],
)
def test_the_architecture_is_read_off_the_tensors(tmp_path, options):
    options = dict(options, MODEL__RESNETS__OUT_FEATURES=["res5"])
    source = randomize(build_backbone(resnet_cfg("BN", **options)))
    path = formats.write(tmp_path, formats.torchvision(source.state_dict()))
    out = str(tmp_path / "out.pth")
    convert_weights(path, out)
    cfg = resnet_cfg("KN", **{**options, **RGB})
    _assert_same_model(path, out, build_backbone, cfg)
    norms = [n for n in source.state_dict() if n.endswith("running_var")]
    offsets = [n for n in _content(out)["model"] if n.endswith("mean_offset")]
    assert len(offsets) == len(norms) - 1  # the stem's is left to the loading


def test_what_the_file_has_besides(tmp_path, detector, kn_detector):
    out = str(tmp_path / "out.pth")
    convert_weights(formats.write(tmp_path, formats.msra(formats.bare(detector)), "r.pkl"), out)
    content = _content(out)
    assert content["matching_heuristics"] is True
    want = Conventions("BGR", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0), True)
    assert Conventions.from_dict(content["kn_detectron"]) == want
    assert "linear.weight" not in content["model"] and "fc1000.weight" in content["model"]
    # A gain is in it if the source has one, for the same priors.
    assert not any("gain" in name for name in content["model"])
    path = formats.write(tmp_path, {"model": kn_detector, "iteration": 9, "trainer": {"a": 1}})
    convert_weights(path, out)
    assert _content(out)["matching_heuristics"] is False
    assert set(_content(out)) == set(content)
    assert set(_content(out)["model"]) == set(kn_detector)
    convert_weights(path, out, variant="paper")
    assert not any("gain" in name for name in _content(out)["model"])


def test_there_and_back(tmp_path, kn_detector):
    path = formats.write(tmp_path, kn_detector)
    there, back = str(tmp_path / "paper.pth"), str(tmp_path / "network.pth")
    convert_weights(path, there, variant="paper")
    convert_weights(there, back)
    # The chain is calibrated anew.
    _assert_same_model(there, back, build_rcnn, rcnn_cfg("KN"))


# Bad input.


def _refused(folder, content, *patterns, name="in.pth", **kwargs):
    path, out = formats.write(folder, content, name), str(folder / "out.pth")
    with pytest.raises(InputError) as error:
        convert_weights(path, out, **kwargs)
    for pattern in (path, *patterns):
        assert pattern in str(error.value), str(error.value)
    assert sorted(os.listdir(folder)) == [name]


def test_what_cannot_be_converted(tmp_path, detector):
    bare = formats.bare(detector)
    _refused(tmp_path, {"encoder.weight": torch.ones(2)}, "no ResNet", "stem.conv1.weight")
    _refused(tmp_path, formats.without_statistics(bare), "no running statistics")
    _refused(tmp_path, formats.without_statistics(bare), "no running statistics", norm="BN")
    for missing in ("res3.1.conv2.norm.weight", "res4.2.conv1.weight", "res3.0.shortcut.weight"):
        state = {n: v for n, v in bare.items() if n != missing}
        _refused(tmp_path, state, "1 missing", missing)
    for missing in ("res3.0.conv2.weight", "res4.0.conv1.weight"):
        state = {n: v for n, v in bare.items() if n != missing}
        _refused(tmp_path, state, "cannot be read off", missing)
    state = {n: v for n, v in bare.items() if not n.startswith("res3.")}
    _refused(tmp_path, state, "res4 is there without the stage before it")
    state = {**bare, "res4.0.conv2_offset.weight": torch.ones(18, 8, 3, 3)}
    _refused(tmp_path, state, "filters that the model lacks", "conv2_offset")
    state = {**detector, "teacher.stem.conv1.weight": torch.ones(2)}
    _refused(tmp_path, state, "more than one stem")
    state = {**bare, "res3.0.conv2.weight": torch.ones(3)}
    _refused(tmp_path, state, "cannot be read off")


def test_norms_and_variants_that_there_are_not(tmp_path):
    for options, said in ((("FrozenBN",), "norm is one of"), (("KN", "papers"), "variant of")):
        with pytest.raises(ValueError, match=said):
            convert_weights("in.pth", str(tmp_path / "out.pth"), *options)


def test_where_it_cannot_be_written(tmp_path, detector):
    path = formats.write(tmp_path, detector)
    link = tmp_path / "link.pth"
    link.symlink_to(path)
    (tmp_path / "folder.pth").mkdir()
    for target, pattern in (
        (path, "file to convert as well"),
        (str(link), "file to convert as well"),
        (str(tmp_path / "out.pkl"), "does not end in .pth"),
        (str(tmp_path / "none" / "out.pth"), "folder that does not exist"),
        (str(tmp_path / "folder.pth"), "cannot be written"),
    ):
        with pytest.raises(InputError, match=pattern):
            convert_weights(path, target)
    assert sorted(os.listdir(tmp_path)) == ["folder.pth", "link.pth", "model.pth"]
    with pytest.raises(InputError, match="does not exist"):
        convert_weights(str(tmp_path / "nothing.pth"), str(tmp_path / "out.pth"))
