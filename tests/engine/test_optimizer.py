import pytest
import torch
from detectron2.solver import build_optimizer

from kn_detectron import InputError
from kn_detectron.engine import Trainer, exempt_filters_from_decay
from kn_detectron.layers import KN_STATE

from ..models import build_backbone, resnet_cfg


@pytest.mark.parametrize("decay_of_norms", [0.0, 0.5])
@pytest.mark.parametrize("variant", ["network", "paper"])
def test_gains_and_process_models_are_never_decayed(decay_of_norms, variant):
    """Everything else is detectron2's: no setting changed, no parameter lost or there twice."""
    cfg = resnet_cfg("KN", MODEL__KN__VARIANT=variant, SOLVER__WEIGHT_DECAY_NORM=decay_of_norms)
    backbone = build_backbone(cfg)

    def settings(optimizer):
        of_groups = [
            (group["params"], {k: v for k, v in group.items() if k != "params"})
            for group in optimizer.param_groups
        ]
        pairs = [(id(p), values) for parameters, values in of_groups for p in parameters]
        assert len(dict(pairs)) == len(pairs)
        return dict(pairs)

    ours = settings(Trainer.build_optimizer(cfg, backbone))
    theirs = settings(build_optimizer(cfg, backbone))
    assert set(ours) == set(theirs)
    filters = 0
    for name, p in backbone.named_parameters():
        want = theirs[id(p)]
        if name.rpartition(".")[2] in KN_STATE:
            filters += 1
            assert want["weight_decay"] == decay_of_norms, name
            want = {**want, "weight_decay": 0}
        assert ours[id(p)] == want, name
    assert filters > 0


def test_a_step_of_decay_moves_no_gain():
    cfg = resnet_cfg("KN", SOLVER__WEIGHT_DECAY_NORM=0.5, SOLVER__BASE_LR=0.1)
    backbone = build_backbone(cfg)
    norm = backbone.stem.conv1.norm
    optimizer = Trainer.build_optimizer(cfg, backbone)
    before = norm.gain_logit.detach().clone(), norm.weight.detach().clone()
    for p in backbone.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(norm.gain_logit, before[0]) and not torch.equal(norm.weight, before[1])


def test_parameters_keep_their_names():
    backbone = build_backbone(resnet_cfg("KN"))
    named = dict(backbone.named_parameters())
    optimizer = torch.optim.SGD(named.items(), lr=0.1, weight_decay=0.1)
    has_names = "param_names" in optimizer.param_groups[0]  # torch takes names from 2.6 on
    assert has_names == (tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 6))
    if not has_names:
        optimizer = torch.optim.SGD(named.values(), lr=0.1, weight_decay=0.1)
    exempt_filters_from_decay(optimizer, backbone)
    decayed, exempt = optimizer.param_groups
    assert len(decayed["params"]) + len(exempt["params"]) == len(named)
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.1, 0.0)
    for group in optimizer.param_groups:
        names = group.get("param_names", [])
        assert len(names) == len(group["params"]) * has_names
        assert all(named[name] is p for name, p in zip(names, group["params"]))


def test_a_scheduler_would_not_know_the_new_groups():
    backbone = build_backbone(resnet_cfg("KN"))
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1, weight_decay=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(InputError, match="call it before the scheduler is built"):
        exempt_filters_from_decay(optimizer, backbone)
    assert len(optimizer.param_groups) == 1
