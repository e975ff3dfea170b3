"""The classifiers of the runs of tools/evidence/classification.py, and what they look at."""

import argparse
from pathlib import Path
from typing import Iterator, Tuple

from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng
from torch import Tensor, nn

from kn_detectron.engine.config_file import read_config
from kn_detectron.pretraining import ClassificationTrainer, add_pretraining_config
from kn_detectron.pretraining.data import build_train_loader

__all__ = ["build_classifier", "training_images"]


def build_classifier(folder: Path) -> Tuple[CfgNode, nn.Module]:
    """The config of a run, and its network at the initialisation, in training mode."""
    config = argparse.Namespace(config_file=str(folder / "config.yaml"), opts=[])
    cfg = read_config(config, add_pretraining_config)
    seed_all_rng(cfg.SEED)
    return cfg, ClassificationTrainer.build_model(cfg).train()


def training_images(cfg: CfgNode, model: nn.Module) -> Iterator[Tensor]:
    """The batches of the training without end, as the backbone of the model gets them."""
    for batch in build_train_loader(cfg):
        yield model.preprocess(batch["image"])
