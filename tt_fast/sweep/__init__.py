"""Datasets x seeds: models trained and played side by side on Ray."""

from tt_fast.sweep.runner import Cluster
from tt_fast.sweep.sweep import SweepResult, run_sweep
from tt_fast.sweep.trial import PlayConfig, SweepConfig

__all__ = ["Cluster", "PlayConfig", "SweepConfig", "SweepResult", "run_sweep"]
