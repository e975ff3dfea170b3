"""Runs of the pre-training."""

import json
import os
import re
import shutil

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.utils.env import seed_all_rng

from kn_detectron import InputError
from kn_detectron.checkpoint import KNCheckpointer
from kn_detectron.pretraining import ClassificationTrainer

from ..engine.tiny import assert_same_state, read
from ..models import resnet_cfg
from .conftest import config

pytestmark = pytest.mark.trains


def _trainer(cfg, resume=False):
    seed_all_rng(cfg.SEED)  # as the command line does
    trainer = ClassificationTrainer(cfg)
    trainer.resume_or_load(resume)
    return trainer


def _config(folder, output, steps=36, **options):
    cfg = config(folder, output=output, epochs=steps / 3, lr=0.02, **options)
    cfg.SOLVER.CHECKPOINT_PERIOD = cfg.TEST.EVAL_PERIOD = steps // 2
    return cfg


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """An uninterrupted run: its folder and its results."""
    output = tmp_path_factory.mktemp("whole")
    return output, _trainer(_config(folder, output)).train()


def test_it_learns_to_tell_colours(whole):
    output, results = whole
    # Moving averages lag behind in so few steps, by how much is for the machine to say.
    assert results["online"]["top1"] > 90 and set(results) == {"online", "moving"}
    assert json.loads((output / "inference" / "results.json").read_text()) == results


def test_curves_for_tensorboard_and_results_of_every_evaluation(whole):
    lines = [json.loads(line) for line in (whole[0] / "metrics.json").read_text().splitlines()]
    assert {"total_loss", "batch_top1", "lr", "eta_seconds", "kn/gain"} <= set(lines[0])
    assert sum("moving/top1" in line and "online/top5" in line for line in lines) >= 1
    assert list(whole[0].glob("events.out.tfevents.*"))


def test_backbone_is_the_final_model(whole):
    backbone = read(whole[0] / "backbone.pth")["model"]
    final = read(whole[0] / "model_final.pth")["model"]
    assert {n.removeprefix("backbone.") for n in final} == set(backbone)
    for name, tensor in final.items():
        assert torch.equal(tensor, backbone[name.removeprefix("backbone.")])


def _finish(cfg, checkpoint):
    """Goes on from a checkpoint of another run."""
    shutil.copy(checkpoint, cfg.OUTPUT_DIR)
    with open(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"), "w") as file:
        file.write(checkpoint.name)
    trainer = _trainer(cfg, resume=True)
    trainer.train()
    return trainer.start_iter


def _assert_same_run(one, other):
    assert_same_state(one / "model_final.pth", other / "model_final.pth")
    one, other = ((f / "inference" / "results.json").read_text() for f in (one, other))
    assert one == other


def test_resumed_run_is_bit_equal(folder, whole, tmp_path):
    assert _finish(_config(folder, tmp_path), whole[0] / "model_0000017.pth") == 18
    _assert_same_run(tmp_path, whole[0])


def test_resumed_run_of_micro_batches_is_bit_equal(folder, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    other.mkdir()
    options = dict(steps=6, norm="BRN", norm_batch_size=2)
    _trainer(_config(folder, one, **options)).train()
    assert _finish(_config(folder, other, **options), one / "model_0000002.pth") == 3
    _assert_same_run(one, other)


def test_progress_is_logged(folder, tmp_path, kn_log):
    cfg = config(folder, "GN4", tmp_path, epochs=7)
    trainer = _trainer(cfg)
    batches = []

    class Note(HookBase):
        def after_step(self):
            batches.append(self.trainer.storage.latest()["batch_top1"][0])

    trainer.register_hooks([Note()])
    trainer.train()
    first, last = re.findall(r"epoch: (\S+)  top-1 of the last 20 batches: (\S+)%", kn_log.text)
    assert first == ("6.67", f"{sum(batches[:20]) / 20:.1f}")
    assert last == ("7.00", f"{sum(batches[1:21]) / 20:.1f}")


def test_what_is_trained_is_said(folder, kn_log):
    detection = resnet_cfg("BN", MODEL__RESNETS__NORM="FrozenBN")
    ClassificationTrainer.build_model(config(folder, None, detection=detection))
    assert "Pre-training with BN for a detector with FrozenBN, on 24 images of 3" in kn_log.text
    assert "changes nothing" not in kn_log.text
    ClassificationTrainer.build_model(config(folder, "GN4", norm_batch_size=3))
    assert "GN4 treats every image on its own: --norm-batch-size changes nothing" in kn_log.text


def test_weight_normalized_backbone_is_not_written(folder, tmp_path):
    _trainer(config(folder, "WN", tmp_path, epochs=0.1)).train()
    assert (tmp_path / "model_final.pth").exists() and not (tmp_path / "backbone.pth").exists()


def test_broken_image_of_the_validation_keeps_the_run(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "images")
    path = tmp_path / "images" / "val" / "red" / "0.png"
    path.write_bytes(path.read_bytes()[:60])
    cfg = config(tmp_path / "images", "GN4", tmp_path / "run", epochs=1)
    cfg.DATALOADER.NUM_WORKERS = 1  # whose exceptions come with a traceback in them
    with pytest.raises(InputError, match="val/red/0.png cannot be read") as error:
        _trainer(cfg).train()
    assert "\n" not in str(error.value)
    assert (tmp_path / "run" / "model_final.pth").exists()


def test_checkpoint_of_another_norm_is_refused(folder, whole, tmp_path):
    shutil.copy(whole[0] / "model_final.pth", tmp_path)
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    with pytest.raises(InputError, match="not a checkpoint of this model"):
        _trainer(config(folder, "GN4", tmp_path), resume=True)


def test_evaluation_of_the_weights_for_detectors(folder, whole, tmp_path):
    cfg = _config(folder, tmp_path)
    model = ClassificationTrainer.build_model(cfg)
    KNCheckpointer(model).load_for_evaluation(str(whole[0] / "backbone.pth"))
    assert ClassificationTrainer.test(cfg, model) == whole[1]
