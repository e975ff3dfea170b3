import pytest

from . import tiny


def test_settings_for_more_gpus_are_scaled(datasets, tmp_path):
    """Half the images of each step: half the learning rate, and twice the steps."""
    cfg = tiny.config(tmp_path, "SOLVER.REFERENCE_WORLD_SIZE", 2)
    images, rate, steps, ends = (
        cfg.SOLVER[key] for key in ("IMS_PER_BATCH", "BASE_LR", "MAX_ITER", "STEPS")
    )
    trainer, _ = tiny.trainer(cfg)
    solver = trainer.cfg.SOLVER
    assert solver.IMS_PER_BATCH == trainer._batches.loader.batch_size == images // 2
    assert trainer.max_iter == 2 * steps and solver.STEPS == tuple(2 * end for end in ends)
    for group in trainer.optimizer.param_groups:
        assert group["initial_lr"] == pytest.approx(rate / 2)
