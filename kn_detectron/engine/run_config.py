"""The config and the weights of a finished run, for other scripts."""

import argparse
import logging
import os

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..checkpoint import KNCheckpointer
from ..data import register_named_folders
from .config_file import read_config
from .output_dir import folder_of_run

__all__ = ["load_run", "trained_weights"]

_logger = logging.getLogger(__name__)


def load_run(folder, options=(), extensions=()):
    """Gives the config of a run, ready for a predictor or an evaluation in another script.

    ::

        cfg = kn_detectron.engine.load_run("output")
        predictor = detectron2.engine.DefaultPredictor(cfg)
        names = predictor.metadata.thing_classes

    Args:
        folder (str): OUTPUT_DIR of the run, wherever it is now, with its config.yaml.
        options (sequence of str): KEY, VALUE, ... that take the place of the run's.
        extensions (sequence of callable): each adds keys of your own to a config, as
            :func:`~kn_detectron.add_kn_config` does.

    Returns:
        CfgNode: not frozen. MODEL.WEIGHTS is the last checkpoint in the folder if there is one and
        ``options`` have no other, and MODEL.DEVICE one that torch finds. The metadata of its
        datasets have the names of the classes. Those of a run with --dataset are registered too,
        whether their files are there or not.

    Raises:
        InputError: there is no config.yaml, or it or the options cannot be used.
    """
    folder = os.fspath(folder)
    config_file = os.path.join(folder, "config.yaml")
    options = list(options)
    cfg = read_config(argparse.Namespace(config_file=config_file, opts=options), *extensions)
    cfg.OUTPUT_DIR = folder
    cfg.MODEL.WEIGHTS = trained_weights(config_file, options) or cfg.MODEL.WEIGHTS
    _forget_other_classes(cfg)
    register_named_folders(cfg)
    for name in cfg.DATASETS.TEST if cfg.DATASETS.CLASS_NAMES else ():
        if name not in DatasetCatalog.list():  # the script that trained did it
            MetadataCatalog.get(name).thing_classes = list(cfg.DATASETS.CLASS_NAMES)
    return cfg


def _forget_other_classes(cfg):
    """Takes back the class names that another run in this process gave to the same datasets.

    What a script has registered itself is left alone.
    """
    names = list(cfg.DATASETS.CLASS_NAMES)
    for name in dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)) if names else ():
        known = list(MetadataCatalog.get(name).get("thing_classes") or names)
        if known == names:
            continue
        registered, here = name in DatasetCatalog.list(), ", ".join(names)
        if registered and not os.path.isabs(name):
            _logger.warning(
                "Dataset %s is registered with the classes %s, and keeps them, but the run in %s was "
                "trained with %s.",
                *(name, ", ".join(known), cfg.OUTPUT_DIR, here),
            )
            continue
        if registered:
            DatasetCatalog.pop(name)
        MetadataCatalog.pop(name)
        _logger.warning(
            "Dataset %s had the classes %s of another run, and has %s now: build the predictor of a "
            "run before you load the next one.",
            *(name, ", ".join(known), here),
        )


def trained_weights(config_file, options):
    """The weights that the config of a run and options of a command line stand for.

    MODEL.WEIGHTS in the config of a run is what the run started from, and not what it has learned.

    Args:
        config_file (str): a config; the config.yaml of a run lies beside its checkpoints.
        options (sequence of str): KEY, VALUE, ...; MODEL.WEIGHTS goes first.

    Returns:
        str or None: MODEL.WEIGHTS of the options, or the last checkpoint beside a config.yaml, or
        None.

    Raises:
        InputError: the checkpoint that is named as the last one is not there.
    """
    given = dict(zip(options[::2], options[1::2])).get("MODEL.WEIGHTS")
    folder = folder_of_run(config_file)
    if given is not None or folder is None:
        return given
    return KNCheckpointer(None, folder).get_checkpoint_file()
