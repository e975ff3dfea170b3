"""Training, evaluation and the command line."""

from .evaluation import FullCOCOEvaluator
from .hooks import (
    AverageRunningStatistics,
    GainAnneal,
    KalmanStatistics,
    PreciseStatistics,
    SeedStep,
    average_running_statistics,
)
from .optimizer import exempt_filters_from_decay
from .run_config import load_run, trained_weights
from .stopping import StopOnSignal, Stopped
from .trainer import Trainer

__all__ = [
    "AverageRunningStatistics",
    "FullCOCOEvaluator",
    "GainAnneal",
    "KalmanStatistics",
    "PreciseStatistics",
    "SeedStep",
    "StopOnSignal",
    "Stopped",
    "Trainer",
    "average_running_statistics",
    "exempt_filters_from_decay",
    "load_run",
    "trained_weights",
]
