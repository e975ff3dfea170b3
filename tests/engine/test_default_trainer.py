"""A trainer of detectron2's with what it needs for KN, as docs/config.md shows it."""

import pytest
import torch
from detectron2.engine import hooks

import kn_detectron.engine
from kn_detectron.engine import KalmanStatistics
from kn_detectron.layers import kalman_layers

from ..documents import blocks
from . import tiny

pytestmark = pytest.mark.trains


@pytest.fixture
def trainer_class():
    (block,) = (block for block in blocks("docs/config.md") if "DefaultTrainer" in block.code)
    names = {"__name__": "user"}
    exec(compile(block.code, "docs/config.md", "exec"), names)
    return names["KNDefaultTrainer"]


def test_it_trains_and_resumes(trainer_class, datasets, tmp_path):
    cfg = tiny.config(tmp_path, "SOLVER.MAX_ITER", 4, "SOLVER.STEPS", (2,))
    cfg.MODEL.DEVICE, cfg.DATALOADER.NUM_WORKERS = "cpu", 0
    trainer = trainer_class(cfg)
    trainer.resume_or_load(resume=False)
    kinds = [type(hook) for hook in trainer._hooks]
    assert kinds.index(KalmanStatistics) < kinds.index(hooks.PeriodicWriter)
    assert kinds.index(kn_detectron.engine.AverageRunningStatistics) < kinds.index(hooks.EvalHook)
    decays = {
        id(parameter): group["weight_decay"]
        for group in trainer.optimizer.param_groups
        for parameter in group["params"]
    }
    layers = kalman_layers(trainer.model).values()
    assert {decays[id(layer.mean_offset)] for layer in layers if not layer.is_head} == {0.0}
    trainer.train()
    assert trainer.storage.latest()["kn/gain"][0] == pytest.approx(0.01, rel=1e-4)  # of 0.1
    trainer = trainer_class(cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 4


def test_it_calibrates_to_batch_norm_and_not_when_it_resumes(
    trainer_class, datasets, tmp_path, monkeypatch
):
    cfg = tiny.config(tmp_path, "SOLVER.MAX_ITER", 1)
    cfg.MODEL.DEVICE, cfg.DATALOADER.NUM_WORKERS = "cpu", 0
    source = kn_detectron.engine.Trainer.build_model(cfg)
    for layer in kalman_layers(source).values():
        layer.running_var.uniform_(0.5, 2)
    state = {k: v for k, v in source.state_dict().items() if "running" in k or "weight" in k}
    torch.save(
        {"model": state, "__author__": "t", "matching_heuristics": True}, tmp_path / "bn.pth"
    )
    cfg.MODEL.WEIGHTS = str(tmp_path / "bn.pth")
    cfg.OUTPUT_DIR = str(tmp_path / "run")
    (tmp_path / "run").mkdir()  # as detectron2's default_setup does

    def scales(resume):
        trainer = trainer_class(cfg)
        trainer.resume_or_load(resume=resume)
        layers = kalman_layers(trainer.model).values()
        return trainer, torch.cat([layer.log_var_scale for layer in layers if not layer.is_head])

    trainer, calibrated = scales(False)
    assert calibrated.abs().max() > 0.1
    trainer.train()
    kept = torch.cat(
        [
            layer.log_var_scale
            for layer in kalman_layers(trainer.model).values()
            if not layer.is_head
        ]
    )
    assert torch.equal(scales(True)[1], kept)
