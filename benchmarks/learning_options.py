"""What options do for learning: averaged weights, and windows of 20 transitions instead of 10.

    python benchmarks/learning_options.py FILE --env-id Hopper-v4 --out FOLDER   # an hour or two
    python benchmarks/learning_options.py --table --out FOLDER

Two models, at equal tokens and equal tokens a step; of each the last weights and their average. All
play the same episodes. A plan of 15 transitions after a context of 5 fits into windows of 20 whole
("grow"); with windows of 10, plans see the last 5 ("crop", the original's). Runs, losses and
episodes that FOLDER has are not made again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

import tt_fast
from tt_fast import (
    Checkpoint,
    ModelConfig,
    OfflineDataset,
    PlanConfig,
    Planner,
    TrainConfig,
    TrajectoryTransformer,
)
from tt_fast.bench import Setting
from tt_fast.checkpoint import newest_checkpoint
from tt_fast.config import TOKEN_KINDS, Overflow
from tt_fast.encoding import tokenize
from tt_fast.files import read_json, to_json, write_text
from tt_fast.results import EvalResult, mean_text
from tt_fast.training.losses import evaluate_losses
from tt_fast.validate import require

#: Tokens of a step are those of so many windows of 10 transitions.
BATCH_SIZE = 64


@dataclass(frozen=True)
class Policy:
    """Weights, and how plans are made with them."""

    transitions: int
    averaged: bool
    overflow: Overflow

    @property
    def weights(self) -> str:
        """Which of the run's."""
        return "average" if self.averaged else "last"

    @property
    def name(self) -> str:
        """Name of the policy."""
        return f"{self.transitions}-{self.weights}-{self.overflow}"


POLICIES = (
    Policy(10, averaged=False, overflow="crop"),
    Policy(10, averaged=True, overflow="crop"),
    Policy(20, averaged=True, overflow="crop"),
    Policy(20, averaged=True, overflow="grow"),
)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", help="a dataset, as `tt-fast train` takes it")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--env-id", help="environment to play in; by default the dataset's")
    parser.add_argument("--tokens", type=int, default=40_000_000, help="of each training run")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--ema-decay", type=float, default=0.999)
    parser.add_argument("--setting", type=Setting.parse, default=Setting.parse("H15-B32x2"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--table", action="store_true", help="print a table, make nothing")
    args = parser.parse_args()
    if not args.table:
        if args.file is None:
            parser.error("expected FILE, or --table")
        train = TrainConfig(
            batch_size=BATCH_SIZE, learning_rate=args.learning_rate, max_tokens=args.tokens,
            ema_decay=args.ema_decay, precision=args.dtype, device="cpu",
        )  # fmt: skip
        plan = replace(args.setting.plan, dtype=args.dtype)
        dataset = tt_fast.load_dataset(args.file)
        found = {
            transitions: train_both(dataset, train, transitions, args.out)
            for transitions in (10, 20)
        }
        for policy in POLICIES:
            checkpoint = found[policy.transitions][policy.averaged]
            play(policy, checkpoint, plan, args.env_id, args.episodes, args.out)
    print(table(args.out))


def train_both(
    dataset: OfflineDataset, config: TrainConfig, transitions: int, out: Path
) -> tuple[Checkpoint, Checkpoint]:
    """Train a model on windows of so many transitions; its last weights, and their average."""
    config = replace(config, batch_size=BATCH_SIZE * 10 // transitions)
    model_config = ModelConfig(
        dataset.observation_dim, dataset.action_dim, num_transitions=transitions
    )
    run = out / f"run-{transitions}"
    average = tt_fast.train(dataset, model_config, config, run, resume=True)
    last = with_last_weights(average, run)
    for name, checkpoint in (("last", last), ("average", average)):
        path = out / f"{transitions}-{name}.losses.json"
        if not path.exists():
            write_text(path, to_json(losses(dataset, checkpoint.model, config)))
    return last, average


def losses(
    dataset: OfflineDataset, model: TrajectoryTransformer, config: TrainConfig
) -> dict[str, dict[str, float]]:
    """Losses on windows of 10 transitions, and on those that the model was trained on."""
    found = {}
    for transitions in {10, model.config.num_transitions}:
        shape = replace(model.config, num_transitions=transitions)
        found[str(transitions)] = evaluate_losses(model, tokenize(dataset, shape, config)[1])
    return found


def with_last_weights(average: Checkpoint, run: Path) -> Checkpoint:
    """The checkpoint with the weights that the run would go on from."""
    folder = newest_checkpoint(run)
    assert folder is not None, run
    weights = average.model.state_dict()
    for name, value in load_file(folder / "training_state.safetensors").items():
        if name.startswith("weights/"):
            weights[name.removeprefix("weights/")] = value
    model = TrajectoryTransformer(average.model.config).eval()
    model.load_state_dict(weights)
    return Checkpoint(model, average.discretizer, average.metadata)


def play(
    policy: Policy,
    checkpoint: Checkpoint,
    plan: PlanConfig,
    env_id: str | None,
    episodes: int,
    out: Path,
) -> None:
    """Write the episodes of a policy.

    Raises:
        KeyboardInterrupt: not all of them were played; none is written.
    """
    path = out / f"{policy.name}.json"
    if path.exists():
        return
    planner = Planner(checkpoint, replace(plan, overflow=policy.overflow))
    result = tt_fast.evaluate(planner, env_id, episodes)
    if result.interrupted:
        raise KeyboardInterrupt
    result.save(path)


def table(out: Path) -> str:
    """Markdown: losses without dropout of all weights, returns of all policies."""
    return "\n\n".join((_losses_table(out), _returns_table(out)))


def _losses_table(out: Path) -> str:
    titles = ("model", "weights", "measured on windows of", *TOKEN_KINDS)
    lines = [_line(titles), _line(["---:", "---", "---:"] + ["---:"] * len(TOKEN_KINDS))]
    for path in sorted(out.glob("*.losses.json")):
        transitions, weights = path.name.split(".")[0].split("-")
        for measured, losses in sorted(read_json(path).items()):
            cells = [f"{losses[kind]:.3f}" for kind in TOKEN_KINDS]
            lines.append(_line([transitions, weights, measured, *cells]))
    return "\n".join(lines)


def _returns_table(out: Path) -> str:
    titles = ("model", "weights", "plans", "episodes", "return", "mean steps", "decisions/s")
    lines = [_line(titles), _line(["---:", "---", "---"] + ["---:"] * 4)]
    settings = set()
    for policy in POLICIES:
        path = out / f"{policy.name}.json"
        if not path.exists():
            continue
        result = EvalResult.from_dict(read_json(path))
        settings.add((result.env_id, replace(result.plan_config, overflow="crop")))
        cells = [
            str(policy.transitions), policy.weights, policy.overflow,
            str(len(result.returns)), mean_text(result.mean_return, result.std_error),
            f"{np.mean(result.lengths):.0f}", f"{result.decisions_per_second:.1f}",
        ]  # fmt: skip
        lines.append(_line(cells))
    require(len(settings) <= 1, "out", "episodes of one setting", settings)
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
