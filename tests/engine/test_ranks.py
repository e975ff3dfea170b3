"""Two processes agree."""

import copy
import json
import os
import shutil
import signal
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from torch import nn

from kn_detectron import InputError, KalmanNorm2d
from kn_detectron.engine import (
    AverageRunningStatistics,
    GainAnneal,
    StopOnSignal,
    Stopped,
    average_running_statistics,
    command_line,
    launching,
)
from kn_detectron.engine.batches import AgreedBatches
from kn_detectron.layers import kalman_layers

from ..models import build_backbone, randomize, resnet_cfg
from ..ranks import spawn_two, two_ranks
from . import tiny
from .loop import Loop

pytestmark = pytest.mark.trains
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there the ranks need GPUs")


def _on_rank(rank, folder):
    with two_ranks(rank, folder):
        _averages(rank)
        _averages_when_due(rank)
        _calibrates_alike(rank)
        _stops_together(rank, os.path.join(folder, "run"))
        _fails_together(rank)
    with open(os.path.join(folder, f"passed{rank}"), "w"):
        pass


def _averages(rank):
    model = nn.ModuleList(
        [
            KalmanNorm2d(3, gain=0.1),
            nn.BatchNorm2d(2),
            nn.BatchNorm2d(2, track_running_stats=False),
            nn.GroupNorm(1, 2),
        ]
    )
    kalman, live = model[0], model[1]
    kalman.running_mean.copy_(torch.tensor([0.0, 2.0, 4.0]) + rank)
    kalman.running_var.fill_(1.0 + 4 * rank)
    live.running_mean.fill_(-3.0 * rank)
    live.running_var.copy_(torch.tensor([1.0, 2.0]) * (rank + 1))
    nn.init.constant_(live.weight, rank)
    average_running_statistics(model)
    assert kalman.running_mean.tolist() == [0.5, 2.5, 4.5]
    assert kalman.running_var.tolist() == [3.0] * 3
    assert live.running_mean.tolist() == [-1.5] * 2
    assert live.running_var.tolist() == [1.5, 3.0]
    assert live.weight.tolist() == [float(rank)] * 2


def _averages_when_due(rank):
    means = {}

    def note(iteration):
        means[iteration] = loop.model.body.running_mean.clone()
        loop.model.body.running_mean.fill_(float(rank))  # and let the step go on from there

    loop = Loop(AverageRunningStatistics([3, 0]), in_step=note)
    loop.train(0, 5)
    means[5] = loop.model.body.running_mean.clone()
    gathered = [None, None]
    dist.all_gather_object(gathered, means)
    same = [k for k in range(1, 6) if torch.equal(gathered[0][k], gathered[1][k])]
    assert same == [3, 5], same


def _calibrates_alike(rank):
    model = build_backbone(resnet_cfg()).train()
    before = copy.deepcopy(model.state_dict())
    randomize(model, seed=rank)  # the statistics of each rank's own images
    for name, value in before.items():
        if "running_" not in name:
            model.state_dict()[name].copy_(value)
    # Stands for GPUs of two kinds, whose predictions differ a little.
    different = "res4.0.conv1.weight"
    model.state_dict()[different].mul_(1 + 1e-3 * rank)
    hook = GainAnneal(0.5, 0.9)
    hook.trainer = SimpleNamespace(model=model, iter=6, max_iter=10)
    hook.before_step()
    gathered = [None, None]
    dist.all_gather_object(gathered, model.state_dict())
    for name, value in gathered[0].items():
        assert torch.equal(value, gathered[1][name]) == (name != different), name
    offset = "res4.0.conv2.norm.mean_offset"
    assert not torch.equal(gathered[0][offset], before[offset])


def _stops_together(rank, folder):
    stop = StopOnSignal()

    def signal_one(iteration):
        stop.agree(0)  # as whatever gets the batch of the step does
        if (rank, iteration) == (1, 2):
            os.kill(os.getpid(), signal.SIGTERM)

    if rank == 0:
        os.makedirs(folder)
    dist.barrier()
    loop = Loop(stop, folder=folder, in_step=signal_one)
    with pytest.raises(Stopped) as stopped:
        loop.train(0, 9)
    assert stopped.value.code == 143
    assert loop.steps == [0, 1, 2, 3]  # the other rank hears of it at the beginning of step 3
    dist.barrier()
    assert sorted(os.listdir(folder)) == ["last_checkpoint", "model_3.pth"]


def _fails_together(rank):
    def batches():
        yield "first"
        if rank == 1:
            raise InputError("The image is broken.")
        yield "second"

    agreed = AgreedBatches(batches(), StopOnSignal())
    assert next(agreed) == "first"
    with pytest.raises(InputError, match="The image is broken."):
        next(agreed)


def test_two_processes(tmp_path):
    spawn_two(_on_rank, str(tmp_path))
    assert (tmp_path / "passed0").exists() and (tmp_path / "passed1").exists()


def _train(cfg, resume=False):
    """The losses of this rank's run, and the results of its evaluation."""
    trainer, losses = tiny.trainer(cfg, resume=resume)
    results = trainer.train()
    weights = [None, None]
    dist.all_gather_object(weights, trainer.model.module.state_dict())
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
    return losses.of, results


def _resumes(rank, folder, datasets):
    whole, resumed = Path(folder, "whole"), Path(folder, "resumed")
    with two_ranks(rank, folder), tiny.shapes(datasets):
        losses, results = _train(tiny.config(whole))
        if rank == 0:
            resumed.mkdir()
            shutil.copy(whole / "model_0000002.pth", resumed)
            (resumed / "last_checkpoint").write_text("model_0000002.pth")
        dist.barrier()
        resumed_losses, resumed_results = _train(tiny.config(resumed), resume=True)
        assert resumed_losses == {step: losses[step] for step in (3, 4, 5)}
        # The first rank evaluates and writes for both.
        assert bool(losses[0]) == bool(results) == bool(resumed_results) == (rank == 0)
        if rank == 0:
            tiny.assert_same_state(resumed / "model_final.pth", whole / "model_final.pth")
            one, other = (f / "inference" / "results.json" for f in (whole, resumed))
            assert one.read_text() == other.read_text()


def _starts_alike(rank, folder, datasets):
    with two_ranks(rank, folder), tiny.shapes(datasets):
        trainer, _ = tiny.trainer(tiny.config(folder))
        # Each process measures its own images; the running statistics are averaged when needed.
        assert not trainer.model.broadcast_buffers
        layers = list(kalman_layers(trainer.model).values())
        with torch.no_grad():  # as GPUs of two kinds would
            for layer in layers:
                layer.gain_logit += rank
                layer.mean_offset += rank
        trainer.resume_or_load(resume=False)
        for layer in layers:
            assert layer.gain.item() == pytest.approx(0.1)
            assert not layer.mean_offset.any()
            layer.running_mean.fill_(rank)
        # What a stopped run saves belongs to all of its processes.
        trainer.iter = 0
        trainer.save_checkpoint()
        state = tiny.read(Path(folder, "model_0000000.pth"))["model"]
        means = [value for name, value in state.items() if name.endswith("running_mean")]
        assert len(means) == len(layers) and all((mean == 0.5).all() for mean in means)
    Path(folder, f"alike{rank}").touch()


def test_two_processes_start_with_the_same_priors_and_save_averages(datasets, tmp_path):
    spawn_two(_starts_alike, str(tmp_path), datasets)
    assert (tmp_path / "alike0").exists() and (tmp_path / "alike1").exists()


def test_a_resumed_run_of_two_processes_is_bit_equal(datasets, tmp_path):
    spawn_two(_resumes, str(tmp_path), datasets)
    assert tiny.read(tmp_path / "resumed" / "model_final.pth")["iteration"] == 5


def _launch_on_cpu(main, num_gpus, num_machines, machine_rank, dist_url, args):
    spawn_two(_join, main, *args)


def _join(rank, main, *args):
    _, cfg, *_ = args  # as launch_ranks gives them to each process
    with two_ranks(rank, cfg.OUTPUT_DIR):
        main(*args)


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """Calls a function in two processes as the commands do."""
    if not hasattr(comm, "create_local_process_group"):
        # An old detectron2 launches for GPUs only: what stands in for it has the same processes.
        monkeypatch.setattr(comm, "create_local_process_group", None, raising=False)
        monkeypatch.setattr(launching, "launch", _launch_on_cpu)
    args = SimpleNamespace(num_gpus=2, num_machines=1, machine_rank=0, dist_url="auto")

    def call(main, cfg=CfgNode(dict(OUTPUT_DIR=str(tmp_path)))):
        launching.launch_ranks(main, cfg, args)

    return call


def _write_rank(cfg, args):
    with warnings.catch_warnings(record=True) as found:
        torch.meshgrid(torch.ones(2), torch.ones(2))  # as detectron2 calls it
    assert not found, found[0].message
    Path(cfg.OUTPUT_DIR, f"{comm.get_rank()} of {comm.get_world_size()}").touch()


def _write_areas(cfg, args):
    command_line.set_up(cfg, command_line.argument_parser().parse_args([]))
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        truth = json.loads(Path(MetadataCatalog.get(name).json_file).read_text())
        areas = [annotation["area"] for annotation in truth["annotations"]]
        split = Path(name).name
        Path(cfg.OUTPUT_DIR, f"areas_{split}_{comm.get_rank()}.json").write_text(json.dumps(areas))


def _fail(cfg, args):
    if comm.get_rank() == 1:
        raise InputError("The image is broken.")
    threading.Event().wait()  # until it is ended; a collective would fail by itself, maybe first


def _fail_late(cfg, args):
    """The cause is told first, and the process that fails of it ends first."""
    told = Path(cfg.OUTPUT_DIR, "told")
    if comm.get_rank() == 1:

        def outlive_the_main_thread():
            threading.main_thread().join()
            told.touch()
            threading.Event().wait()  # until it is ended

        threading.Thread(target=outlive_the_main_thread).start()
        raise InputError("The image is broken.")
    while not told.exists():
        threading.Event().wait(0.01)
    raise RuntimeError("Connection closed by peer")


def _stop(cfg, args):
    raise Stopped(128 + signal.SIGTERM)


@on_cpu
def test_launch_ranks_runs_all_of_them(launch, tmp_path):
    launch(_write_rank)
    assert {path.name for path in tmp_path.glob("* of *")} == {"0 of 2", "1 of 2"}


@on_cpu
def test_all_processes_read_the_annotations_that_were_mended(launch, datasets, tmp_path):
    folder, output = tmp_path / "own", tmp_path / "run"
    shutil.copytree(datasets / "shapes", folder)
    areas = {}
    for split in ("train", "val"):
        path = folder / "annotations" / f"instances_{split}.json"
        content = json.loads(path.read_text())
        areas[split] = [annotation.pop("area") for annotation in content["annotations"]]
        path.write_text(json.dumps(content))
    config = str(tiny.write_config(tmp_path / "tiny.yaml"))
    arguments = ["--config", config, "OUTPUT_DIR", str(output)]
    arguments = command_line.argument_parser().parse_args(arguments)
    arguments.dataset = str(folder)
    launch(_write_areas, command_line.load_config(arguments))
    for split, expected in areas.items():
        for rank in (0, 1):
            found = json.loads((output / f"areas_{split}_{rank}.json").read_text())
            assert found == pytest.approx(expected)


@on_cpu
def test_launch_ranks_gives_the_sentence_of_the_one_that_fails(launch):
    with pytest.raises(InputError, match=r"^The image is broken\.$"):
        launch(_fail)


@on_cpu
def test_launch_ranks_gives_the_cause_whichever_process_ends_first(launch):
    with pytest.raises(InputError, match=r"^The image is broken\.$"):
        launch(_fail_late)


def _stop_before_the_training(cfg, args):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)


@on_cpu
@pytest.mark.parametrize("stop", [_stop, _stop_before_the_training])
def test_launch_ranks_ends_as_the_stopped_ones_do(launch, stop):
    with pytest.raises(SystemExit) as stopped:
        launch(stop)
    assert stopped.value.code == 128 + signal.SIGTERM
