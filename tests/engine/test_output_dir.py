"""The folder of a run: refused where nothing can be written, and kept to one run at a time."""

import os
import re
import resource
import shutil
import socket
import subprocess
import sys

import pytest

from kn_detectron import InputError
from kn_detectron.engine import output_dir
from kn_detectron.engine.command_line import argument_parser
from kn_detectron.engine.output_dir import folder_of_run, make_output_dir

from . import tiny

ARGS = argument_parser().parse_args([])


def test_a_folder_that_detectron2_could_not_resume_from(tmp_path):
    with pytest.raises(InputError, match="^OUTPUT_DIR .*/what[?] has a question mark, .*: give"):
        make_output_dir(tiny.config(tmp_path / "what?"), ARGS)
    assert not (tmp_path / "what?").exists()


def test_a_folder_that_cannot_be_written_to(tmp_path):
    folder = tmp_path
    if os.geteuid() == 0:  # may write wherever a file system lets files be made
        folder = "/sys"
    else:
        folder.chmod(0o500)
    with pytest.raises(
        InputError, match=f"^OUTPUT_DIR {re.escape(str(folder))} cannot be written to .*: give"
    ):
        make_output_dir(tiny.config(folder), ARGS)


def test_the_folder_of_a_run_is_that_of_its_config(tmp_path, monkeypatch):
    (tmp_path / "last_checkpoint").touch()
    monkeypatch.chdir(tmp_path)
    for path, folder in (
        ("config.yaml", "."),
        (str(tmp_path / "config.yaml"), str(tmp_path)),
        ("other.yaml", None),
        ("new/config.yaml", None),
    ):
        assert folder_of_run(path) == folder, path


def test_one_process_makes_its_folder_as_often_as_it_likes(tmp_path):
    for _ in range(2):
        make_output_dir(tiny.config(tmp_path / "new" / "run"), ARGS)
    assert os.listdir(tmp_path / "new" / "run") == []


def _in_another_process(folder, *, machine_rank=0):
    code = (
        "import sys, types\n"
        "from kn_detectron.engine.output_dir import make_output_dir\n"
        "cfg = types.SimpleNamespace(OUTPUT_DIR=sys.argv[1])\n"
        "make_output_dir(cfg, types.SimpleNamespace(machine_rank=int(sys.argv[2])))\n"
        "print('made', flush=True)\n"
        "sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, folder, str(machine_rank)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert any("made" in line for line in iter(process.stdout.readline, ""))
    return process


def test_two_runs_do_not_share_a_folder(tmp_path):
    cfg = tiny.config(tmp_path)
    with _in_another_process(tmp_path) as other:
        with pytest.raises(
            InputError, match=f"^OUTPUT_DIR {re.escape(str(tmp_path))} is in use by another run"
        ):
            make_output_dir(cfg, ARGS)
        second_machine = argument_parser().parse_args(["--machine-rank", "1"])
        make_output_dir(cfg, second_machine)
        other.kill()
        other.wait()
        make_output_dir(cfg, ARGS)  # a killed run gives its folder back
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform does not fork")
def test_workers_that_outlive_a_run_do_not_keep_its_folder(tmp_path):
    cfg = tiny.config(tmp_path)
    make_output_dir(cfg, ARGS)
    ours, workers = socket.socketpair()
    worker = os.fork()
    if not worker:
        try:
            ours.close()
            workers.send(b"!")
            workers.recv(1)  # until the test is over
        finally:
            os._exit(0)
    workers.close()
    try:
        assert ours.recv(1) == b"!"  # it runs
        os.close(output_dir._claimed.pop(os.path.realpath(tmp_path)))  # as at the run's end
        make_output_dir(cfg, ARGS)  # as another run: a lock is of the descriptor, not of a process
    finally:
        ours.close()
        os.waitpid(worker, 0)


def test_a_full_disk_is_a_sentence(datasets, tmp_path):
    # No file can grow beyond so many bytes, and the config is larger.
    limit = 2000
    shutil.copytree(datasets, tmp_path / "datasets")  # before the disk is full
    run = subprocess.run(
        [
            *(sys.executable, str(tiny.TRAIN_NET)),
            *("--config", str(tiny.write_config(tmp_path / "tiny.yaml"))),
            *("OUTPUT_DIR", str(tmp_path / "run")),
        ],
        env={
            **os.environ,
            "DETECTRON2_DATASETS": str(tmp_path / "datasets"),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            # Python would keep compiled modules that are cut off, and fail to import them later.
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    folder = f"OUTPUT_DIR {tmp_path / 'run'}"
    assert f"\nerror: {folder} cannot be written to (File too large): make room" in run.stderr
    assert "Traceback" not in run.stderr and "Logging error" not in run.stderr
    assert run.stderr.count("log.txt cannot be written (File too large)") == 1
