"""What the tests of training and of checkpoints share."""

import logging
import sys

import pytest

from kn_detectron.engine.command_line import run

from . import tiny


@pytest.fixture(scope="session")
def datasets(tmp_path_factory):
    """A folder of datasets with the shapes in it, registered."""
    folder = tmp_path_factory.mktemp("datasets")
    with tiny.shapes(folder):
        yield folder


@pytest.fixture(scope="session")
def plain(datasets, tmp_path_factory):
    """An uninterrupted run of the tiny config: its folder and its losses."""
    folder = tmp_path_factory.mktemp("plain")
    trainer, losses = tiny.trainer(tiny.config(folder))
    trainer.train()
    return folder, losses.of


@pytest.fixture
def shapes_restored():
    """Puts back what was registered as the shapes before a test."""
    yield
    tiny.restore_shapes()


@pytest.fixture
def kn_log(caplog, monkeypatch):
    """The package's log, which detectron2's setup keeps from pytest."""
    monkeypatch.setattr(logging.getLogger("kn_detectron"), "propagate", True)
    caplog.set_level(logging.INFO, logger="kn_detectron")
    return caplog


@pytest.fixture
def command(tmp_path, monkeypatch, datasets, capsys):
    """Runs tools/train_net.py in this process, and gives its status, stdout and stderr."""
    config = tiny.write_config(tmp_path / "tiny.yaml")
    train_net = tiny.train_net_module()

    def call(*arguments, config=config, flag="--config-file"):
        arguments = [flag, config, *arguments] if config else arguments
        monkeypatch.setattr(sys, "argv", ["train_net.py", *map(str, arguments)])
        status = run(train_net.main)
        return (status, *capsys.readouterr())

    return call
