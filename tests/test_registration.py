import subprocess
import sys

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads.box_head import FastRCNNConvFCHead
from torch import nn

import kn_detectron
from kn_detectron import registration
from kn_detectron.layers import GroupKalmanNorm2d, KalmanNorm2d


def bindings():
    return {
        name: module.get_norm
        for name, module in sys.modules.items()
        if name.startswith("detectron2") and hasattr(module, "get_norm")
    }


def test_known_everywhere_in_detectron2():
    found = bindings()
    # The modules that the design counts; more may come with newer versions.
    for name in (
        "layers",
        "layers.batch_norm",
        "modeling.backbone.fpn",
        "modeling.backbone.resnet",
    ):
        assert f"detectron2.{name}" in found
    assert len(found) >= 8
    for name, function in found.items():
        assert isinstance(function("KN", 4), KalmanNorm2d), name
        assert isinstance(function("GKN", 64), GroupKalmanNorm2d), name


def test_other_norms_are_as_before():
    from detectron2.layers import get_norm

    assert (
        type(get_norm("BN", 4)) is nn.BatchNorm2d or "BatchNorm" in type(get_norm("BN", 4)).__name__
    )
    assert isinstance(get_norm("GN", 64), nn.GroupNorm)
    assert get_norm("", 4) is None and get_norm(None, 4) is None
    assert isinstance(get_norm(nn.BatchNorm2d, 4), nn.BatchNorm2d)
    with pytest.raises(kn_detectron.InputError, match="the norm 'NoSuchNorm' is unknown"):
        get_norm("NoSuchNorm", 4)

    def broken(channels):
        raise KeyError("of its own")

    with pytest.raises(KeyError, match="of its own"):
        get_norm(broken, 4)


@pytest.mark.parametrize("groups, channels", [(1, 4), (8, 16), (48, 96)])
def test_group_norm_of_any_number_of_groups(groups, channels):
    for function in bindings().values():
        norm = function(f"GN{groups}", channels)
        assert type(norm) is nn.GroupNorm
        assert (norm.num_groups, norm.num_channels) == (groups, channels)


@pytest.mark.parametrize("norm", ["GN0", "GN3"])
def test_groups_that_do_not_divide_the_channels_are_named(norm):
    with pytest.raises(kn_detectron.InputError, match=f"{norm} cannot divide 16 channels"):
        registration.get_norm(norm, 16)


def test_groups_of_gkn_that_do_not_divide_the_channels_are_named():
    with pytest.raises(kn_detectron.InputError, match='32 groups, .* 8 channels: .* as "GN8"'):
        registration.get_norm("GKN", 8)


def test_a_foreign_module_gets_a_head():
    head = FastRCNNConvFCHead(
        ShapeSpec(channels=4, height=7, width=7), conv_dims=[8], fc_dims=[], conv_norm="KN"
    )
    norm = next(m for m in head.modules() if isinstance(m, KalmanNorm2d))
    assert norm.is_head
    head(torch.randn(2, 4, 7, 7)).sum().backward()
    assert norm.weight.grad is not None


def test_idempotent_and_reversible():
    import detectron2.layers
    import detectron2.modeling.backbone.fpn as fpn

    registered = detectron2.layers.get_norm
    kn_detectron.register_norms()
    assert detectron2.layers.get_norm is registered is fpn.get_norm
    try:
        kn_detectron.unregister_norms()
        assert detectron2.layers.get_norm is fpn.get_norm is registration._original_get_norm
        with pytest.raises(KeyError):
            fpn.get_norm("KN", 4)
        kn_detectron.unregister_norms()
    finally:
        kn_detectron.register_norms()
    assert fpn.get_norm is registered


SCRIPT = """
{imports}
import detectron2.modeling.backbone.fpn as fpn
import detectron2.modeling.roi_heads.mask_head as mask_head
from detectron2.layers import get_norm
for function in (fpn.get_norm, mask_head.get_norm, get_norm):
    assert type(function("KN", 4)).__name__ == "KalmanNorm2d"
print("fine")
"""


OURS_FIRST = "import kn_detectron"
# As if detectron2 and its get_norm had been imported before us. (To import it before us for real is
# not possible with the versions of detectron2 that need us in order to be importable.)
DETECTRON2_FIRST = """
import kn_detectron
kn_detectron.unregister_norms()
import detectron2.modeling.backbone.fpn as fpn
try:
    fpn.get_norm("KN", 4)
except KeyError:
    kn_detectron.register_norms()
"""


@pytest.mark.parametrize("imports", [OURS_FIRST, DETECTRON2_FIRST])
def test_both_import_orders(imports):
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(imports=imports)], capture_output=True, text=True
    )
    assert run.stdout.strip().endswith("fine"), run.stderr


def test_the_log_says_once_that_it_is_a_head(caplog, monkeypatch):
    monkeypatch.setattr(registration, "_told", set())
    get_norm_now = sys.modules["detectron2.layers"].get_norm
    with caplog.at_level("WARNING", "kn_detectron.registration"):
        for _ in range(3):
            get_norm_now("KN", 4)
        assert len(caplog.records) == 1
        assert f"{__name__} builds layers with norm='KN'" in caplog.text
        assert "head of its own chain, that is BatchNorm" in caplog.text
        # Of another module it is news.
        exec("get_norm('KN', 4)", {"__name__": "another", "get_norm": get_norm_now})
        assert len(caplog.records) == 2 and "another builds layers" in caplog.text
