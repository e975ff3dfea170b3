"""The experiments end to end: one short run each, and what is done is not done again."""

import json
import re
import sys

import pytest
import torch
from detectron2.config import get_cfg
from evidence import classification, detection
from evidence.arms import ARMS, R50, solver_options
from evidence.runs import read_results, run_all, run_apart, write_result
from torch import nn
from torch.nn import functional as F

import kn_detectron
from kn_detectron import InputError
from kn_detectron.data import ShapesSpec, generate_shapes
from kn_detectron.model_zoo import get_config, released_weights

from ...pretraining.conftest import folder, write_images  # noqa: F401


def call(monkeypatch, tool, *arguments):
    monkeypatch.setattr(sys, "argv", [tool.__name__, *map(str, arguments)])
    tool.main()


def test_a_detector_is_trained_and_evaluated(tmp_path, monkeypatch):
    shapes, output = tmp_path / "shapes", tmp_path / "runs"
    generate_shapes(str(shapes), ShapesSpec(num_train=4, num_val=2, size=64, max_shapes=2))
    arguments = ("--dataset", shapes, "--output", output, "--arms", "KN", "--images", 1)
    arguments += ("--seeds", 5, "--opts", "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", "()")
    arguments += ("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", 64)
    call(monkeypatch, detection, *arguments, "DATALOADER.NUM_WORKERS", 0)
    result = json.loads((output / "KN_1im_seed5" / "result.json").read_text())
    assert (result["arm"], result["images"], result["seed"], result["steps"]) == ("KN", 1, 5, 2)
    assert set(result["results"]) == {"bbox", "segm"} and "AP50" in result["results"]["segm"]
    detections = "inference/shapes_val/coco_instances_results.json"
    assert (output / "KN_1im_seed5" / detections).is_file()
    assert not list((shapes / "val").glob("*.json"))


def test_a_classifier_is_trained_and_evaluated(tmp_path, monkeypatch, folder):  # noqa: F811
    arguments = ("--data", folder, "--output", tmp_path, "--arms", "GN", "--epochs", 1)
    monkeypatch.setattr(classification, "_BATCH_SIZE", 8)
    call(monkeypatch, classification, *arguments, "--micro-batches", 2, 4)
    (result,) = tmp_path.glob("*/result.json")  # one for all micro-batches
    found = json.loads(result.read_text())["results"]
    assert 0 <= found["moving"]["top1"] <= 100 and found["moving"] == found["online"]


def built(name):
    arm = ARMS[name]
    cfg = get_config(arm.config)
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", *arm.options])
    return detection.trainer_class(arm).build_model(cfg).train()


def test_only_scale_and_shift_of_frozen_norms_are_trained():
    norms = [m for m in built("BN_affine").backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 49
    assert all(norm.weight.requires_grad and not norm.training for norm in norms)


def test_batches_do_not_change_the_statistics_of_a_detector_whose_scale_and_shift_are_trained():
    model = built("R50_BN_affine")
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 53 - 11  # stem and res2 are frozen altogether
    for norm in norms:
        mean, var = torch.randn(norm.num_features), torch.rand(norm.num_features) + 0.5
        norm.running_mean.copy_(mean), norm.running_var.copy_(var)
        x = torch.randn(2, norm.num_features, 3, 3, requires_grad=True)
        want = F.batch_norm(x, mean, var, norm.weight, norm.bias, eps=norm.eps)
        y = norm(x)
        assert torch.equal(y, want) and torch.equal(norm.running_mean, mean)
        y.sum().backward()
        assert norm.bias.grad.abs().sum() > 0


def test_group_norm_takes_over_scale_shift_and_activation():
    batch, group = built("BN").backbone, built("GN").backbone
    assert not [m for m in group.modules() if isinstance(m, nn.BatchNorm2d)]
    pairs = [
        (old, group.get_submodule(name))
        for name, old in batch.named_modules()
        if isinstance(old, nn.BatchNorm2d)
    ]
    assert len(pairs) == 49
    for old, new in pairs:
        norm = nn.GroupNorm(old.num_features // 8, old.num_features, eps=old.eps)
        x = torch.randn(2, old.num_features, 5, 4)
        y = norm(x) * old.weight[:, None, None] + old.bias[:, None, None]
        torch.testing.assert_close(new(x), old.act(y))


def gradients(name):
    """The gradients of a backbone for one image, those of b and r and those of all else."""
    torch.manual_seed(0)
    backbone = built(name).backbone
    features = backbone(torch.rand(1, 3, 64, 64))
    sum(feature.square().mean() for feature in features.values()).backward()
    found = {name: parameter.grad for name, parameter in backbone.named_parameters()}
    of_process = {n: g for n, g in found.items() if n.endswith(("mean_offset", "log_var_scale"))}
    return of_process, {n: g for n, g in found.items() if n not in of_process}


def test_one_part_of_kn_is_changed():
    process, others = gradients("KN_gain0")
    assert len(process) == 2 * 49
    held, of_held = gradients("KN_held_process")
    assert not any(gradient is not None for gradient in held.values())
    fast, of_fast = gradients("KN_fast_process")
    torch.testing.assert_close(fast, {name: 10.0 * g for name, g in process.items()})
    torch.testing.assert_close(of_held, others)
    torch.testing.assert_close(of_fast, others)
    _, cut = gradients("KN_no_prior_gradient")
    assert any(not torch.allclose(cut[name], others[name]) for name in others)


# What each detector starts from: a released file, or the arm of the pre-training that writes it.
PRETRAINED = {
    "R50_BN_frozen": "slim_R50_BN.pth",
    "R50_BN_affine": "slim_R50_BN.pth",
    "R50_BN": "slim_R50_BN.pth",
    "R50_GN": "R50_GN",
    "R50_GKN": "R50_GKN",
    "R50_KN": "slim_R50_KN.pth",
    "R50_KN_gain0": "slim_R50_KN.pth",
    "R50_KN_from_BN": "slim_R50_BN.pth",
}


@pytest.mark.parametrize("name", R50)
def test_detectors_start_from_the_weights_of_their_norm(name):
    source = PRETRAINED[name]
    if source in released_weights():
        want = f"kn://{source}"
    else:
        shared = 64 if classification.R50[source].shares else 1
        want = f"output/tiny200/{source}_m{shared}_seed1/backbone.pth"
    cfg = get_config(R50[name].config)
    cfg.merge_from_list(list(R50[name].options))
    assert cfg.MODEL.WEIGHTS == want


def test_another_number_of_images_sees_as_many():
    cfg = get_cfg()
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR = 2, 0.01
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 100, (60, 80)
    cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.CHECKPOINT_PERIOD = 10, 50
    cfg.merge_from_list(list(solver_options(cfg, 1)))
    assert cfg.SOLVER.IMS_PER_BATCH == 1 and cfg.SOLVER.BASE_LR == 0.005
    assert cfg.SOLVER.MAX_ITER == 200 and tuple(cfg.SOLVER.STEPS) == (120, 160)
    assert cfg.SOLVER.WARMUP_ITERS == 20 and cfg.SOLVER.CHECKPOINT_PERIOD == 100


def test_what_is_done_is_not_done_again(tmp_path, capsys):
    folders, done = [tmp_path / name for name in "abc"], []

    def do(run):
        done.append(run.name)
        (run / "inference").mkdir()
        (run / "inference" / "results.json").write_text('{"top1": null}')
        write_result(run, {"of": run.name})

    folders[1].mkdir()
    do(folders[1])
    run_all(folders, do)
    assert done == ["b", "a", "c"]
    assert "3 runs, of which 1 are done" in capsys.readouterr().out
    result = json.loads((folders[2] / "result.json").read_text())
    assert result["of"] == "c" and result["results"] == {"top1": None}


def test_the_package_is_that_of_the_commit_which_is_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(kn_detectron, "__file__", str(tmp_path / "kn_detectron" / "__init__.py"))
    with pytest.raises(
        InputError, match=f"from {re.escape(str(tmp_path))}/kn_detectron, .*: set PYTHONPATH to"
    ):
        run_all([], None)


def test_a_run_that_fails_says_where_it_is_told_why(tmp_path):
    with pytest.raises(InputError, match="printed.txt says why"):
        run_apart([sys.executable, "-c", "print('It is broken.'); exit(3)"], tmp_path)
    assert (tmp_path / "printed.txt").read_text() == "It is broken.\n"


def test_a_folder_without_results_is_named(tmp_path):
    with pytest.raises(
        InputError, match=f"{re.escape(str(tmp_path))} has no result.json: give the folder"
    ):
        read_results(tmp_path)
