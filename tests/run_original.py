"""Run the original code beside ours and compare: python tests/run_original.py --original PATH

PATH is a checkout of jannerm/trajectory-transformer at 8834a6e. Its scripts train a small model on
a piece of the demonstration dataset and plan with it, once with its own planner and once with ours;
then both planners are asked the same questions. Exits with 1 if any answer differs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tt_fast.compat.jannerm import beam_plan, beam_search, make_prefix, update_context
from tt_fast.compat.jannerm.runner import Run, prepare
from tt_fast.data.hdf5 import read_hdf5, write_hdf5

DATASET = "hopper-medium-v2"  # the name the original is given; the rows are the demonstration's
NUM_ROWS = 1_500
CONFIG = "tiny_config"
TRAIN = {
    "N": 20,
    "discount": 0.99,
    "n_layer": 2,
    "n_head": 2,
    "n_epochs_ref": 0.006,  # times 1e6 / windows: 4 epochs
    "n_saves": 1,
    "device": "cuda",
    "n_embd": 8,
    "batch_size": 64,
    "learning_rate": 3e-3,
    "lr_decay": True,
    "seed": 42,
    "embd_pdrop": 0.1,
    "resid_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "step": 1,
    "subsampled_sequence_length": 6,
    "termination_penalty": -100,
    "exp_name": "gpt/tiny",
    "discretizer": "QuantileDiscretizer",
    "action_weight": 5,
    "reward_weight": 1,
    "value_weight": 1,
}
PLAN = {
    "gpt_loadpath": "gpt/tiny",
    "gpt_epoch": "latest",
    "device": "cuda",
    "renderer": "Renderer",
    "plan_freq": 1,
    "horizon": 3,
    "beam_width": 8,
    "n_expand": 2,
    "k_obs": 1,
    "k_act": None,
    "cdf_obs": None,
    "cdf_act": 0.6,
    "percentile": "mean",
    "max_context_transitions": 5,
    "prefix_context": True,
    "vis_freq": 2,
    "exp_name": "plans",
    "prefix": "",
    "suffix": "0",
    "verbose": False,
}
IMPORT = "from trajectory.search import ("
OUR_IMPORT = "from tt_fast.compat.jannerm import ("

#: p-value below which two samples of plans count as differently distributed; seeds are fixed.
SIGNIFICANT = 1e-3
MIN_EXPECTED = 5.0


@dataclass
class Outcome:
    """What one part found."""

    part: str
    ok: bool
    detail: str


class Workplace:
    """The folder that everything goes to, and the checkout it is done with."""

    def __init__(self, original: Path, out: Path, steps: int) -> None:
        self.original, self.out, self.steps = original.resolve(), out.resolve(), steps
        self.dataset = self.out / "hopper.hdf5"
        self.logs = self.out / "logs"

    def write_inputs(self) -> Outcome:
        """A dataset of D4RL's layout, and the original's settings as it reads them."""
        self.out.mkdir(parents=True, exist_ok=True)
        source = Path(str(files("tt_fast") / "assets" / "hopper-demo.hdf5"))
        arrays, env_id = read_hdf5(source)
        rows = {key: values[:NUM_ROWS] for key, values in arrays.items()}
        write_hdf5(self.dataset, rows, {"environment": env_id or ""})
        logbase = {"logbase": f"{self.logs}/"}
        base = {"train": {**TRAIN, **logbase}, "plan": {**PLAN, **logbase}}
        (self.out / f"{CONFIG}.py").write_text(f"base = {base!r}\n", encoding="utf-8")
        return Outcome("inputs", True, f"{NUM_ROWS} rows, {self.dataset.stat().st_size} bytes")

    def train(self) -> Outcome:
        """scripts/train.py, unmodified."""
        problem = self._run(self.original / "scripts" / "train.py")
        states = sorted((self.logs / DATASET / "gpt" / "tiny").glob("state_*.pt"))
        trained = problem is None and len(states) > 0
        return Outcome("train.py", trained, problem or f"wrote {[path.name for path in states]}")

    def plan(self, part: str, suffix: str, *options: str, copy: bool = False) -> Outcome:
        """scripts/plan.py, unmodified or with another import, for a few steps of Hopper-v4."""
        script = self._copied() if copy else self.original / "scripts" / "plan.py"
        limit = ("--max-episode-steps", str(self.steps))
        problem = self._run(script, *limit, *options, script_options=("--suffix", suffix))
        path = self.logs / DATASET / "plans" / suffix / "rollout.json"
        if problem is not None or not path.is_file():
            return Outcome(part, False, problem or f"did not write {path.name}")
        rollout = json.loads(path.read_text(encoding="utf-8"))
        ok = rollout["step"] == self.steps - 1 and np.isfinite(rollout["return"])
        return Outcome(part, bool(ok), f"{rollout['step'] + 1} steps, {rollout['return']:.3f}")

    def _copied(self) -> Path:
        """A copy of the checkout in which plan.py imports its planner from us."""
        copy = self.out / "copy"
        if not copy.exists():
            ignored = shutil.ignore_patterns(".git", "logs", "__pycache__")
            shutil.copytree(self.original, copy, ignore=ignored)
        script = copy / "scripts" / "plan.py"
        text = (self.original / "scripts" / "plan.py").read_text(encoding="utf-8")
        assert text.count(IMPORT) == 1, f"expected one line {IMPORT!r} in plan.py"
        script.write_text(text.replace(IMPORT, OUR_IMPORT), encoding="utf-8")
        return script

    def _run(self, script: Path, *ours: str, script_options: tuple[str, ...] = ()) -> str | None:
        """Run a script through the runner; what went wrong, if anything did."""
        command = [sys.executable, "-m", "tt_fast.compat.jannerm"]
        command += ["--dataset-file", str(self.dataset), *ours, str(script)]
        command += ["--dataset", DATASET, "--config", CONFIG, *script_options]
        paths = [str(self.out), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        # what the original leaves where it runs must not land in its checkout
        environment["PYTHONDONTWRITEBYTECODE"] = "1"
        done = subprocess.run(
            command, cwd=self.out, env=environment, capture_output=True, text=True, check=False
        )
        log = self.out / f"{script.stem}{'_'.join(('', *ours, *script_options))}.log"
        log.write_text(done.stdout + done.stderr, encoding="utf-8")
        if done.returncode == 0:
            return None
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        return f"exit status {done.returncode}: {last[0]} ({log})"


class Twins:
    """Both planners in this process, with the original's model, discretizer and value function."""

    def __init__(self, place: Workplace) -> None:
        run = Run(
            place.original / "scripts" / "plan.py", keep_search=True, dataset_file=place.dataset
        )
        prepare(run, "cpu")
        import trajectory.search.core as core
        import trajectory.search.utils as search_utils
        import trajectory.utils as utils

        folder = (f"{place.logs}/", DATASET, "gpt/tiny")
        self._core, self._search_utils = core, search_utils
        with contextlib.redirect_stdout(io.StringIO()):
            epoch = utils.serialization.get_latest_epoch(str(Path(*folder)))
            self.dataset = utils.load_from_config(*folder, "data_config.pkl")
            self.model, _ = utils.load_model(*folder, epoch=epoch, device="cpu")
        self._dims = (self.dataset.observation_dim, self.dataset.action_dim)

    def plan(self, ours: bool, prefix: torch.Tensor, **settings: Any) -> torch.Tensor:
        """One plan, (horizon, transition_dim) tokens."""
        function = beam_plan if ours else self._core.beam_plan
        sizes = [settings.pop(key) for key in ("horizon", "beam_width", "n_expand")]
        found: torch.Tensor = function(
            self.model, self._values, prefix, *sizes, *self._dims, verbose=False, **settings
        )
        return found

    def search(self, ours: bool, prefix: torch.Tensor, **settings: Any) -> Any:
        """The likeliest continuation, (context_len + n_steps,) tokens, and (beam_width,) nats."""
        function = beam_search if ours else self._core.beam_search
        return function(self.model, prefix, **settings)

    def prefixes(self, num_context: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The original's prefix and ours of the same transitions of the dataset."""
        theirs, ours = [], []
        discretizer, data = self.dataset.discretizer, self.dataset.joined_raw
        observation_dim, action_dim = self._dims
        start = 100 * (num_context + 1)
        for row in data[start : start + num_context]:
            observation, action, rest = np.split(
                row, [observation_dim, observation_dim + action_dim]
            )
            step = (discretizer, observation, action, rest[0], 5)
            theirs = self._search_utils.update_context(theirs, *step)
            ours = update_context(ours, *step)
        newest = data[start + num_context, :observation_dim]
        return (
            self._search_utils.make_prefix(discretizer, theirs, newest),
            make_prefix(discretizer, ours, newest),
        )

    def _values(self, probs: torch.Tensor) -> Any:
        return self.dataset.discretizer.value_fn(probs, "mean")


def compare_greedy(twins: Twins) -> Outcome:
    """Without chance there is one answer: 0 to 5 past transitions, with a crop and without."""
    settings = {"horizon": 4, "beam_width": 4, "n_expand": 2, "k_obs": 1, "k_act": 1, "k_rew": 1}
    differing, num_tokens = [], 0
    for num_context in range(6):
        theirs, ours = twins.prefixes(num_context)
        same = torch.equal(theirs, ours)
        for limit in (None, 2, 5):
            case = {**settings, "max_context_transitions": limit}
            plans = [twins.plan(mine, theirs, **case) for mine in (False, True)]
            num_tokens += plans[0].numel()
            if not same or not torch.equal(*plans):
                differing.append((num_context, limit))
    detail = (
        f"differ at (context, limit) {differing}" if differing else f"{num_tokens} tokens equal"
    )
    return Outcome("greedy plans", not differing, detail)


def compare_searches(twins: Twins) -> Outcome:
    """beam_search, which draws nothing: equal tokens, log probabilities up to rounding."""
    problems, largest = [], 0.0
    for num_context in range(4):
        prefix, _ = twins.prefixes(num_context)
        for options in ({}, {"topk": 3}, {"cdf": 0.5, "temperature": 1.5}):
            settings = {"n_steps": 18, "beam_width": 6, **options}
            (theirs, their_logs), (ours, our_logs) = (
                twins.search(mine, prefix, **settings) for mine in (False, True)
            )
            same_shape = their_logs.shape == our_logs.shape
            error = float((their_logs - our_logs).abs().max()) if same_shape else float("inf")
            largest = max(largest, error)
            if not torch.equal(theirs, ours) or error > 1e-4:
                problems.append((num_context, options))
    detail = f"differ at {problems}" if problems else f"equal, log probabilities to {largest:.1e}"
    return Outcome("beam_search", not problems, detail)


def compare_distributions(twins: Twins, num_plans: int) -> Outcome:
    """First actions of many plans: a chi-square test for each dimension."""
    settings = {"horizon": 2, "beam_width": 4, "n_expand": 2, "k_obs": 1, "cdf_act": 0.6}
    prefix, _ = twins.prefixes(1)
    start, width = twins.dataset.observation_dim, twins.dataset.action_dim
    samples = []
    for ours in (False, True):
        torch.manual_seed(0)
        plans = [
            twins.plan(ours, prefix, **settings, max_context_transitions=5)
            for _ in range(num_plans)
        ]
        samples.append(torch.stack(plans)[:, 0, start : start + width].numpy())
    rows = [chi_square(a, b) for a, b in zip(*(sample.T for sample in samples), strict=True)]
    varied = all(degrees > 0 for _, degrees, _ in rows)
    ok = varied and min(p for _, _, p in rows) > SIGNIFICANT
    shown = ", ".join(f"chi2({degrees}) = {value:.1f}, p = {p:.3f}" for value, degrees, p in rows)
    return Outcome("sampled plans", ok, f"{num_plans} each, per action dimension {shown}")


def chi_square(first: Any, second: Any) -> tuple[float, int, float]:
    """Are two samples of tokens from one distribution? Statistic, degrees of freedom, p-value.

    Tokens whose expected counts are below 5 are pooled.
    """
    counts = [Counter(np.asarray(sample).tolist()) for sample in (first, second)]
    tokens = sorted(set(counts[0]) | set(counts[1]))
    table = np.array([[count[token] for token in tokens] for count in counts], dtype=np.float64)
    share = table.sum(axis=1, keepdims=True) / table.sum()
    rare = (share * table.sum(axis=0)).min(axis=0) < MIN_EXPECTED
    table = np.concatenate([table[:, ~rare], table[:, rare].sum(axis=1, keepdims=True)], axis=1)
    table = table[:, table.sum(axis=0) > 0]
    expected = share * table.sum(axis=0)
    value, degrees = float(((table - expected) ** 2 / expected).sum()), table.shape[1] - 1
    if degrees == 0:
        return value, 0, 1.0
    # the survival function of a chi-square variable
    halves = torch.tensor([degrees / 2, value / 2], dtype=torch.float64)
    return value, degrees, float(torch.special.gammaincc(halves[0], halves[1]))


def compare_times(twins: Twins, repeats: int = 5) -> Outcome:
    """Milliseconds of a plan, the median, with settings near the original's."""
    settings = {"horizon": 5, "beam_width": 32, "n_expand": 2, "k_obs": 1, "cdf_act": 0.6}
    prefix, _ = twins.prefixes(4)
    medians = []
    for ours in (False, True):
        seconds = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            twins.plan(ours, prefix, **settings, max_context_transitions=5)
            seconds.append(time.perf_counter() - start)
        medians.append(1e3 * float(np.median(seconds[1:])))  # the first one warms up
    theirs, mine = medians
    detail = f"original {theirs:.1f} ms, tt_fast {mine:.1f} ms a plan: {theirs / mine:.1f} times"
    machine = f"{os.cpu_count()} processors, torch with {torch.get_num_threads()} threads"
    return Outcome("times", True, f"{detail} (horizon 5, 32 beams; {machine})")


def run_all(original: Path, out: Path, num_plans: int, steps: int) -> list[Outcome]:
    """Every part in order; those that need a model are left out if none could be trained."""
    place = Workplace(original, out, steps)
    outcomes = [place.write_inputs(), place.train()]
    if outcomes[-1].ok:
        outcomes += [
            place.plan("plan.py, its planner", "theirs", "--keep-search"),
            place.plan("plan.py, our import", "import", "--keep-search", copy=True),
            place.plan("plan.py, our planner", "ours"),
        ]
        twins = Twins(place)
        outcomes += [compare_greedy(twins), compare_searches(twins)]
        outcomes += [compare_distributions(twins, num_plans), compare_times(twins)]
    return outcomes


def main(argv: list[str] | None = None) -> int:
    """Run and print a table; 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--original", type=Path, required=True, help="a checkout of the original")
    parser.add_argument("--plans", type=int, default=2_000, help="sampled plans of each planner")
    parser.add_argument("--steps", type=int, default=5, help="environment steps of plan.py")
    parser.add_argument("--out", type=Path, help="folder to keep; by default a temporary one")
    options = parser.parse_args(argv)
    if not (options.original / "scripts" / "plan.py").is_file():
        parser.error(
            f"--original: expected a checkout with scripts/plan.py, got {options.original}"
        )
    with tempfile.TemporaryDirectory() as temporary:
        out = options.out or Path(temporary)
        outcomes = run_all(options.original, out, options.plans, options.steps)
        summary = {outcome.part: [outcome.ok, outcome.detail] for outcome in outcomes}
        (out / "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
    for outcome in outcomes:
        print(f"{'ok  ' if outcome.ok else 'FAIL'} {outcome.part:22} {outcome.detail}")
    return 0 if all(outcome.ok for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
