"""Which checkpoint of a training run to keep: the one whose plans earn most."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from tt_fast.checkpoint import Checkpoint
from tt_fast.config import ModelConfig, PlanConfig
from tt_fast.data import OfflineDataset
from tt_fast.envs import check_env, make_env
from tt_fast.evaluate import evaluate
from tt_fast.planning import Planner
from tt_fast.planning.search import check_plan
from tt_fast.train import pick_device
from tt_fast.validate import require, require_int


@dataclass(frozen=True)
class EpisodeScore:
    """Scores a checkpoint by the mean return of a few episodes; an evaluator for `train`.

    The best of many such scores is too high by its luck: report returns of other seeds.

    Raises:
        ValueError: a number out of range.
    """

    env_id: str | None = None
    """Gymnasium id; None takes the one of the checkpoint's dataset."""
    episodes: int = 8
    """Episodes of an evaluation, played side by side."""
    plan: PlanConfig = field(default_factory=lambda: PlanConfig(horizon=5, beam_width=32))
    """Settings of a plan."""
    plan_freq: int = 1
    """Environment steps between two plans, at most the horizon."""
    max_steps: int | None = None
    """Ends every episode after so many steps."""
    seed: int = 1_000_000
    """Of the first episode, the same at every evaluation; far from those that results use."""
    device: str = "cpu"
    """Where plans are made: "auto", "cpu", "cuda" (the GPU that is current) or another of
    torch's names."""

    def __post_init__(self) -> None:
        require(isinstance(self.plan, PlanConfig), "plan", "a PlanConfig", self.plan)
        require_int("episodes", self.episodes, 1)
        require_int("plan_freq", self.plan_freq, 1, self.plan.horizon)
        if self.max_steps is not None:
            require_int("max_steps", self.max_steps, 1)
        require_int("seed", self.seed, 0)

    def check(self, dataset: OfflineDataset, model: ModelConfig) -> None:
        """See before training that there is something to play, and where to plan.

        Raises:
            ValueError: as `require_playable`, or a device that torch cannot use.
            ImportError: Gymnasium or MuJoCo is missing.
        """
        pick_device(self.device)
        require_playable(dataset, model, self.plan, self.env_id, self.max_steps)

    def __call__(self, checkpoint: Checkpoint) -> float:
        """Mean return of the episodes.

        Raises:
            ValueError, ImportError: as `evaluate`.
            KeyboardInterrupt: Ctrl-C before all episodes were finished.
        """
        checkpoint = replace(checkpoint, model=checkpoint.model.to(pick_device(self.device)))
        result = evaluate(
            Planner(checkpoint, self.plan, plan_freq=self.plan_freq),
            self.env_id,
            self.episodes,
            self.episodes,
            self.seed,
            max_steps=self.max_steps,
            progress=False,
        )
        if result.interrupted:
            raise KeyboardInterrupt
        return result.mean_return


def require_playable(
    dataset: OfflineDataset,
    model: ModelConfig,
    plan: PlanConfig,
    env_id: str | None,
    max_steps: int | None,
) -> None:
    """A model of this dataset can make such plans, in an environment that there is and that ends.

    Args:
        env_id: None takes the dataset's.

    Raises:
        ValueError: it cannot.
        ImportError: Gymnasium or MuJoCo is missing.
    """
    check_plan(model, plan)
    env_id = env_id or dataset.env_id
    if env_id is None:
        raise ValueError(f"env_id: expected a Gymnasium id, as {dataset.name} names none, got None")
    env = make_env(env_id)
    try:
        check_env(env, model, max_steps, owner=dataset.name)
    finally:
        env.close()
