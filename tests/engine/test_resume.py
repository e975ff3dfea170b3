"""A run that was interrupted is the run that was not."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from kn_detectron import InputError
from kn_detectron.engine import Trainer
from kn_detectron.engine.resuming import check_same_scaling

from . import tiny

pytestmark = pytest.mark.trains

# An evaluation and PreciseBN in between must not leave a trace either.
_BUSY = ("SEED", -1, "TEST.EVAL_PERIOD", 2)
_BUSY += ("TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 1)


@pytest.fixture(scope="module")
def whole(datasets, tmp_path_factory):
    """An uninterrupted run, its folder and its losses."""
    folder = tmp_path_factory.mktemp("whole")
    trainer, losses = tiny.trainer(tiny.config(folder, *_BUSY))
    trainer.train()
    return trainer, folder, losses


def _folder_with(checkpoint, folder):
    folder.mkdir(exist_ok=True)
    shutil.copy(checkpoint, folder)
    (folder / "last_checkpoint").write_text(checkpoint.name)
    return folder


def test_resumed_run_is_bit_equal(whole, tmp_path):
    whole_trainer, whole_folder, whole_losses = whole
    folder = _folder_with(whole_folder / "model_0000002.pth", tmp_path)
    trainer, losses = tiny.trainer(tiny.config(folder, *_BUSY), resume=True)
    assert trainer.start_iter == 3
    trainer.train()
    assert trainer.seed == whole_trainer.seed
    assert list(losses.of) == [3, 4, 5]
    assert len(losses.of[3]) == 6  # five losses and their sum
    assert losses.of == {k: whole_losses.of[k] for k in (3, 4, 5)}
    tiny.assert_same_state(folder / "model_final.pth", whole_folder / "model_final.pth")


def test_steps_differ(whole):
    losses = whole[2].of
    assert len({step["total_loss"] for step in losses.values()}) == 6


def test_annealing_ends_at_gain_zero_and_is_saved(whole):
    scale = "backbone.res2.0.conv1.norm.gain_scale"
    assert tiny.read(whole[1] / "model_0000002.pth")["model"][scale] == pytest.approx(
        (0.8 - 2 / 6) / 0.5
    )
    assert tiny.read(whole[1] / "model_final.pth")["model"][scale] == 0


def test_resuming_a_finished_run_evaluates(whole, tmp_path, kn_log):
    folder = _folder_with(whole[1] / "model_final.pth", tmp_path)
    trainer, losses = tiny.trainer(tiny.config(folder, *_BUSY), resume=True)
    results = trainer.train()
    assert losses.of == {}
    assert "Nothing is left to train" in kn_log.text
    assert set(results) == {"bbox", "segm"}
    assert (folder / "metrics.json").read_text().count("bbox/AP50") == 1


def test_resuming_with_fewer_steps_than_are_done_evaluates(whole, tmp_path, kn_log):
    folder = _folder_with(whole[1] / "model_final.pth", tmp_path)
    fewer = ("SOLVER.MAX_ITER", "3", "SOLVER.STEPS", "(2,)")
    trainer, losses = tiny.trainer(tiny.config(folder, *_BUSY, *fewer), resume=True)
    results = trainer.train()
    assert losses.of == {} and set(results) == {"bbox", "segm"}
    assert "of SOLVER.MAX_ITER 3 is done" in kn_log.text


def test_a_schedule_that_is_cut_to_what_is_done_has_a_final_model(whole, tmp_path):
    folder = _folder_with(whole[1] / "model_0000002.pth", tmp_path)
    fewer = ("SOLVER.MAX_ITER", "3", "SOLVER.STEPS", "(2,)")
    trainer, _ = tiny.trainer(tiny.config(folder, *_BUSY, *fewer), resume=True)
    trainer.train()
    before, final = (tiny.read(folder / f"model_{name}.pth") for name in ("0000002", "final"))
    assert final["iteration"] == before["iteration"] == 2
    assert all(torch.equal(v, final["model"][name]) for name, v in before["model"].items())
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"


def test_a_new_run_forgets_the_one_before(whole, tmp_path, kn_log):
    """Or --resume would go on from that, where the new run died before its first checkpoint."""
    folder = _folder_with(whole[1] / "model_0000002.pth", tmp_path)
    (folder / "model_0000005.pth.0123abcd.partial").touch()  # it was killed
    trainer, _ = tiny.trainer(tiny.config(folder, *_BUSY))
    assert (folder / "last_checkpoint").is_file()  # the run may still be refused
    assert "has a checkpoint that this run does not go on from" in kn_log.text
    assert not list(folder.glob("*.partial"))

    def die():
        raise RuntimeError("killed")

    trainer.before_step = die
    with pytest.raises(RuntimeError, match="killed"):
        trainer.train()
    assert (folder / "model_0000002.pth").is_file()
    trainer, _ = tiny.trainer(tiny.config(folder, *_BUSY), resume=True)
    assert trainer.start_iter == 0


def test_a_resumed_run_that_dies_at_once_can_be_resumed_again(whole, tmp_path):
    folder = _folder_with(whole[1] / "model_0000002.pth", tmp_path)
    for _ in range(2):
        trainer, _ = tiny.trainer(tiny.config(folder, *_BUSY), resume=True)
        assert trainer.start_iter == 3
        trainer.before_step = lambda: 1 / 0
        with pytest.raises(ZeroDivisionError):
            trainer.train()


def test_a_schedule_scaled_to_other_processes_is_refused(datasets, tmp_path):
    cfg = tiny.config(tmp_path, "SOLVER.REFERENCE_WORLD_SIZE", 2, "SOLVER.MAX_ITER", 1)
    tiny.trainer(cfg)[0].train()  # scaled to this process
    tiny.trainer(cfg, resume=True)
    path = tmp_path / "model_final.pth"
    checkpoint = tiny.read(path)
    checkpoint["trainer"]["config"]["SOLVER"]["REFERENCE_WORLD_SIZE"] = 8
    torch.save(checkpoint, path)
    with pytest.raises(InputError, match="to 8 processes, and now there are 1.*as many as before"):
        tiny.trainer(cfg, resume=True)


def test_a_schedule_is_resumed_as_it_was_scaled_or_where_it_was_not():
    def check(former, present):
        sizes = ({"REFERENCE_WORLD_SIZE": size} for size in (former, present))
        check_same_scaling(*({"SOLVER": size} for size in sizes))

    for former, present in ((8, 8), (0, 8), (8, 0), (0, 0)):
        check(former, present)
    check_same_scaling({"SOLVER": {}}, {"SOLVER": {"REFERENCE_WORLD_SIZE": 8}})
    for former, present in ((8, 4), (4, 8)):
        with pytest.raises(InputError, match=f"to {former} processes, and now there are {present}"):
            check(former, present)


@pytest.mark.parametrize("period", ["0", "-1"])
def test_without_a_period_only_the_end_is_saved(datasets, tmp_path, period):
    options = ("SOLVER.MAX_ITER", "2", "SOLVER.CHECKPOINT_PERIOD", period, "SOLVER.STEPS", "(2, 5)")
    trainer, _ = tiny.trainer(tiny.config(tmp_path, *options))
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == ["model_final.pth"]
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(trainer.cfg.SOLVER.BASE_LR)


def test_nothing_to_resume_starts_and_says_so(datasets, tmp_path, kn_log):
    trainer, _ = tiny.trainer(tiny.config(tmp_path), resume=True)
    assert trainer.start_iter == 0
    assert "no checkpoint to resume from" in kn_log.text


def test_other_optimizer_is_refused(whole, tmp_path):
    folder = _folder_with(whole[1] / "model_0000002.pth", tmp_path)
    path = folder / "model_0000002.pth"
    checkpoint = tiny.read(path)
    checkpoint["trainer"]["_trainer"]["optimizer"]["param_groups"].pop()
    torch.save(checkpoint, path)
    with pytest.raises(InputError, match="not of a run like this one"):
        tiny.trainer(tiny.config(folder, *_BUSY), resume=True)


_OTHER_SETTINGS = {
    "SOLVER.BASE_LR": (0.02, 0.01),
    "SOLVER.WEIGHT_DECAY": (0.0001, 0.01),
    "SOLVER.MOMENTUM": (0.9, 0.5),
    "SOLVER.BIAS_LR_FACTOR": (1.0, 2.0),
    "SOLVER.NESTEROV": (False, True),
}


@pytest.mark.parametrize("key", _OTHER_SETTINGS)
def test_other_settings_are_in_force_and_said(whole, tmp_path, kn_log, key):
    before, now = _OTHER_SETTINGS[key]
    checkpoint = whole[1] / "model_0000002.pth"
    options = (*_BUSY, key, now)
    fresh, _ = tiny.trainer(tiny.config(tmp_path / "fresh", *options))
    try:
        trainer, losses = tiny.trainer(
            tiny.config(_folder_with(checkpoint, tmp_path / "run"), *options), resume=True
        )
    except InputError as error:  # newer versions of detectron2 group the parameters by settings
        assert key == "SOLVER.BIAS_LR_FACTOR" and "different number of parameter groups" in str(
            error
        )
        return
    said = f"From iteration 3 on other settings are in force: {key} {now!r} (before: {before!r})"
    assert said in kn_log.text
    groups = trainer.optimizer.param_groups
    for group, wanted in zip(groups, fresh.optimizer.param_groups):
        for name in ("initial_lr", "weight_decay", "momentum", "nesterov"):
            assert group[name] == wanted[name]
        assert group["lr"] == group["initial_lr"]  # the warm-up is over
    assert trainer.optimizer.state_dict()["state"]  # the momentum is kept
    trainer.train()
    assert losses.of[3] == whole[2].of[3]  # from the weights of the checkpoint
    assert losses.of[4] != whole[2].of[4]


class _ScheduledTrainer(Trainer):
    """Has a scheduler of torch's, which computes each rate from the one before."""

    @classmethod
    def build_lr_scheduler(cls, cfg, optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.1)


def test_a_scheduler_of_ones_own_goes_on(datasets, tmp_path, kn_log):
    rates = {}

    def trained(folder, *options, resume=False):
        trainer = _ScheduledTrainer(tiny.config(folder, "SOLVER.CHECKPOINT_PERIOD", 4, *options))
        trainer.resume_or_load(resume)
        optimizer = trainer.optimizer
        trainer.model.register_forward_pre_hook(
            lambda *_: rates.setdefault(str(folder), []).append(optimizer.param_groups[0]["lr"])
        )
        trainer.train()

    trained(tmp_path / "whole")
    folder = _folder_with(tmp_path / "whole" / "model_0000003.pth", tmp_path / "run")
    trained(folder, "SOLVER.BASE_LR", 0.5, resume=True)
    whole, rest = rates[str(tmp_path / "whole")][:6], rates[str(folder)][:2]
    assert whole == pytest.approx([0.02, 0.02, 0.002, 0.002, 0.0002, 0.0002])
    assert rest == pytest.approx(whole[4:])
    assert "SOLVER.BASE_LR 0.5 is not in force" in kn_log.text and "a StepLR goes on" in kn_log.text


def test_another_gain_and_seed_are_warned_of(whole, tmp_path, kn_log):
    folder = _folder_with(whole[1] / "model_0000002.pth", tmp_path)
    options = (*_BUSY, "MODEL.KN.GAIN", 0.3, "MODEL.WEIGHTS", "other.pth", "SEED", 3)
    trainer, _ = tiny.trainer(tiny.config(folder, *options), resume=True)
    warnings = [r.getMessage() for r in kn_log.records if r.levelname == "WARNING"]
    assert any("MODEL.KN.GAIN 0.3 is not in force" in w and "began with 0.1" in w for w in warnings)
    assert any("MODEL.WEIGHTS 'other.pth' is not in force" in w for w in warnings)
    assert any(f"has seed {whole[0].seed}, and keeps it instead of SEED 3" in w for w in warnings)
    assert trainer.seed == whole[0].seed
    state = tiny.read(whole[1] / "model_0000002.pth")["model"]
    name = "backbone.res2.0.conv1.norm.gain_logit"
    assert torch.equal(trainer.model.state_dict()[name], state[name])


def test_the_same_config_is_no_change(whole, tmp_path, kn_log):
    folder = _folder_with(whole[1] / "model_0000002.pth", tmp_path)
    tiny.trainer(tiny.config(folder, *_BUSY), resume=True)
    assert "(before" not in kn_log.text and "in force" not in kn_log.text


def _file_names(cfg):
    loader = iter(tiny.Trainer.build_train_loader(cfg))
    batches = (next(loader) for _ in range(cfg.SOLVER.MAX_ITER))
    return [{sample["file_name"] for sample in batch} for batch in batches]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_broken_image_loses_nothing(plain, datasets, tmp_path, num_workers):
    plain_folder, plain_losses = plain
    shutil.copytree(datasets, tmp_path / "datasets")
    run = tmp_path / "run"
    with tiny.shapes(tmp_path / "datasets"):
        cfg = tiny.config(run, "DATALOADER.NUM_WORKERS", num_workers)
        batches = _file_names(cfg)
        seen = [set().union(*batches[:k]) for k in range(len(batches))]
        k = next(k for k in range(1, len(batches)) if batches[k] - seen[k])
        image = (batches[k] - seen[k]).pop()
        whole_image = Path(image).read_bytes()
        Path(image).write_bytes(whole_image[: len(whole_image) // 2])

        trainer, losses = tiny.trainer(cfg)
        with pytest.raises(InputError, match=re.escape(image)) as error:
            trainer.train()
        assert "\n" not in str(error.value)
        assert losses.of == {i: plain_losses[i] for i in range(k)}
        assert (run / "last_checkpoint").read_text() == f"model_{k - 1:07d}.pth"
        # detectron2 takes a failure in the last step for a success, and would evaluate.
        assert not (run / "inference").exists()

        Path(image).write_bytes(whole_image)
        trainer, losses = tiny.trainer(cfg, resume=True)
        trainer.train()
    assert losses.of == {i: plain_losses[i] for i in range(k, 6)}
    tiny.assert_same_state(run / "model_final.pth", plain_folder / "model_final.pth")


def test_a_first_step_without_its_images_leaves_no_checkpoint(datasets, tmp_path):
    def broken():
        raise InputError("The image is broken.")
        yield

    trainer, _ = tiny.trainer(tiny.config(tmp_path))
    trainer._batches._iterator = broken()
    with pytest.raises(InputError, match="The image is broken."):
        trainer.train()
    assert not list(tmp_path.glob("*.pth")) and not (tmp_path / "last_checkpoint").exists()


def test_divergence_is_a_sentence(datasets, tmp_path):
    trainer, losses = tiny.trainer(tiny.config(tmp_path))
    torch.nn.init.constant_(trainer.model.roi_heads.box_predictor.cls_score.bias, float("inf"))
    with pytest.raises(InputError, match="diverged in iteration 0 .*lower SOLVER.BASE_LR") as error:
        trainer.train()
    assert "\n" not in str(error.value)
    assert losses.of == {}


def test_defect_in_the_last_step_is_no_success(datasets, tmp_path):
    trainer, _ = tiny.trainer(tiny.config(tmp_path, "SOLVER.MAX_ITER", 1))
    trainer.model.register_forward_pre_hook(lambda model, _: 1 / 0 if model.training else None)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert not (tmp_path / "inference").exists()
