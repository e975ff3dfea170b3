import pytest

from benchmark import PRESETS, WHATS, make_groups
from kn_detectron import InputError


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_can_be_made_and_its_bases_are_candidates_or_known_norms(preset):
    groups = make_groups(preset)
    assert {group.what for group in groups} == set(PRESETS[preset])
    for group in groups:
        assert group.bases[0] in group.candidates
        assert len(set(group.candidates)) == len(group.candidates)
        assert len(group.shape) == 4


def test_the_cpu_preset_has_the_layers_that_the_targets_are_set_for():
    layers = {
        preset: {(g.shape, g.dtype, g.memory_format) for g in make_groups(preset, ["layer"])}
        for preset in ("cpu", "gpu")
    }
    assert layers["cpu"] == {layer for layer in layers["gpu"] if layer[1] != "float16"}


def test_the_gpu_preset_has_what_the_targets_are_set_for():
    groups = make_groups("gpu")
    layers = {(g.shape, g.dtype, g.memory_format) for g in groups if g.what == "layer"}
    shapes = {(1, 256, 200, 336), (2, 64, 400, 672), (512, 2048, 7, 7), (128, 512, 7, 7)}
    assert len(layers) == 4 * 3 * 2 and {shape for shape, _, _ in layers} == shapes
    steps = [g for g in groups if g.what == "step"]
    assert {g.shape[0] for g in steps} == {1, 2}
    assert all({"BN", "GN", "KN", "KN-prediction"} <= set(g.candidates) for g in steps)
    (prediction,) = [g for g in groups if g.what == "prediction"]
    assert {"KN@400", "KN@1333"} <= set(prediction.candidates)
    assert {g.what for g in groups} == set(WHATS)


def test_changes_reach_everything_that_has_the_setting():
    groups = make_groups(
        "cpu",
        ["step", "layer", "size"],
        norms=("BN", "KN"),
        dtypes=("bfloat16", "float32"),
        images=(1, 2),
        size=(96, 128),
        regions=4,
        rounds=3,
        formats=None,
    )
    steps = [g for g in groups if g.what == "step"]
    assert [(g.shape, g.dtype) for g in steps] == [
        ((1, 3, 96, 128), "bfloat16"),
        ((1, 3, 96, 128), "float32"),
        ((2, 3, 96, 128), "bfloat16"),
        ((2, 3, 96, 128), "float32"),
    ]
    assert all(g.candidates == ("BN", "KN") and g.regions == 4 for g in steps)
    assert all(g.rounds == 3 for g in groups)
    assert {g.memory_format for g in groups if g.what == "layer"} == {"contiguous", "channels_last"}
    assert [g.at for g in groups if g.what == "size"] == [200, 400, 800, 1333]
    # res4 of an image of 1333 pixels, rounded up four times.
    assert groups[-1].shape == (1, 256, 84, 84)


def test_the_compiled_backbone_is_the_presets_backbone():
    (group,) = make_groups("quick", ["compiled"])
    (backbone,) = make_groups("quick", ["backbone"])
    assert (group.shape, group.slim, group.rounds) == (backbone.shape, True, 2)


@pytest.mark.parametrize(
    "arguments, named",
    [
        (dict(preset="fast"), "preset 'fast'"),
        (dict(whats=["layers"]), "measurement 'layers'"),
        (dict(norms=("BN", "LN")), "norm 'LN'"),
        (dict(dtypes=("int8",)), "dtype 'int8'"),
        (dict(formats=("nhwc",)), "memory format 'nhwc'"),
        (dict(rounds=0), "rounds has the value 0"),
        (dict(regions=-1), "regions has the value -1"),
        (dict(images=(1, 0)), "images has the value 0"),
        (dict(size=(0, 64)), "size has the value 0"),
        (dict(whats=["prediction", "size"], images=(4,)), "images is no setting of prediction or"),
        (dict(shapes=((2, 32, 0, 8),)), "shapes has the value 0"),
    ],
)
def test_what_is_not_known_or_not_positive_is_a_sentence(arguments, named):
    with pytest.raises(InputError, match=named):
        make_groups(**{"preset": "quick", **arguments})
