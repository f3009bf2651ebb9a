"""Sweeps on a Ray cluster of two workers: results, continuing, retries, and how they fail."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from command_line import BEAM, SMALL, TOY, help_text, refuse, run, usage_error
from toy_env import ACTION_DIM, OBSERVATION_DIM, ToyEnv, register

from tt_fast.checkpoint import newest_checkpoint
from tt_fast.cli import parse
from tt_fast.config import ModelConfig, PlanConfig, TrainConfig
from tt_fast.data import load_dataset
from tt_fast.data.hdf5 import write_hdf5
from tt_fast.evaluate import evaluate
from tt_fast.planning import Planner
from tt_fast.presets import PRESETS
from tt_fast.sweep.runner import import_ray
from tt_fast.sweep.sweep import run_sweep
from tt_fast.sweep.trial import PlayConfig, SweepConfig, Trial, _run_trial, read_result
from tt_fast.train import train
from tt_fast.training.log import read_metrics

# modules that register environments are imported by every worker
TOY_ID = f"command_line:{TOY}"
FAILS_ID = f"test_sweep:{register('TTFails-v0', 'test_sweep:FailingEnv', max_episode_steps=8)}"

MODEL = ModelConfig(1, 1, 100, num_transitions=2, num_layers=1, num_heads=2, embed_dim=8)
TRAIN = TrainConfig(
    batch_size=8, num_bins=20, max_tokens=3000, log_steps=5, checkpoint_steps=10, device="cpu"
)
PLAY = PlayConfig(
    episodes=2, plan=PlanConfig(horizon=2, beam_width=3, k_act=3, cdf_act=None), backend="cpu"
)
CONFIG = SweepConfig(MODEL, TRAIN, PLAY, ref_scores=(0.0, 50.0))
ENDLESS = [*SMALL, "--num-bins", "20", "--max-tokens", "1000000000", "--checkpoint-steps", "7"]


class FailingEnv(ToyEnv):
    """Made, but never played."""

    def reset(self, *, seed=None, options=None):
        raise RuntimeError("out of order\nand that is all")


@pytest.fixture(scope="module", autouse=True)
def ray():
    """One cluster for all tests; `run_sweep` uses it as it is."""
    ray = import_ray()
    options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    ray.init("local", num_cpus=2, object_store_memory=80 * 2**20, **options)
    yield ray
    ray.shutdown()


def write_toy(path, seed, env_id=TOY_ID):
    """A file with 200 random steps, 10 an episode."""
    rng = np.random.default_rng(seed)
    ends = np.arange(1, 201) % 10 == 0
    arrays = {
        "observations": rng.normal(size=(200, OBSERVATION_DIM)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (200, ACTION_DIM)).astype(np.float32),
        "rewards": rng.normal(size=200).astype(np.float32),
        "terminals": np.zeros(200, dtype=bool),
        "timeouts": ends,
    }
    write_hdf5(path, arrays, {"environment": env_id})
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return [write_toy(folder / f"{name}.hdf5", seed) for seed, name in enumerate(("alpha", "beta"))]


@pytest.fixture(scope="module")
def done(files, tmp_path_factory):
    """A finished sweep of two datasets and two seeds; copy it before you change it."""
    folder, lines = tmp_path_factory.mktemp("sweep"), []
    result = run_sweep(files, (0, 1), folder, CONFIG, progress=False, say=lines.append)
    return result, lines


@pytest.fixture
def copied(done, tmp_path):
    return shutil.copytree(done[0].output_dir, tmp_path / "copy")


def run_directly(path, seed, folder, train_config=TRAIN):
    """What a trial does, in this process: eval losses and returns."""
    dataset = load_dataset(path, ref_scores=CONFIG.ref_scores)
    config = {**vars(train_config), "seed": seed}
    model = CONFIG.model_for(dataset)
    checkpoint = train(dataset, model, TrainConfig(**config), folder, progress=False)
    planner = Planner(checkpoint, PLAY.plan, "cpu")
    return checkpoint, evaluate(planner, episodes=PLAY.episodes, progress=False)


def state_of(folder):
    """Trial -> (state, attempts)."""
    trials = json.loads((folder / "sweep.json").read_text())["trials"]
    return {name: (trial["state"], trial["attempts"]) for name, trial in trials.items()}


def when_saved(folder, act):
    """Call `act` as soon as the trial in `folder` has its first checkpoint; the thread."""

    def watch():
        end = time.monotonic() + 60.0
        while newest_checkpoint(folder) is None and time.monotonic() < end:
            time.sleep(0.002)
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def kill_worker(trial):
    """SIGKILL to the process of this cluster that runs a trial, which Ray names after it."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            named = entry.read_bytes().startswith(f"ray::{trial}\0".encode())
            pid = int(entry.parent.name)
            if named and os.getpid() in ancestors(pid):
                os.kill(pid, signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            continue


def ancestors(pid):
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        yield pid


# ---- what a sweep finds ----


def test_a_trial_is_train_and_evaluate(done, files, tmp_path):
    sweep, lines = done
    assert not sweep.failures
    trials = [("alpha", 0), ("alpha", 1), ("beta", 0), ("beta", 1)]
    assert [(r.trial.dataset, r.trial.seed) for r in sweep.results] == trials
    for result, path in zip(sweep.results, np.repeat(files, 2), strict=True):
        checkpoint, played = run_directly(path, result.trial.seed, tmp_path / result.trial.folder)
        assert result.losses == checkpoint.metadata["eval_losses"]
        assert result.step == checkpoint.metadata["step"]
        assert result.played.returns == played.returns
        assert str(result) in lines
    assert len({result.played.returns for result in sweep.results}) > 1
    assert not list(sweep.output_dir.rglob("error.txt"))


def test_episodes_of_all_seeds_are_pooled(done):
    sweep, _ = done
    pooled = sweep.pooled()["beta"]
    returns = [value for result in sweep.results[2:] for value in result.played.returns]
    assert pooled.returns == tuple(returns)
    assert len(returns) == 4
    head, alpha, beta = str(sweep).splitlines()
    assert head.split() == ["dataset", "seeds", "return", "score"]
    assert alpha.split()[:2] == ["alpha", "2/2"]
    shown = f"{pooled.mean_return:,.1f} ± {pooled.std_error:,.1f}"
    scores = f"{pooled.normalized_mean:,.1f} ± {pooled.normalized_std_error:,.1f}"
    assert beta.split() == ["beta", "2/2", *shown.split(), *scores.split()]


def test_what_is_written(done):
    folder = done[0].output_dir
    values = json.loads((folder / "beta-seed1" / "result.json").read_text())
    assert (values["dataset"], values["seed"], values["budgets"]["max_tokens"]) == ("beta", 1, 3000)
    assert values["played"]["env_id"] == TOY_ID
    assert values["played"]["plan_config"]["beam_width"] == 3
    assert set(state_of(folder).values()) == {("done", 1)}
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")


# ---- continuing ----


def test_done_trials_are_skipped_and_others_go_on(done, copied, files):
    half_done = copied / "alpha-seed1"
    (half_done / "result.json").unlink()
    newest = newest_checkpoint(half_done)
    shutil.rmtree(newest)  # as if killed after the checkpoint before it
    before = stamps(copied)
    sweep = run_sweep(files, (0, 1), copied, CONFIG, progress=False)
    assert [str(r) for r in sweep.results] == [str(r) for r in done[0].results]
    assert sweep.results == done[0].results
    after = stamps(copied)
    changed = {path.parts[0] for path in after if after[path] != before.get(path)}
    assert changed == {"alpha-seed1"}
    rows = [row["step"] for row in read_metrics(half_done / "metrics.csv")]
    assert rows == sorted(set(rows))  # the rows before it were not measured again
    assert newest_checkpoint(half_done) == newest


def stamps(folder):
    """When each file in the trials' folders was written."""
    paths = [path for path in folder.glob("*/**/*") if path.is_file()]
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in paths}


def test_a_finished_sweep_needs_no_trial(done, copied, files, monkeypatch):
    monkeypatch.setattr("tt_fast.sweep.runner.attempt", None)
    assert run_sweep(files, (0, 1), copied, CONFIG, progress=False).results == done[0].results


def test_seeds_budgets_and_episodes_may_grow(copied, files):
    longer = SweepConfig(
        MODEL,
        TrainConfig(**vars(TRAIN) | {"max_tokens": 4000}),
        PlayConfig(**vars(PLAY) | {"episodes": 3}),
        ref_scores=CONFIG.ref_scores,
    )
    sweep = run_sweep(files[:1], (0, 4), copied, longer, progress=False)
    first, new = sweep.results
    assert first.step == new.step > read_step(copied, "alpha-seed1")
    assert len(sweep.pooled()["alpha"].returns) == 6
    assert len(state_of(copied)) == 5
    # the trials that were not asked for now are those of the smaller budget
    assert read_result(copied, Trial("beta", "", 0), longer) is None
    assert read_result(copied, Trial("beta", "", 0), CONFIG) is not None


def read_step(folder, trial):
    return json.loads((folder / trial / "result.json").read_text())["step"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"embed_dim": 16}}, r"^model_config.embed_dim: expected 8, as .* got 16$"),
        ({"train": {"learning_rate": 1.0}}, r"^train_config.learning_rate: expected 0.0006, as "),
        ({"train": {"max_tokens": 10}}, r"^max_tokens: expected at least 3000, as .*, got 10$"),
        ({"train": {"max_minutes": 1.0}}, r"^max_minutes: expected None, got 1.0$"),
        ({"play": {"episodes": 1}}, r"^episodes: expected at least 2, as .*, got 1$"),
        ({"play": {"plan": PlanConfig()}}, r"^plan.horizon: expected 2, as .*json has it, got 15$"),
        ({"play": {"max_steps": 3}}, r"^max_steps: expected None, as .* got 3$"),
    ],
)
def test_other_settings_are_refused(copied, files, changes, message):
    parts = {name: {**vars(getattr(CONFIG, name)), **changes.get(name, {})} for name in changes}
    types = {"model": ModelConfig, "train": TrainConfig, "play": PlayConfig}
    config = SweepConfig(
        **{"model": MODEL, "train": TRAIN, "play": PLAY, "ref_scores": CONFIG.ref_scores}
        | {name: types[name](**values) for name, values in parts.items()}
    )
    before = (copied / "sweep.json").read_bytes()
    with pytest.raises(ValueError, match=message):
        run_sweep(files, (0, 1), copied, config, progress=False)
    assert (copied / "sweep.json").read_bytes() == before


def test_other_data_of_the_same_name_are_refused(copied, files, tmp_path):
    other = write_toy(tmp_path / "alpha.hdf5", seed=9)
    with pytest.raises(ValueError, match=r"^dataset alpha: expected rows of SHA-256 "):
        run_sweep([other], (0,), copied, CONFIG, progress=False)


def test_damaged_files_are_named(copied, files):
    path = copied / "alpha-seed0" / "result.json"
    path.write_text('{"budgets": 1')
    with pytest.raises(ValueError, match=f"^{path}: expected JSON: "):
        run_sweep(files, (0, 1), copied, CONFIG, progress=False)
    (copied / "sweep.json").write_text('{"settings": {}}')
    with pytest.raises(ValueError, match=r"sweep.json: expected a sweep's budgets, got None"):
        run_sweep(files, (0, 1), copied, CONFIG, progress=False)


def test_one_sweep_at_a_time(files, tmp_path):
    import fcntl

    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError, match="output_dir: expected no other sweep at work"):
            run_sweep(files, (0,), tmp_path, CONFIG, progress=False)


# ---- trials that fail ----


@pytest.mark.skipif(sys.platform != "linux", reason="finds the process in /proc")
def test_a_killed_trial_is_tried_again_from_its_checkpoint(files, tmp_path):
    train_config = TrainConfig(**vars(TRAIN) | {"max_tokens": 20_000})
    config = SweepConfig(MODEL, train_config, PLAY, ref_scores=CONFIG.ref_scores)
    folder, lines = tmp_path / "alpha-seed0", []
    thread = when_saved(folder, lambda: kill_worker("alpha-seed0"))
    sweep = run_sweep(files[:1], (0,), tmp_path, config, progress=False, say=lines.append)
    thread.join()
    assert state_of(tmp_path) == {"alpha-seed0": ("done", 2)}
    assert lines[0].startswith("alpha-seed0: attempt 1 of 3 failed: WorkerCrashedError: ")
    checkpoint, played = run_directly(files[0], 0, tmp_path / "direct", train_config)
    [result] = sweep.results
    assert result.played.returns == played.returns
    assert result.losses == checkpoint.metadata["eval_losses"]
    assert not (folder / "error.txt").exists()


def test_a_trial_that_always_fails_stops_no_other(capsys, files, tmp_path):
    bad = write_toy(tmp_path / "bad.hdf5", 3, FAILS_ID)
    folder = tmp_path / "sweep"
    argv = ["sweep", bad, files[0], "--output-dir", folder, "--seeds", 0, "--num-bins", 20, *BEAM]
    argv += [*SMALL, "--max-tokens", 500, "--retries", 1]
    with pytest.raises(SystemExit) as exit_info:
        run(*argv)
    assert exit_info.value.code == 1
    shown = capsys.readouterr().out
    error = "and that is all"
    assert f"bad-seed0: attempt 1 of 2 failed: {error}\n" in shown
    table = shown[shown.index("dataset") :].splitlines()
    assert table[1].split() == ["bad", "0/1", "-", "-"]
    assert table[2].split()[:2] == ["alpha", "1/1"]
    path = folder / "bad-seed0" / "error.txt"
    assert table[4:] == ["failed:", f"bad-seed0, 2 x: {error} ({path})", str(folder)]
    assert "in reset" in path.read_text()
    assert state_of(folder) == {"bad-seed0": ("failed", 2), "alpha-seed0": ("done", 1)}


def test_wrong_settings_are_not_tried_again(files, tmp_path):
    smaller = TrainConfig(**vars(TRAIN) | {"batch_size": 4})
    run_directly(files[0], 0, tmp_path / "alpha-seed0", smaller)
    sweep = run_sweep(files[:1], (0,), tmp_path, CONFIG, progress=False)
    [failure] = sweep.failures
    assert failure.attempts == 1
    assert failure.error.startswith("ValueError: train_config.batch_size: expected 4, to resume ")


def test_a_backend_that_cannot_run_shows_before_training(files, tmp_path, monkeypatch):
    monkeypatch.setattr("tt_fast.planning.cpu._core", None)
    path, folder = files[0], tmp_path / "alpha-seed0"
    with pytest.raises(ValueError, match="backend: expected one that was built"):
        _run_trial(Trial("alpha", str(path), 0), CONFIG, folder, num_threads=1)
    assert not folder.exists()


def test_ctrl_c_saves_every_trial(capsys, files, tmp_path):
    def interrupt():
        os.kill(os.getpid(), signal.SIGINT)

    argv = ["sweep", files[0], "--output-dir", tmp_path, "--seeds", 5, *ENDLESS, *BEAM]
    thread = when_saved(tmp_path / "alpha-seed5", interrupt)
    run(*argv, status=130)
    thread.join()
    shown = capsys.readouterr()
    assert "waiting for the trials to write their checkpoints" in shown.out
    expected = f"results and checkpoints are in {tmp_path}; the same command continues"
    assert shown.err == f"tt-fast: interrupted: {expected}\n"
    step = int(newest_checkpoint(tmp_path / "alpha-seed5").name.removeprefix("step_"))
    rows = read_metrics(tmp_path / "alpha-seed5" / "metrics.csv")
    assert not rows or rows[-1]["step"] <= step
    assert state_of(tmp_path) == {"alpha-seed5": ("waiting", 1)}
    assert not list(tmp_path.glob("*/checkpoints/.*"))


# ---- the command ----


def test_without_episodes_the_losses_are_shown(capsys, files, tmp_path):
    argv = ["sweep", *files, "--output-dir", tmp_path, "--seeds", 2, "--episodes", 0, *SMALL]
    run(*argv, "--num-bins", 20, "--max-tokens", 500)
    lines = capsys.readouterr().out.splitlines()
    head = "dataset seeds observation loss action loss reward loss value loss"
    assert lines[-4].split() == head.split()
    losses = json.loads((tmp_path / "beta-seed2" / "result.json").read_text())["losses"]
    assert lines[-2].split()[2:] == [f"{value:.3f}" for value in losses.values()]
    assert lines[-1] == str(tmp_path)
    assert not (tmp_path / "sweep.png").exists()


def test_options_of_training_and_plans(capsys):
    shown = help_text(capsys, "sweep")
    for option in ("--max-minutes", "--embed-dim", "--horizon", "--plan-discount", "--workers"):
        assert f"{option} " in shown
    assert "--seed INT" not in shown
    command = parse(["sweep", "a", "b", "--output-dir", "x", "--discount", "0.9", "--seeds", "7"])
    assert (command.datasets, command.seeds) == (("a", "b"), (7,))
    assert (command.train.discount, command.plan.discount) == (0.9, None)


def test_a_preset_sets_training_and_plans():
    name = "jannerm/walker2d-medium-replay-v2"
    argv = ["sweep", "a", "--output-dir", "x", "--preset", name, "--k-act", "30"]
    command = parse(argv)
    assert command.train.max_windows == PRESETS[name].train["max_windows"]
    assert (command.plan.horizon, command.plan.k_act) == (20, 30)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "1", "1"], "seeds: expected at least one, all different, got (1, 1)"),
        (["--seeds", "-1"], "seeds: expected an integer >= 0"),
        (["--workers", "0"], "workers: expected an integer >= 1, got 0"),
        (["--cpus-per-trial", "3"], "cpus_per_trial: expected at most the 2 of Ray here, got 3"),
        (["--gpus-per-trial", "1"], "gpus_per_trial: expected at most the 0 of Ray here, got 1.0"),
        (["--gpus-per-trial", "1.5"], "gpus_per_trial: expected a share below 1 or a whole number"),
        (["--device", "cuda"], "gpus_per_trial: expected a number above 0 with device='cuda'"),
        (["--retries", "-1"], "retries: expected an integer >= 0, got -1"),
        (["--episodes", "-1"], "episodes: expected an integer >= 0, got -1"),
        (["--plan-freq", "99"], "plan_freq: expected an integer >= 1 and <= 15, got 99"),
        (["--backend", "gpu"], "backend: expected one of 'auto', 'reference', "),
        (["--env-id", "None-v0"], "env_id: expected a Gymnasium id, got 'None-v0'"),
        (["--env-id", "Hopper-v4"], "observation_dim of Hopper-v4: expected alpha's 3, got 11"),
        (["--preset", "none"], "preset: expected one of jannerm/"),
    ],
)
def test_wrong_arguments(capsys, files, tmp_path, options, message):
    argv = ["sweep", files[0], "--output-dir", tmp_path / "x", *SMALL, *options]
    assert refuse(capsys, *argv).startswith(message)
    assert not list(tmp_path.glob("x/*/"))


def test_wrong_datasets(capsys, files, tmp_path):
    out = ["--output-dir", tmp_path / "x", *SMALL]
    assert refuse(capsys, "sweep", *out) == "datasets: expected at least one, got 'none'"
    shown = refuse(capsys, "sweep", files[0], files[0], *out)
    assert shown == "datasets: expected different names, got 'two of alpha'"
    shown = refuse(capsys, "sweep", files[0], tmp_path / "none.hdf5", *out)
    assert shown.startswith(f"source: no file {tmp_path / 'none.hdf5'}")
    shown = usage_error(capsys, "sweep", files[0], *out, "--worker", "3")
    assert "Perhaps you meant: --workers" in shown
    assert not (tmp_path / "x").exists()


def test_ray_is_an_extra(capsys, files, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    shown = refuse(capsys, "sweep", files[0], "--output-dir", tmp_path)
    assert shown == 'a sweep needs ray: pip install "tt_fast[ray]"'
