"""Offline datasets: load them, look at them."""

from tt_fast.data.episodes import DatasetSummary, OfflineDataset
from tt_fast.data.load import load_dataset

__all__ = ["DatasetSummary", "OfflineDataset", "load_dataset"]
