"""The Trajectory Transformer: train, plan and score, exact to the original.

>>> import tt_fast
>>> dataset = tt_fast.load_dataset("hopper-medium-v2")
>>> model_config = tt_fast.ModelConfig(dataset.observation_dim, dataset.action_dim)
>>> checkpoint = tt_fast.train(dataset, model_config, tt_fast.TrainConfig(), "runs/hopper")
>>> planner = tt_fast.Planner(checkpoint)
>>> result = tt_fast.evaluate(planner, episodes=5)
"""

from importlib.metadata import PackageNotFoundError, version

from tt_fast.checkpoint import Checkpoint
from tt_fast.collect import collect
from tt_fast.config import ModelConfig, PlanConfig, TrainConfig
from tt_fast.data import OfflineDataset, load_dataset
from tt_fast.discretizer import Discretizer
from tt_fast.evaluate import evaluate
from tt_fast.model import TrajectoryTransformer
from tt_fast.planning import BeamPlan, Planner, beam_plan, beam_search
from tt_fast.selection import EpisodeScore
from tt_fast.train import train

try:
    __version__ = version("tt_fast")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "BeamPlan",
    "Checkpoint",
    "Discretizer",
    "EpisodeScore",
    "ModelConfig",
    "OfflineDataset",
    "PlanConfig",
    "Planner",
    "TrainConfig",
    "TrajectoryTransformer",
    "__version__",
    "beam_plan",
    "beam_search",
    "collect",
    "evaluate",
    "load_dataset",
    "train",
]
