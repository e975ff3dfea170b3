"""The evaluation model leaves Python by the exporters of torch and detectron2."""

import onnxruntime
import pytest
import torch
from detectron2.structures import Boxes
from torch import nn
from torch.export import Dim

from kn_detectron.checkpoint import fold

from ..models import build_backbone, images, randomize, resnet_cfg
from .deployed import assert_same_detections, c4_cfg, detect, fpn_cfg, pictures, trained

# Number, height and width of the images are left open. An FPN takes multiples of 32, to which
# detectors pad their images.
_OPEN = {"x": {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}}


def _batches():
    """Images of other numbers and sizes than those that were exported with."""
    return images(1, 96), images(3, 128)


@pytest.fixture(scope="module")
def models():
    """By name, the trained models and what they fold to."""
    configs = {"c4": c4_cfg(), "fpn": fpn_cfg()}
    result = {name: trained(cfg) for name, cfg in configs.items()}
    result.update({f"{name}_folded": fold(configs[name], result[name])[1] for name in configs})
    return result


@pytest.fixture
def export():
    """detectron2's export module, where it can be imported."""
    try:
        from detectron2 import export
    except ModuleNotFoundError as error:
        if error.name != "caffe2":
            raise
        pytest.skip("this detectron2's export module needs caffe2, which PyTorch no longer has")
    return export


def _save_and_load(program, path):
    torch.jit.save(program, path)
    return torch.jit.load(path)


def _exported(backbone):
    with torch.no_grad():
        return torch.export.export(backbone, (images(2, 96),), dynamic_shapes=_OPEN)


@pytest.mark.parametrize("name", ["c4", "c4_folded"])
def test_torch_export_of_the_backbone(name, models, tmp_path):
    backbone = models[name].backbone
    torch.export.save(_exported(backbone), tmp_path / "backbone.pt2")
    exported = torch.export.load(tmp_path / "backbone.pt2").module()
    for x in _batches():
        with torch.no_grad():
            expected, found = models["c4"].backbone(x)["res4"], exported(x)["res4"]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_torch_export_and_onnx_of_an_fpn(models, tmp_path):
    backbone = models["fpn"].backbone
    program, path = _exported(backbone), str(tmp_path / "backbone.onnx")
    exported, levels = program.module(), list(backbone.output_shape())
    torch.onnx.export(program, (), path, input_names=["x"], output_names=levels)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for x in _batches():
        with torch.no_grad():
            expected, found = backbone(x), exported(x)
        for level, of_onnx in zip(levels, session.run(None, {"x": x.numpy()})):
            torch.testing.assert_close(found[level], expected[level], rtol=1e-5, atol=1e-5)
            scale = expected[level].abs().max()
            assert scale > 0
            of_onnx = torch.from_numpy(of_onnx)
            torch.testing.assert_close(of_onnx / scale, expected[level] / scale, rtol=0, atol=1e-4)


class Features(nn.Module):
    """A backbone without the beliefs that it hands on, as the README has it."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x):
        features = self.backbone(x)
        return {name: features[name] for name in self.backbone.output_shape()}


@pytest.mark.parametrize(
    "norm, options",
    [
        ("GKN", {}),
        ("KN", dict(MODEL__KN__EVAL_STATISTICS="batch")),
        ("KN", dict(MODEL__KN__EVAL_STATISTICS="batch", MODEL__KN__VARIANT="paper")),
    ],
)
def test_statistics_of_the_images_are_exported_with_open_sizes(norm, options, tmp_path):
    slim = dict(MODEL__RESNETS__DEPTH=18, MODEL__RESNETS__RES2_OUT_CHANNELS=64)
    slim["MODEL__RESNETS__OUT_FEATURES"] = ["res2"]
    model = Features(randomize(build_backbone(resnet_cfg(norm, **slim, **options)))).eval()
    program, path = _exported(model), str(tmp_path / "backbone.onnx")
    with torch.no_grad():
        torch.onnx.export(program, (), path, input_names=["x"], output_names=["res2"])
    exported = program.module()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for x in _batches():
        with torch.no_grad():
            expected, found = model(x)["res2"], exported(x)["res2"]
        of_onnx = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
        scale = expected.abs().max()
        for feature in (found, of_onnx):
            torch.testing.assert_close(feature / scale, expected / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["c4", "fpn"])
def test_tracing_of_the_detector(name, models, export, tmp_path):
    def inference(model, image):
        return model.inference([{"image": image}], do_postprocess=False)[0]

    model = models[name]
    first, *others = [picture["image"].float() for picture in pictures()]
    adapter = export.TracingAdapter(model, first, inference)
    traced = torch.jit.trace(adapter, adapter.flattened_inputs)
    traced = _save_and_load(traced, str(tmp_path / "model.ts"))
    for image in (first, *others):
        found = adapter.outputs_schema(traced(image))
        assert_same_detections(
            detect(model, [{"image": image}]),
            [{field: getattr(v, "tensor", v) for field, v in found.get_fields().items()}],
        )


@pytest.mark.parametrize("name", ["c4_folded", "fpn_folded"])
def test_scripting_of_the_folded_detector(name, models, export, tmp_path):
    fields = {
        "proposal_boxes": Boxes,
        "objectness_logits": torch.Tensor,
        "pred_boxes": Boxes,
        "scores": torch.Tensor,
        "pred_classes": torch.Tensor,
        "pred_masks": torch.Tensor,
    }
    scripted = export.scripting_with_instances(models[name], fields)
    scripted = _save_and_load(scripted, str(tmp_path / "model.ts"))
    inputs = [{"image": picture["image"].float()} for picture in pictures()]
    with torch.no_grad():
        found = scripted.inference(inputs, do_postprocess=False)
    names = ("pred_boxes", "scores", "pred_classes", "pred_masks")
    found = [{n: getattr(getattr(f, n), "tensor", getattr(f, n)) for n in names} for f in found]
    assert_same_detections(detect(models[name.replace("_folded", "")], inputs), found)
