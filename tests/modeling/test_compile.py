import copy

import pytest
import torch

from ..models import build_backbone, images, randomize, resnet_cfg


@pytest.mark.parametrize("norm", ["KN", "GKN"])
def test_the_backbone_compiles_as_one_graph(norm):
    overrides = dict(MODEL__RESNETS__DEPTH=18, MODEL__RESNETS__RES2_OUT_CHANNELS=64)
    overrides.update(MODEL__RESNETS__OUT_FEATURES=["res2"], MODEL__RESNETS__STEM_OUT_CHANNELS=64)
    backbone = randomize(build_backbone(resnet_cfg(norm, **overrides)))
    other = copy.deepcopy(backbone)
    torch._dynamo.reset()
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    results = []
    for model, own in ((backbone, backbone), (compiled, other)):
        out = model(images(2, 32))["res2"]
        out.square().mean().backward()
        results.append([out, *(p.grad for p in own.parameters()), *own.buffers()])
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
