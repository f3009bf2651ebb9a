"""Which checkpoint of a training run to keep: the one whose plans earn most."""

from __future__ import annotations

from dataclasses import dataclass, field

from tt_fast.checkpoint import Checkpoint
from tt_fast.config import PlanConfig
from tt_fast.evaluate import evaluate
from tt_fast.planning import Planner
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
    """Environment steps between two plans."""
    max_steps: int | None = None
    """Ends every episode after so many steps."""
    seed: int = 1_000_000
    """Of the first episode, the same at every evaluation; far from those that results use."""

    def __post_init__(self) -> None:
        for name in ("episodes", "plan_freq"):
            require_int(name, getattr(self, name), 1)
        if self.max_steps is not None:
            require_int("max_steps", self.max_steps, 1)
        require_int("seed", self.seed, 0)
        require(isinstance(self.plan, PlanConfig), "plan", "a PlanConfig", self.plan)

    def __call__(self, checkpoint: Checkpoint) -> float:
        """Mean return of the episodes.

        Raises:
            ValueError, ImportError: as `evaluate`.
            KeyboardInterrupt: Ctrl-C before all episodes were finished.
        """
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
