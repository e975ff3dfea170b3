"""The process that starts those of a run: what it refuses, and what it does with signals."""

import multiprocessing
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from detectron2.utils import comm

from kn_detectron import InputError
from kn_detectron.engine import launching
from kn_detectron.engine.launching import check_ranks, launch_ranks

ARGS = SimpleNamespace(num_gpus=2, num_machines=1, machine_rank=0, dist_url="auto")


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="--num-gpus 2 asks for more than the 1 GPUs"):
        check_ranks(ARGS)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_ranks(ARGS)


SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture
def signals_here():
    """The signals that end this process, which are noted instead."""
    noted = []
    former = {s: signal.signal(s, lambda signum, frame: noted.append(signum)) for s in SIGNALS}
    try:
        yield noted
    finally:
        for signum, handler in former.items():
            signal.signal(signum, handler)


def test_signals_are_left_to_the_processes_of_the_run(monkeypatch, signals_here):
    """They save their state. A terminal sends them Ctrl-C by itself, and batch systems do not."""
    ended, after = [], {}

    def launch(*args, **kwargs):
        for signum in SIGNALS:
            os.kill(os.getpid(), signum)
            after[signum] = len(ended)

    child = SimpleNamespace(terminate=lambda: ended.append("child"))
    monkeypatch.setattr(multiprocessing, "active_children", lambda: [child])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(comm, "create_local_process_group", None, raising=False)
    monkeypatch.setattr(launching, "launch", launch)
    launch_ranks(None, None, ARGS)
    assert after == {signal.SIGINT: 0, signal.SIGTERM: 1} and not signals_here
    os.kill(os.getpid(), signal.SIGTERM)  # as before
    assert signals_here == [signal.SIGTERM] and len(ended) == 1


def test_a_sigterm_before_there_are_processes_ends_the_run(monkeypatch, signals_here):
    monkeypatch.setattr(multiprocessing, "active_children", lambda: [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(comm, "create_local_process_group", None, raising=False)
    monkeypatch.setattr(launching, "launch", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stopped:
        launch_ranks(None, None, ARGS)
    assert stopped.value.code == 128 + signal.SIGTERM and not signals_here
