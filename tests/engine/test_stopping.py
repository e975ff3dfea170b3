"""Signals stop a run after its step, and lose nothing."""

import os
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from kn_detectron.engine import StopOnSignal, Stopped
from kn_detectron.engine.batches import AgreedBatches
from kn_detectron.engine.stopping import STOPPING_SIGNALS

from . import tiny
from .loop import Loop

pytestmark = pytest.mark.trains


def _send(*signals, at):
    def in_step(iteration):
        if iteration == at:
            for signum in signals:
                os.kill(os.getpid(), signum)

    return in_step


def _handlers():
    return [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]


def _handling(signum, handler):
    former = signal.signal(signum, handler)
    try:
        yield
    finally:
        signal.signal(signum, former)


@pytest.fixture(autouse=True)
def handlers_restored():
    """What a run that failed in between has left, no other test finds."""
    former = {s: signal.getsignal(s) for s in (*STOPPING_SIGNALS, signal.SIGCHLD)}
    yield
    for signum, handler in former.items():
        signal.signal(signum, handler)


@pytest.fixture
def child_handler():
    """A handler like torch's, which reports that a loader process was killed."""
    yield from _handling(signal.SIGCHLD, lambda signum, frame: None)


def test_undisturbed_run_gives_the_signals_back():
    handlers, within = _handlers(), []
    Loop(StopOnSignal(), in_step=lambda _: within.append(_handlers())).train(0, 2)
    assert _handlers() == handlers
    assert all(step[0] == step[1] not in handlers for step in within) and len(within) == 2


def test_a_run_in_a_thread_leaves_signals_alone():
    """Python lets only the main thread handle them."""
    handlers, within = _handlers(), []
    loop = Loop(StopOnSignal(), in_step=lambda _: within.append(_handlers()))
    thread = threading.Thread(target=loop.train, args=(0, 2))
    thread.start()
    thread.join()
    assert loop.steps == [0, 1] and within == [handlers] * 2


@pytest.fixture
def hangups():
    """SIGHUP as in a terminal, whatever the tests run under."""
    yield from _handling(signal.SIGHUP, signal.SIG_DFL)


def test_a_run_under_nohup_goes_on(tmp_path, hangups):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    loop = Loop(StopOnSignal(), folder=tmp_path, in_step=_send(signal.SIGHUP, at=1))
    loop.train(0, 3)
    assert loop.steps == [0, 1, 2]
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.usefixtures("hangups")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_finishes_the_step_and_saves(tmp_path, signum, kn_log, child_handler):
    handlers = _handlers()
    loop = Loop(StopOnSignal(), folder=tmp_path, in_step=_send(signum, at=2))
    with pytest.raises(Stopped) as stopped:
        loop.train(0, 9)
    assert stopped.value.code == 128 + signum
    assert loop.steps == [0, 1, 2]
    assert tiny.read(tmp_path / "model_2.pth")["iteration"] == 2
    assert "after iteration 2" in kn_log.text and "--resume" in kn_log.text
    assert _handlers() == handlers


@pytest.fixture
def keyboard_interrupts():
    """SIGINT as in a terminal: a process that a shell starts in the background ignores it."""
    yield from _handling(signal.SIGINT, signal.default_int_handler)


def test_second_signal_stops_at_once(tmp_path, keyboard_interrupts):
    in_step = _send(signal.SIGTERM, signal.SIGINT, at=2)
    loop = Loop(StopOnSignal(), folder=tmp_path, in_step=in_step)
    with pytest.raises(KeyboardInterrupt):
        loop.train(0, 9)
    assert loop.steps == [0, 1]
    assert os.listdir(tmp_path) == []


def test_a_sigterm_that_comes_twice_is_one_request(tmp_path):
    """A batch system sends it to all processes of a run, one of which passes it on to the others."""
    handlers = _handlers()
    loop = Loop(StopOnSignal(), folder=tmp_path, in_step=_send(*[signal.SIGTERM] * 3, at=1))
    with pytest.raises(Stopped) as stopped:
        loop.train(0, 9)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert loop.steps == [0, 1] and (tmp_path / "model_1.pth").is_file()
    assert _handlers() == handlers


def test_a_later_sigterm_stops_at_once(tmp_path, monkeypatch):
    """One that kills the process would kill the tests: it has a handler here."""

    def in_step(iteration):
        if iteration == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            now = time.monotonic()
            monkeypatch.setattr(time, "monotonic", lambda: now + 10)
            os.kill(os.getpid(), signal.SIGTERM)

    class Ended(BaseException):
        pass

    def end(signum, frame):
        raise Ended

    signal.signal(signal.SIGTERM, end)
    with pytest.raises(Ended):
        Loop(StopOnSignal(), folder=tmp_path, in_step=in_step).train(0, 9)
    assert os.listdir(tmp_path) == [] and signal.getsignal(signal.SIGTERM) is end


def test_signal_during_evaluation_stops_it_and_saves(datasets, tmp_path):
    cfg = tiny.config(tmp_path, "SOLVER.CHECKPOINT_PERIOD", 100, "TEST.EVAL_PERIOD", 2)
    trainer, losses = tiny.trainer(cfg)
    handle = trainer.model.register_forward_pre_hook(
        lambda model, _: None if model.training else os.kill(os.getpid(), signal.SIGTERM)
    )
    with pytest.raises(Stopped):
        trainer.train()
    handle.remove()
    assert list(losses.of) == [0]  # its hook comes after the evaluation
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    assert not (tmp_path / "inference" / "results.json").exists()


def test_signal_before_an_evaluation_stops_it_before_it_begins(kn_log):
    stop = StopOnSignal()
    stop.trainer, stop.requested = SimpleNamespace(iter=1, max_iter=9), signal.SIGTERM
    with pytest.raises(Stopped):
        with stop.at_once():
            pytest.fail("it has begun")
    assert "after iteration 1" in kn_log.text


def test_a_process_that_loads_for_the_training_leaves_signals_to_it(monkeypatch):
    """It is forked, with the handlers, and would end before the step that needs its images."""
    process = os.getpid()

    def in_step(_):
        with monkeypatch.context() as forked:
            forked.setattr(os, "getpid", lambda: process + 1)
            os.kill(process, signal.SIGTERM)

    loop = Loop(StopOnSignal(), in_step=in_step)
    loop.train(0, 2)
    assert loop.steps == [0, 1]


def test_signal_behind_an_evaluation_finishes_its_step_again(tmp_path):
    stop = StopOnSignal()

    def in_step(iteration):
        with stop.at_once():
            pass
        _send(signal.SIGTERM, at=1)(iteration)

    loop = Loop(stop, folder=tmp_path, in_step=in_step)
    with pytest.raises(Stopped):
        loop.train(0, 9)
    assert loop.steps == [0, 1] and (tmp_path / "model_1.pth").is_file()


def test_signal_in_the_last_step_leaves_the_evaluation_to_the_resumed_run(datasets, tmp_path):
    trainer, _ = tiny.trainer(tiny.config(tmp_path, "SOLVER.MAX_ITER", 1))
    trainer.model.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped):
        trainer.train()
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert sorted(p.name for p in tmp_path.glob("*.pth")) == ["model_final.pth"]
    assert not (tmp_path / "inference").exists()

    trainer, _ = tiny.trainer(tiny.config(tmp_path, "SOLVER.MAX_ITER", 1), resume=True)
    assert set(trainer.train()) == {"bbox", "segm"}


def test_killed_command_line_run_resumes_as_if_nothing_had_happened(plain, datasets, tmp_path):
    run = tmp_path / "run"
    arguments = ["--config", tiny.write_config(tmp_path / "tiny.yaml"), "OUTPUT_DIR", run]
    # The processes that load are killed too, and torch would raise an error for that.
    arguments += ["DATALOADER.NUM_WORKERS", "2", "SOLVER.CHECKPOINT_PERIOD", "2"]
    process = tiny.start_train_net(*arguments, datasets=datasets, stopped_at="model_0000001.pth")
    output = process.communicate()[0]
    assert process.returncode == 143, output
    assert "Traceback" not in output
    assert (run / "last_checkpoint").read_text() == "model_0000001.pth"

    process = tiny.start_train_net("--resume", *arguments, datasets=datasets)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert "Starting training from iteration 2" in output
    tiny.assert_same_state(run / "model_final.pth", plain[0] / "model_final.pth")


def test_a_loader_killed_at_the_same_time_leaves_no_traceback(tmp_path, monkeypatch, child_handler):
    """Both signals are pending, and that of the loader is handled last."""
    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    both = {signal.SIGTERM, signal.SIGCHLD}

    def in_step(iteration):
        if iteration == 1:
            signal.pthread_sigmask(signal.SIG_BLOCK, both)
            # To this thread: another, which blocks neither, would take what the process gets.
            for signum in both:
                signal.pthread_kill(threading.get_ident(), signum)
            assert signal.sigpending() >= both
            signal.pthread_sigmask(signal.SIG_UNBLOCK, both)

    with pytest.raises(Stopped):
        Loop(StopOnSignal(), folder=tmp_path, in_step=in_step).train(0, 9)
    assert (tmp_path / "model_1.pth").exists() and not unraisable


def _loader_that_is_killed(batches):
    yield from range(batches)
    raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated.")


def test_a_loader_that_the_signal_has_killed_stops_the_run(kn_log):
    stop = StopOnSignal()
    stop.trainer = SimpleNamespace(iter=2, max_iter=9)
    batches = AgreedBatches(_loader_that_is_killed(1), stop)
    assert next(batches) == 0
    stop.requested = signal.SIGTERM
    with pytest.raises(Stopped) as stopped:
        next(batches)
    assert stopped.value.code == 128 + signal.SIGTERM and "--resume" in kn_log.text


def test_a_loader_that_is_killed_without_a_signal_is_an_error():
    batches = AgreedBatches(_loader_that_is_killed(0), StopOnSignal())
    with pytest.raises(RuntimeError, match="is killed by signal"):
        next(batches)
