"""`tt-fast plan`: one observation in, a plan out."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from tt_fast.commands.base import Command
from tt_fast.config import PlanConfig
from tt_fast.files import to_json
from tt_fast.presets import check_preset
from tt_fast.validate import require

if TYPE_CHECKING:
    from tt_fast.planning import ImaginedPlan


@dataclass(frozen=True, kw_only=True)
class Plan(Command):
    """Plan from one observation and print what the model imagines."""

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """Run folder, which stands for its newest checkpoint, or a checkpoint, such as RUN/best."""
    observation: tuple[str, ...]
    """Numbers, separated by commas or spaces, or one .npy or .json file with a list of them."""
    backend: str = "auto"
    """Planning backend: cpu, cuda, torch, reference; auto: cpu, or torch if it was not built."""
    threads: int | None = None
    """Threads of the cpu backend; by default as many as this process, or its container, may use."""
    deadline_ms: float | None = None
    """Milliseconds for the plan: the best one found in this time (cpu backend)."""
    seed: int = 0
    """Seed of the plan."""
    json: bool = False
    """Print everything as JSON instead of a table without observations."""
    preset: str | None = None
    """The original's settings for a dataset, jannerm/hopper-medium-v2 and the like; options given
    beside it win."""
    plan: PlanConfig = field(default_factory=PlanConfig)
    """The beam search; defaults are the original's. Of --cdf-* and --k-* both apply, cdf first."""

    def run(self) -> None:
        import numpy as np

        from tt_fast.checkpoint import Checkpoint
        from tt_fast.planning import ImaginedPlan, Planner

        check_preset(self.preset)
        observation = read_observation(self.observation)
        planner = Planner(
            Checkpoint.load(self.checkpoint),
            self.plan,
            self.backend,
            self.seed,
            num_threads=self.threads,
            deadline_ms=self.deadline_ms,
        )
        planner.act(np.array(observation))
        plan = planner.last_plan
        assert isinstance(plan, ImaginedPlan)
        print(to_json(_plan_values(plan)), end="") if self.json else print(_plan_table(plan))


def read_observation(words: Sequence[str]) -> list[float]:
    """The numbers that the words hold, or those in the one file they name.

    Raises:
        FileNotFoundError: a name that ends in .npy or .json and is no file.
        ValueError: not a list of numbers.
    """
    if len(words) == 1 and words[0].endswith((".npy", ".json")):
        return _read_observation_file(Path(words[0]))
    texts = [text for word in words for text in re.split(r"[,\s]+", word) if text]
    try:
        return [float(text) for text in texts]
    except ValueError as error:
        wanted = "observation: expected numbers, one .npy or one .json file"
        raise ValueError(f"{wanted}, got {' '.join(words)!r}") from error


def _read_observation_file(path: Path) -> list[float]:
    import numpy as np

    if not path.is_file():
        raise FileNotFoundError(f"observation: no file {path}")
    try:
        values = np.load(path) if path.suffix == ".npy" else json.loads(path.read_text("utf-8"))
        row = np.asarray(values, dtype=np.float64)
    except (ValueError, TypeError, EOFError) as error:
        raise ValueError(f"observation: expected numbers in {path}, got {error}") from error
    require(row.ndim == 1, f"observation in {path}", "a list of numbers", row.shape)
    return [float(value) for value in row]


def _plan_values(plan: ImaginedPlan) -> dict[str, Any]:
    names = ("observations", "actions", "rewards", "values", "tokens")
    numbers = {"score": plan.score, "num_beams": plan.num_beams}
    return {**numbers, **{name: getattr(plan, name).tolist() for name in names}}


def _plan_table(plan: ImaginedPlan) -> str:
    """One line per planned step: reward, value, action."""
    size = f"{len(plan.rewards)} steps, {plan.num_beams} beams"
    lines = [f"score {plan.score:.2f}, {size}", "step    reward     value  action"]
    for step, (reward, value) in enumerate(zip(plan.rewards, plan.values, strict=True)):
        action = " ".join(f"{number:8.4f}" for number in plan.actions[step])
        lines.append(f"{step:4} {reward:9.3f} {value:9.2f}  {action}")
    return "\n".join(lines)
