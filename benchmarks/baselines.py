"""Other algorithms on the same data: d3rlpy's BC, IQL and Decision Transformer, by the clock.

    pip install -e ".[mujoco]" "d3rlpy>=2.8"    # in a virtual environment of its own
    python benchmarks/baselines.py FILE --algorithm iql --minutes 60 --out iql.json
    python benchmarks/baselines.py --table bc.json iql.json dt.json

d3rlpy pins an older Gymnasium, hence the environment. FILE is any source of `load_dataset`.
Training ends when the minutes or the steps are used up, whichever comes first; neither reading the
data nor playing counts. Everything runs on the processor, networks in `--threads` threads. Episode
j has seed `--eval-seed` + j, as in `tt_fast.evaluate`, and the policy acts without noise.

Settings are those of d3rlpy's reproductions/offline/{iql,decision_transformer}.py at 38c34b6. There
is none for BC, which has d3rlpy's defaults and batches of 256. With fewer steps than published
(`--steps`) the learning rates follow: IQL's cosine, and the Decision Transformer's rise over the
first tenth.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from tt_fast.checkpoint import origin
from tt_fast.data import OfflineDataset, load_dataset
from tt_fast.data.registry import find_ref_scores
from tt_fast.envs import ControlEnv, engine_versions, make_env
from tt_fast.files import read_json
from tt_fast.measure import processor_name
from tt_fast.results import ScoredEpisodes, mean_text
from tt_fast.validate import require

#: Algorithms, and the gradient steps for which d3rlpy trains them; BC has IQL's.
MAX_STEPS = {"bc": 500_000, "iql": 500_000, "dt": 100_000}

#: Returns that d3rlpy asks of the Decision Transformer, by the environment's name. The paper tries
#: two for each, 3600 and 1800 for hopper.
TARGET_RETURNS = {"hopper": 3600.0, "halfcheetah": 6000.0, "walker2d": 5000.0}

TITLES = (
    "dataset", "algorithm", "seed", "training minutes", "gradient steps", "episodes", "return",
    "normalised",
)  # fmt: skip

#: What a row of the table is made of.
_CELLS = (
    *("dataset", "algorithm", "target_return", "seed", "minutes", "num_steps", "num_episodes"),
    *("mean_return", "std_error", "normalized_mean", "normalized_std_error"),
)

Act = Callable[[NDArray[np.float32], float], NDArray[np.float32]]
"""Observation (observation_dim,) and the last reward -> action (action_dim,)."""


class EpisodeArrays(NamedTuple):
    """One episode of T steps, as d3rlpy's `Episode` wants it."""

    observations: NDArray[np.float32]
    """(T, observation_dim)"""
    actions: NDArray[np.float32]
    """(T, action_dim)"""
    rewards: NDArray[np.float32]
    """(T, 1)"""
    terminated: bool
    """The task ended; False: a time limit did, or the data ends here"""


class Effort(NamedTuple):
    """What training took."""

    num_steps: int
    """Gradient steps"""
    minutes: float
    """By the clock"""
    cpu_minutes: float
    """Of the processor, all threads: less than `minutes` where the machine was busy"""


@dataclass(frozen=True)
class BaselineResult(ScoredEpisodes):
    """The episodes of one trained policy, and how it was trained."""

    algorithm: str
    seed: int
    """Of the training"""
    eval_seed: int
    """Episode j had eval_seed + j"""
    lengths: tuple[int, ...]
    """Steps of each episode"""
    target_return: float | None
    """Asked of the Decision Transformer"""
    num_steps: int
    minutes: float
    cpu_minutes: float
    budget_minutes: float
    max_steps: int
    num_threads: int
    settings: dict[str, Any]
    """The config as d3rlpy serialises it, its scalers fitted"""
    versions: dict[str, str | None]
    git_commit: str | None
    device: str
    date: str

    def to_dict(self) -> dict[str, Any]:
        """JSON values of the fields and statistics."""
        return {"algorithm": self.algorithm, **super().to_dict(), **asdict(self)}

    def __str__(self) -> str:
        effort = f"{self.num_steps:,} steps in {self.minutes:.1f} min"
        return f"{self.algorithm}, {effort}: {super().__str__()}"


def main() -> None:
    """The command line."""
    options = parse_options()
    if options.table:
        print(render([read_result(path) for path in options.table]))
        return
    options.out.parent.mkdir(parents=True, exist_ok=True)  # or fail now, not in an hour
    result = run(options)
    print(result)
    result.save(options.out)


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's options; exits with a message if they do not fit together."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("file", nargs="?", help="an HDF5 file in D4RL's layout")
    add("--algorithm", choices=list(MAX_STEPS))
    add("--minutes", type=float, default=60.0, help="of training, by the clock (default 60)")
    steps_help = "most gradient steps; learning rates follow them (default: as published)"
    add("--steps", type=int, help=steps_help)
    add("--env-id", help="where to play (default: the dataset's own environment)")
    add("--episodes", type=int, default=20)
    add("--seed", type=int, default=0, help="of the training")
    add("--eval-seed", type=int, default=0, help="of the first episode")
    add("--target-return", type=float, help="asked of dt (default: d3rlpy's for the environment)")
    add("--threads", type=int, default=1)
    add("--out", type=Path, metavar="JSON", help="file to write the result to")
    add("--table", nargs="+", type=Path, metavar="JSON", help="print results as a markdown table")
    options = parser.parse_args(argv)
    problem = _find_problem(options)
    if problem is not None:
        parser.error(problem)
    return options


def run(options: argparse.Namespace) -> BaselineResult:
    """Train one algorithm, then play.

    Raises:
        ImportError: d3rlpy or Gymnasium is missing.
        ValueError: bad data, or an environment that does not fit it.
    """
    d3rlpy = _import_d3rlpy()
    torch.set_num_threads(options.threads)
    dataset = load_dataset(options.file)
    env = _make_fitting_env(dataset, options.env_id)
    target = None
    if options.algorithm == "dt":
        target = find_target_return(env.env_id, options.target_return)
    max_steps = MAX_STEPS[options.algorithm] if options.steps is None else options.steps
    d3rlpy.seed(options.seed)  # of global generators: d3rlpy has no others
    algo = make_algorithm(d3rlpy, options.algorithm, max_steps)
    fit = make_fit(d3rlpy, algo, episode_arrays(dataset))
    fit(0)  # fits the scalers and makes the networks
    settings = json.loads(algo.config.serialize())
    effort = train(fit, options.minutes, max_steps)
    returns, lengths = play(make_policy(algo, target), env, options.episodes, options.eval_seed)
    env.close()
    return BaselineResult(
        env_id=env.env_id,
        dataset=dataset.name,
        returns=returns,
        ref_scores=find_ref_scores(env.env_id),
        algorithm=options.algorithm,
        seed=options.seed,
        eval_seed=options.eval_seed,
        lengths=lengths,
        target_return=target,
        **effort._asdict(),
        budget_minutes=options.minutes,
        max_steps=max_steps,
        num_threads=options.threads,
        settings=settings,
        versions={**origin()["versions"], **engine_versions(), "d3rlpy": d3rlpy.__version__},
        git_commit=origin()["git_commit"],
        device=processor_name(),
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    )


# ---- data ----


def episode_arrays(dataset: OfflineDataset) -> list[EpisodeArrays]:
    """Every episode, the open last one too: its end counts as a time limit's.

    d3rlpy's own reader leaves an open last episode out; here all methods see the same rows.
    """
    return [
        EpisodeArrays(
            observations=dataset.observations[rows],
            actions=dataset.actions[rows],
            rewards=dataset.rewards[rows, None],
            terminated=bool(dataset.terminations[rows.stop - 1]),
        )
        for rows in dataset.episodes
    ]


# ---- algorithms ----


def make_algorithm(d3rlpy: Any, name: str, max_steps: int) -> Any:
    """An untrained algorithm on the processor. Hidden layers of bc and iql: 256, 256."""
    configs: dict[str, Callable[[], Any]] = {
        "bc": lambda: d3rlpy.algos.BCConfig(batch_size=256, learning_rate=1e-3),
        "iql": lambda: _iql_config(d3rlpy, max_steps),
        "dt": lambda: _dt_config(d3rlpy, max_steps),
    }
    return configs[name]().create(device=False)


def make_fit(d3rlpy: Any, algo: Any, episodes: Sequence[EpisodeArrays]) -> Callable[[int], None]:
    """What trains `algo` for a number of gradient steps and can be called again and again.

    After a time limit there is no next observation in the data, so d3rlpy leaves such an episode's
    last step out of the batches.
    """
    buffer = d3rlpy.dataset.create_infinite_replay_buffer(
        [d3rlpy.dataset.Episode(*episode) for episode in episodes]
    )

    def fit(num_steps: int) -> None:
        algo.fit(
            buffer,
            n_steps=num_steps,
            n_steps_per_epoch=max(num_steps, 1),
            logger_adapter=d3rlpy.logging.NoopAdapterFactory(),
            show_progress=False,
        )

    return fit


def make_policy(algo: Any, target_return: float | None) -> Callable[[], Act]:
    """What starts an episode: it returns the function that acts in it, without noise."""
    if target_return is not None:
        return lambda: algo.as_stateful_wrapper(target_return=target_return).predict
    return lambda: lambda observation, _: algo.predict(observation[None])[0]


def find_target_return(env_id: str, given: float | None) -> float:
    """The return to ask of the Decision Transformer.

    Raises:
        ValueError: none is given, and d3rlpy has none for this environment.
    """
    if given is not None:
        return given
    found = TARGET_RETURNS.get(env_id.split("-")[0].lower())
    if found is None:
        raise ValueError(f"--target-return: expected a number for {env_id}, got none")
    return found


def _iql_config(d3rlpy: Any, max_steps: int) -> Any:
    decay = d3rlpy.optimizers.CosineAnnealingLRFactory(T_max=max_steps)
    return d3rlpy.algos.IQLConfig(
        actor_learning_rate=3e-4,
        critic_learning_rate=3e-4,
        actor_optim_factory=d3rlpy.optimizers.AdamFactory(lr_scheduler_factory=decay),
        batch_size=256,
        expectile=0.7,
        weight_temp=3.0,
        max_weight=100.0,
        # rewards over (best - worst return of the data), times 1000
        reward_scaler=d3rlpy.preprocessing.ReturnBasedRewardScaler(multiplier=1000.0),
    )


def _dt_config(d3rlpy: Any, max_steps: int) -> Any:
    # published: 10,000 of 100,000 steps
    warmup = d3rlpy.optimizers.WarmupSchedulerFactory(warmup_steps=max(1, max_steps // 10))
    return d3rlpy.algos.DecisionTransformerConfig(
        batch_size=64,
        learning_rate=1e-4,
        optim_factory=d3rlpy.optimizers.AdamWFactory(
            weight_decay=1e-4, clip_grad_norm=0.25, lr_scheduler_factory=warmup
        ),
        encoder_factory=d3rlpy.models.VectorEncoderFactory([128], exclude_last_activation=True),
        observation_scaler=d3rlpy.preprocessing.StandardObservationScaler(),
        reward_scaler=d3rlpy.preprocessing.MultiplyRewardScaler(0.001),
        position_encoding_type=d3rlpy.PositionEncodingType.SIMPLE,
        context_size=20,
        num_heads=1,
        num_layers=3,
        max_timestep=1000,
    )


def _import_d3rlpy() -> Any:
    try:
        d3rlpy = importlib.import_module("d3rlpy")
    except ImportError as error:
        raise ImportError('the baselines need d3rlpy: pip install "d3rlpy>=2.8"') from error
    structlog = importlib.import_module("structlog")  # d3rlpy's; it says a lot at every `fit`
    level = structlog.make_filtering_bound_logger(logging.ERROR)
    structlog.configure(wrapper_class=level)
    return d3rlpy


# ---- training and playing ----


def train(fit: Callable[[int], None], minutes: float, max_steps: int) -> Effort:
    """Call `fit` with numbers of gradient steps until minutes or steps are used up.

    Between two looks at the clock lies about a second: d3rlpy's `fit` has a cost of its own, and a
    step takes milliseconds or half a second.
    """
    start, cpu_start = time.perf_counter(), time.process_time()
    num_steps, seconds = 0, 0.0
    with tqdm(total=max_steps, unit="step", desc="train", mininterval=1.0) as bar:
        while seconds < 60.0 * minutes and num_steps < max_steps:
            per_second = int(num_steps / seconds) if seconds > 0.0 else 1
            count = min(max(1, per_second), max_steps - num_steps)
            fit(count)
            num_steps += count
            seconds = time.perf_counter() - start
            bar.set_postfix_str(f"{seconds / 60.0:.1f} of {minutes:g} min", refresh=False)
            bar.update(count)
    return Effort(num_steps, seconds / 60.0, (time.process_time() - cpu_start) / 60.0)


def play(
    start_episode: Callable[[], Act], env: ControlEnv, episodes: int, seed: int
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Undiscounted returns and lengths of episodes with the seeds from `seed` on."""
    played = []
    for idx in tqdm(range(episodes), unit="episode", desc="play"):
        act, observation = start_episode(), env.reset(seed + idx)
        rewards: list[float] = []
        is_over = False
        while not is_over:
            last_reward = rewards[-1] if rewards else 0.0
            step = env.step(act(observation.astype(np.float32), last_reward))
            rewards.append(step.reward)
            observation, is_over = step.observation, step.terminated or step.truncated
        played.append((math.fsum(rewards), len(rewards)))
    return tuple(value for value, _ in played), tuple(length for _, length in played)


def _make_fitting_env(dataset: OfflineDataset, env_id: str | None) -> ControlEnv:
    """The environment; it and the data have the same widths and actions in [-1, 1]."""
    env_id = env_id or dataset.env_id
    if env_id is None:
        raise ValueError(f"--env-id: expected one, as {dataset.name} names none, got none")
    env = make_env(env_id)
    widths = env.observation_dim, env.action_dim
    wanted = dataset.observation_dim, dataset.action_dim
    require(widths == wanted, env_id, f"observation and action widths {wanted}", widths)
    require(env.max_episode_steps is not None, env_id, "a time limit", None)
    # d3rlpy's policies end in tanh
    low, high = env.action_bounds
    unit = bool(np.all(low == -1.0) and np.all(high == 1.0))
    require(unit, env_id, "actions in [-1, 1]", env.action_bounds)
    farthest = float(np.abs(dataset.actions).max())
    require(farthest <= 1.0, dataset.name, "actions in [-1, 1]", farthest)
    return env


# ---- results ----


def read_result(path: Path) -> dict[str, Any]:
    """A file of `BaselineResult.save`.

    Raises:
        ValueError: something else.
    """
    record = read_json(path)
    missing = [name for name in _CELLS if name not in record]
    require(not missing, str(path), "a result of baselines.py", f"none for {missing}")
    return record


def render(records: Sequence[Mapping[str, Any]]) -> str:
    """A markdown table of results, one row each, in their order."""
    lines = [TITLES, ["---"] * 2 + ["---:"] * (len(TITLES) - 2)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [*lines, *map(_cells, records)])


def _cells(record: Mapping[str, Any]) -> list[str]:
    target, score = record["target_return"], record["normalized_mean"]
    return [
        str(record["dataset"]),
        record["algorithm"] + ("" if target is None else f", target {target:g}"),
        str(record["seed"]),
        f"{record['minutes']:.1f}",
        f"{record['num_steps']:,}",
        str(record["num_episodes"]),
        mean_text(record["mean_return"], record["std_error"]),
        "-" if score is None else mean_text(score, record["normalized_std_error"]),
    ]


def _find_problem(options: argparse.Namespace) -> str | None:
    """What is wrong with the options, if anything is."""
    if options.table:
        return None if options.file is None else "either FILE or --table, not both"
    needed = {"FILE": options.file, "--algorithm": options.algorithm, "--out": options.out}
    missing = [name for name, value in needed.items() if value is None]
    if missing:
        return f"{' and '.join(missing)} must be given, or --table"
    if options.algorithm != "dt" and options.target_return is not None:
        return "--target-return is for --algorithm dt"
    if not 0.0 < options.minutes < math.inf:
        return f"--minutes: expected a number above 0, got {options.minutes}"
    minima = {"steps": 1, "episodes": 1, "threads": 1, "seed": 0, "eval_seed": 0}
    for name, least in minima.items():
        value = getattr(options, name)
        if value is not None and value < least:
            return f"--{name.replace('_', '-')}: expected at least {least}, got {value}"
    return None


if __name__ == "__main__":
    main()
