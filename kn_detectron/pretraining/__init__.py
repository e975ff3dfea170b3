"""Pre-training of a detector's ResNet, or of another network, by image classification."""

from .classifier import ImageClassifier, NetworkClassifier
from .config import DECIDED_KEYS, NORMS, add_pretraining_config, classification_config
from .data import build_eval_loader, build_train_loader, open_folders
from .evaluation import evaluate, online_statistics
from .export import export_backbone
from .trainer import ClassificationTrainer

__all__ = [
    "ClassificationTrainer",
    "DECIDED_KEYS",
    "ImageClassifier",
    "NORMS",
    "NetworkClassifier",
    "add_pretraining_config",
    "build_eval_loader",
    "build_train_loader",
    "classification_config",
    "evaluate",
    "export_backbone",
    "online_statistics",
    "open_folders",
]
