"""The config of a finished run, for other scripts."""

import argparse
import os

from ..checkpoint import KNCheckpointer
from ..data import register_named_folders
from .command_line import read_config

__all__ = ["load_run"]


def load_run(folder, options=()):
    """Gives the config of a run, ready for a predictor or an evaluation in another script.

    ::

        cfg = kn_detectron.engine.load_run("output")
        predictor = detectron2.engine.DefaultPredictor(cfg)
        names = predictor.metadata.thing_classes

    Args:
        folder (str): OUTPUT_DIR of the run, wherever it is now, with its config.yaml.
        options (sequence of str): KEY, VALUE, ... that take the place of the run's.

    Returns:
        CfgNode: not frozen. MODEL.WEIGHTS is the last checkpoint in the folder if there is one and
        ``options`` have no other, and MODEL.DEVICE one that torch finds. The datasets of a run with
        --dataset are registered with the names of their classes, whether their files are there or
        not.

    Raises:
        InputError: there is no config.yaml, or it or the options cannot be used.
    """
    folder = os.fspath(folder)
    config_file = os.path.join(folder, "config.yaml")
    options = list(options)
    cfg = read_config(argparse.Namespace(config_file=config_file, opts=options))
    cfg.OUTPUT_DIR = folder
    checkpointer = KNCheckpointer(None, folder)
    if checkpointer.has_checkpoint() and "MODEL.WEIGHTS" not in options[::2]:
        cfg.MODEL.WEIGHTS = checkpointer.get_checkpoint_file()
    register_named_folders(cfg)
    return cfg
