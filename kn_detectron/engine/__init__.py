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
from .run_config import load_run
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
    "load_run",
]
