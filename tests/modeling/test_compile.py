import copy

import torch

from ..models import build_backbone, randomize, resnet_cfg

# Two batch sizes, and heights and widths that are no multiples of each other.
SIZES = [(2, 32, 48), (1, 64, 40), (2, 56, 72), (1, 48, 32)]


def test_one_compiled_backbone_trains_at_all_sizes():
    """detectron2 trains at another size in every step. Gradients are those of eager mode.

    No graph break (``fullgraph``), and no size gets a graph of its own once sizes vary.
    """
    backbone = build_backbone(resnet_cfg("KN", **RESNET_18))
    backbone = randomize(backbone).double()  # so that rounding has no part in it
    other = copy.deepcopy(backbone)
    torch._dynamo.reset()
    compiled = torch.compile(other, backend=counting_backend(graphs := []), fullgraph=True)
    for size in SIZES:
        x = torch.randn(size[0], 3, *size[1:], generator=torch.Generator().manual_seed(1)).double()
        results = []
        for model, own in ((backbone, backbone), (compiled, other)):
            out = model(x)
            weight = torch.linspace(-1, 1, out["res2"].shape[1]).double()[:, None, None]
            (out["res2"].sigmoid() * weight).sum().backward()
            results.append([out["res2"], *out.beliefs["res2"], *(p.grad for p in own.parameters())])
            results[-1] += [b for b in own.buffers() if b.is_floating_point()]
        for got, want in zip(*results):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)
    # One for the first size, one for any size, and at most one for each number of images.
    assert len(graphs) <= 4


RESNET_18 = dict(
    MODEL__RESNETS__DEPTH=18,
    MODEL__RESNETS__RES2_OUT_CHANNELS=64,
    MODEL__RESNETS__STEM_OUT_CHANNELS=64,
    MODEL__RESNETS__OUT_FEATURES=["res2"],
)


def counting_backend(graphs):
    """AOT autograd without a compiler behind it, which notes each graph that it is given."""
    from torch._dynamo.backends.debugging import aot_eager

    def backend(graph, example_inputs, **kwargs):
        graphs.append(graph)
        return aot_eager(graph, example_inputs, **kwargs)

    return backend
