"""Training: it learns, it resumes bit for bit, and it survives being killed."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import NUM_BINS, tiny_dataset, tiny_model_config, tiny_train_config, weights_equal

from tt_fast import Checkpoint, train
from tt_fast.checkpoint import newest_checkpoint
from tt_fast.config import TOKEN_KINDS, ModelConfig
from tt_fast.data import OfflineDataset
from tt_fast.encoding import tokenize
from tt_fast.train import pick_device
from tt_fast.training.log import COLUMNS, read_metrics
from tt_fast.training.losses import marginal_losses
from tt_fast.training.optimizer import build_optimizer
from tt_fast.training.trainer import Evaluator


def _columns(path: Path) -> list[tuple[float, ...]]:
    """metrics.csv without the one column that is a timing."""
    names = [name for name in COLUMNS if name != "tokens_per_second"]
    return [tuple(row[name] for name in names) for row in read_metrics(path / "metrics.csv")]


def _run(
    output_dir: Path,
    steps: int,
    model_config: ModelConfig | None = None,
    *,
    resume: bool = False,
    evaluator: Evaluator | None = None,
    **changes: Any,
) -> Checkpoint:
    """`steps` optimiser steps in all."""
    config = tiny_train_config(max_epochs=steps * 8 / _num_windows(), **changes)
    model_config = model_config or tiny_model_config()
    return train(
        tiny_dataset(),
        model_config,
        config,
        output_dir,
        resume=resume,
        progress=False,
        evaluator=evaluator,
    )


def _num_windows() -> int:
    return len(tokenize(tiny_dataset(), tiny_model_config(), tiny_train_config())[1])


def test_loss_falls_below_the_marginals(tmp_path: Path) -> None:
    dataset = tiny_dataset(num_episodes=2)
    model_config = tiny_model_config(embed_dropout=0.0, residual_dropout=0.0, attention_dropout=0.0)
    config = tiny_train_config(max_epochs=60.0, learning_rate=1e-2, step=1)
    checkpoint = train(dataset, model_config, config, tmp_path, progress=False)
    for kind in TOKEN_KINDS:
        marginal = checkpoint.metadata["marginal_losses"][kind]
        assert checkpoint.metadata["eval_losses"][kind] < 0.7 * marginal, kind


def test_marginal_losses_are_entropies() -> None:
    model_config = tiny_model_config()
    _, windows = tokenize(tiny_dataset(), model_config, tiny_train_config())
    batch = windows.gather(torch.arange(len(windows)))
    dims = (np.arange(windows.window_len) + 1) % model_config.transition_dim
    ids, mask = batch.targets.numpy(), batch.mask.numpy()
    entropies = []
    for dim in range(model_config.transition_dim):
        chosen = ids[:, dims == dim][mask[:, dims == dim]]
        share = np.unique(chosen, return_counts=True)[1] / len(chosen)
        entropies.append((-(share * np.log(share)).sum(), len(chosen)))
    losses = marginal_losses(windows, model_config)
    assert losses["reward"] == pytest.approx(entropies[-2][0])
    assert losses["value"] == pytest.approx(entropies[-1][0])
    observation = entropies[: model_config.observation_dim]
    weights = [n for _, n in observation]
    assert losses["observation"] == pytest.approx(
        np.average([h for h, _ in observation], weights=weights)
    )


def test_same_seed_same_weights_and_global_random_state_untouched(tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b = _run(tmp_path / "a", 4), _run(tmp_path / "b", 4)
    assert torch.equal(torch.get_rng_state(), before)
    assert weights_equal(a.model, b.model)
    assert not weights_equal(a.model, _run(tmp_path / "c", 4, seed=1).model)


def test_metadata_and_files(tmp_path: Path) -> None:
    checkpoint = _run(tmp_path, 7)
    metadata = checkpoint.metadata
    assert metadata["env_id"] == "Tiny-v0"
    assert metadata["dataset"] == "tiny"
    assert metadata["ref_scores"] == [0.0, 10.0]
    assert metadata["step"] == 7
    assert metadata["versions"]["torch"] == torch.__version__
    assert metadata["losses"].keys() == metadata["marginal_losses"].keys() == set(TOKEN_KINDS)
    assert Checkpoint.load(tmp_path).metadata == json.loads(json.dumps(metadata))
    assert weights_equal(Checkpoint.load(tmp_path).model, checkpoint.model)
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == [
        "step_00000005",
        "step_00000007",
    ]
    assert [row[0] for row in _columns(tmp_path)] == [3, 6, 7]
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_a_budget_in_minutes(tmp_path: Path) -> None:
    config = tiny_train_config(max_minutes=0.02)
    arguments = (tiny_dataset(), tiny_model_config(), config, tmp_path)
    first = train(*arguments, progress=False)
    assert first.metadata["seconds"] >= 1.2
    again = train(*arguments, resume=True, progress=False)
    assert weights_equal(first.model, again.model)


@pytest.mark.parametrize("changes", [{"step": 2}, {"num_bins": 300}])
def test_other_windows_and_vocabularies_train(tmp_path: Path, changes: dict[str, int]) -> None:
    model_config = tiny_model_config(vocab_size=changes.get("num_bins", NUM_BINS))
    config = tiny_train_config(max_tokens=500, strategy="uniform", **changes)
    checkpoint = train(tiny_dataset(), model_config, config, tmp_path, progress=False)
    assert checkpoint.metadata["tokens"] >= 500


def test_bfloat16_trains(tmp_path: Path) -> None:
    low = _run(tmp_path / "low", 3, precision="bfloat16")
    full = _run(tmp_path / "full", 3)
    assert next(low.model.parameters()).dtype == torch.float32
    assert low.metadata["losses"]["value"] == pytest.approx(
        full.metadata["losses"]["value"], rel=0.05
    )
    assert not weights_equal(low.model, full.model)


# ---- resuming ----


def _press_ctrl_c_in_step(number: int, patch: pytest.MonkeyPatch) -> None:
    """SIGINT in the middle of that optimiser step, counted from 1."""
    clip, calls = torch.nn.utils.clip_grad_norm_, iter(range(1, 1000))

    def interrupting_clip(*args: Any) -> torch.Tensor:
        if next(calls) == number:
            signal.raise_signal(signal.SIGINT)
        return clip(*args)

    patch.setattr(torch.nn.utils, "clip_grad_norm_", interrupting_clip)


# before the first checkpoint, on one, in epoch 2
@pytest.mark.parametrize(
    ("stop", "goal_conditioned"), [(2, False), (5, False), (17, False), (5, True)]
)
def test_interrupted_and_resumed_equals_uninterrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int, goal_conditioned: bool
) -> None:
    model = tiny_model_config(goal_conditioned=goal_conditioned)
    whole = _run(tmp_path / "whole", 20, model)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        _press_ctrl_c_in_step(stop, patch)
        _run(tmp_path / "parts", 20, model)
    assert Checkpoint.load(tmp_path / "parts").metadata["step"] == stop
    resumed = _run(tmp_path / "parts", 20, model, resume=True)
    assert weights_equal(resumed.model, whole.model)
    assert _columns(tmp_path / "parts") == _columns(tmp_path / "whole")


def test_checkpoints_do_not_change_the_result(tmp_path: Path) -> None:
    rare, frequent = _run(tmp_path / "rare", 9), _run(tmp_path / "often", 9, checkpoint_steps=1)
    assert weights_equal(rare.model, frequent.model)


def test_a_finished_run_resumes_to_itself(tmp_path: Path) -> None:
    first = _run(tmp_path, 7)
    again = _run(tmp_path, 7, resume=True)
    assert weights_equal(first.model, again.model)
    assert again.metadata["eval_losses"] == first.metadata["eval_losses"]


def test_a_longer_budget_goes_on(tmp_path: Path) -> None:
    _run(tmp_path, 7)
    assert _run(tmp_path, 11, resume=True).metadata["step"] == 11


def test_resume_without_a_checkpoint_starts(tmp_path: Path) -> None:
    assert _run(tmp_path, 3, resume=True).metadata["step"] == 3


_KILLED_RUN = """
import os, signal, sys
from importlib import import_module
from pathlib import Path

_, tests, folder, steps, module, name, fatal_call = sys.argv
sys.path.insert(0, tests)
from test_train import _run

function, calls = getattr(import_module(module), name), iter(range(1, 10**9))

def deadly(*args, **kwargs):
    if next(calls) == int(fatal_call):
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*args, **kwargs)

setattr(import_module(module), name, deadly)
_run(Path(folder), int(steps), checkpoint_steps=1, resume=True)
"""

# a save flushes five files and a folder, and deletes the oldest of three checkpoints
_KILLS = [
    ("tt_fast.files", "_flush_to_disk", 5),  # in the first save: nothing is there yet
    ("tt_fast.files", "_flush_to_disk", 11),  # in the second: the first one stands
    ("shutil", "rmtree", 2),  # deleting: first what the kill before left, then a checkpoint
    ("torch.nn.utils", "clip_grad_norm_", 3),  # between saves
    ("tt_fast.checkpoint", "save_file", 2),  # writing weights
]


def test_kill_9_in_a_save_then_resume_equals_uninterrupted(tmp_path: Path) -> None:
    folder, total = tmp_path / "killed", 12
    steps = []
    for kill in _KILLS:
        arguments = [str(Path(__file__).parent), str(folder), str(total), *map(str, kill)]
        done = subprocess.run(
            [sys.executable, "-c", _KILLED_RUN, *arguments],
            check=False,
            capture_output=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
        newest = newest_checkpoint(folder)
        steps.append(0 if newest is None else Checkpoint.load(newest).metadata["step"])
    assert steps == sorted(steps)
    assert 0 == steps[0] < steps[1] < steps[-1] < total
    resumed = _run(folder, total, resume=True)
    whole = _run(tmp_path / "whole", total)
    assert weights_equal(resumed.model, whole.model)
    assert _columns(folder) == _columns(tmp_path / "whole")
    leftovers = [p.name for p in (folder / "checkpoints").iterdir() if p.name.startswith(".")]
    assert leftovers == []


# ---- an average of the weights ----


def _weights_after_each_step(patch: pytest.MonkeyPatch) -> list[list[torch.Tensor]]:
    """Filled with a run's weights: initial ones, then those after every step."""
    seen: list[list[torch.Tensor]] = []
    step = torch.optim.AdamW.step

    def watched(optimizer: torch.optim.AdamW, *args: Any) -> Any:
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        seen.append([p.detach().double().clone() for p in weights]) if not seen else None
        result = step(optimizer, *args)
        seen.append([p.detach().double().clone() for p in weights])
        return result

    patch.setattr(torch.optim.AdamW, "step", watched)
    return seen


def test_checkpoints_hold_the_average(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = _weights_after_each_step(monkeypatch)
    checkpoint = _run(tmp_path, 20, ema_decay=0.6)
    average = seen[0]
    for step, weights in enumerate(seen[1:]):
        decay = min(0.6, (1 + step) / (10 + step))
        average = [decay * a + (1 - decay) * w for a, w in zip(average, weights, strict=True)]
    groups = build_optimizer(checkpoint.model, tiny_train_config()).param_groups
    found = [p.detach() for group in groups for p in group["params"]]
    for got, want, last in zip(found, average, seen[-1], strict=True):
        # each of 20 float32 updates rounds its result by half a unit in the last place at most
        bound = 20 * np.finfo(np.float32).eps * want.abs().max()
        assert (got - want).abs().max() <= bound
        assert (got - last).abs().max() > 10 * bound


def test_an_average_that_forgets_is_the_weights(tmp_path: Path) -> None:
    plain, averaged = _run(tmp_path / "plain", 4), _run(tmp_path / "average", 4, ema_decay=0.0)
    assert weights_equal(plain.model, averaged.model)


def test_an_average_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _run(tmp_path / "whole", 12, ema_decay=0.9)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        _press_ctrl_c_in_step(7, patch)
        _run(tmp_path / "parts", 12, ema_decay=0.9)
    resumed = _run(tmp_path / "parts", 12, ema_decay=0.9, resume=True)
    assert weights_equal(resumed.model, whole.model)
    assert _columns(tmp_path / "parts") == _columns(tmp_path / "whole")


# ---- evaluations ----


class _Scores:
    """An evaluator that knows its scores beforehand."""

    def __init__(self, *scores: float) -> None:
        self.scores, self.steps = list(scores), []

    def __call__(self, checkpoint: Checkpoint) -> float:
        assert not checkpoint.model.training
        self.steps.append(checkpoint.metadata["step"])
        return self.scores[len(self.steps) - 1]


def _scores(folder: Path) -> list[tuple[float, float]]:
    return [(row["step"], row["score"]) for row in read_metrics(folder / "scores.csv")]


def test_the_best_checkpoint_is_kept(tmp_path: Path) -> None:
    evaluator = _Scores(1.0, 5.0, 5.0, 2.0)
    last = _run(tmp_path / "run", 10, eval_every=3, evaluator=evaluator)
    assert evaluator.steps == [3, 6, 9, 10]
    assert _scores(tmp_path / "run") == [(3, 1.0), (6, 5.0), (9, 5.0), (10, 2.0)]
    best = Checkpoint.load(tmp_path / "run" / "best")
    assert best.metadata["step"] == 6  # the first of equals
    assert best.metadata["best_score"] == last.metadata["best_score"] == 5.0
    assert last.metadata["step"] == 10
    assert weights_equal(last.model, _run(tmp_path / "plain", 10).model)  # nothing else changed


def test_patience_ends_training(tmp_path: Path) -> None:
    options = {"eval_every": 2, "patience": 2}
    last = _run(tmp_path, 20, evaluator=_Scores(1.0, 3.0, 2.0, 3.0), **options)
    assert last.metadata["step"] == 8
    assert last.metadata["eval_losses"]
    assert Checkpoint.load(tmp_path / "best").metadata["step"] == 4
    again = _run(tmp_path, 20, evaluator=_Scores(), resume=True, **options)
    assert weights_equal(again.model, last.model)
    patient = _run(tmp_path, 20, evaluator=_Scores(*[0.0] * 7), resume=True, eval_every=2)
    assert patient.metadata["step"] >= 20


def test_evaluations_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        _press_ctrl_c_in_step(7, patch)
        _run(tmp_path, 11, eval_every=3, evaluator=_Scores(4.0, 7.0))
    _run(tmp_path, 11, eval_every=3, evaluator=_Scores(5.0, 6.0), resume=True)
    assert _scores(tmp_path) == [(3, 4.0), (6, 7.0), (9, 5.0), (11, 6.0)]
    best = Checkpoint.load(tmp_path / "best")
    assert (best.metadata["step"], best.metadata["best_score"]) == (6, 7.0)


def test_ctrl_c_in_an_evaluation_ends_it_at_once_and_it_comes_again(tmp_path: Path) -> None:
    def interrupted(checkpoint: Checkpoint) -> float:
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not reached")

    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path, 8, eval_every=4, evaluator=interrupted)
    assert Checkpoint.load(tmp_path).metadata["step"] == 4
    assert _scores(tmp_path) == []
    _run(tmp_path, 8, eval_every=4, evaluator=_Scores(1.0, 2.0), resume=True)
    assert _scores(tmp_path) == [(4, 1.0), (8, 2.0)]


def test_kill_9_between_two_renames_of_the_best(tmp_path: Path) -> None:
    _run(tmp_path, 4, eval_every=4, evaluator=_Scores(1.0))
    (tmp_path / "best").rename(tmp_path / ".best.old")
    for name in (".best.new", "..best.new.abc", ".metrics.csv.abc", ".scores.csv.abc"):
        (tmp_path / name).mkdir()
    _run(tmp_path, 8, eval_every=4, evaluator=_Scores(0.5), resume=True)
    assert Checkpoint.load(tmp_path / "best").metadata["step"] == 4
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_kill_9_between_two_renames_of_a_checkpoint(tmp_path: Path) -> None:
    whole = _run(tmp_path, 4)
    newest = tmp_path / "checkpoints" / "step_00000004"
    newest.rename(newest.with_name(".step_00000004.old"))
    (newest.parent / "..step_00000004.new.abc").mkdir()
    again = _run(tmp_path, 4, resume=True)
    assert weights_equal(again.model, whole.model)
    assert [path.name for path in newest.parent.iterdir()] == [newest.name]


def test_a_signal_before_an_evaluation_saves_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        _press_ctrl_c_in_step(4, patch)
        _run(tmp_path, 8, eval_every=4, evaluator=_Scores())  # it has none: not to be asked
    assert Checkpoint.load(tmp_path).metadata["step"] == 4
    _run(tmp_path, 8, eval_every=4, evaluator=_Scores(1.0, 2.0), resume=True)
    assert _scores(tmp_path) == [(4, 1.0), (8, 2.0)]


def test_an_interrupt_of_the_last_evaluation_leaves_nothing_out(tmp_path: Path) -> None:
    scores = iter([1.0, None])

    def interrupted(checkpoint: Checkpoint) -> float:
        score = next(scores)
        if score is None:
            raise KeyboardInterrupt
        return score

    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path, 8, eval_every=4, evaluator=interrupted)
    resumed = _run(tmp_path, 8, eval_every=4, evaluator=_Scores(2.0), resume=True)
    assert resumed.metadata["best_score"] == 2.0
    assert Checkpoint.load(tmp_path).metadata == json.loads(json.dumps(resumed.metadata))
    _run(tmp_path, 8, eval_every=4, evaluator=_Scores(), resume=True)  # nothing is left to score
    assert _scores(tmp_path) == [(4, 1.0), (8, 2.0)]


def test_an_early_stop_logs_its_last_steps(tmp_path: Path) -> None:
    options = {"eval_every": 2, "patience": 1, "log_steps": 50}
    last = _run(tmp_path, 20, evaluator=_Scores(2.0, 1.0), **options)
    assert [row[0] for row in _columns(tmp_path)] == [last.metadata["step"]] == [4]
    assert last.metadata["losses"]


def test_an_evaluator_is_checked_first(tmp_path: Path) -> None:
    class Checked(_Scores):
        def check(self, dataset: OfflineDataset, model: ModelConfig) -> None:
            raise ValueError(f"env_id: {dataset.name}, {model.embed_dim}")

    with pytest.raises(ValueError, match="env_id: tiny, 16"):
        _run(tmp_path / "run", 3, eval_every=3, evaluator=Checked())
    assert not (tmp_path / "run").exists()


def test_sigterm_saves_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip, calls = torch.nn.utils.clip_grad_norm_, iter(range(1, 1000))

    def terminated(*args: Any) -> torch.Tensor:
        if next(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return clip(*args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", terminated)
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path, 8)
    assert Checkpoint.load(tmp_path).metadata["step"] == 3


def test_an_evaluator_and_its_interval_come_together(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"evaluator: expected a function, as eval_every is 3"):
        _run(tmp_path, 3, eval_every=3)
    with pytest.raises(ValueError, match=r"patience: expected None, as eval_every is None, got 1"):
        _run(tmp_path, 3, patience=1)
    with pytest.raises(ValueError, match=r"eval_every: expected a number of steps, as there is"):
        _run(tmp_path, 3, evaluator=_Scores(1.0))
    with pytest.raises(ValueError, match=r"evaluator's score: expected a finite number"):
        _run(tmp_path, 3, eval_every=3, evaluator=_Scores(float("nan")))


# ---- errors ----


def test_an_old_run_is_not_overwritten(tmp_path: Path) -> None:
    _run(tmp_path, 3)
    with pytest.raises(
        FileExistsError, match=r"output_dir: expected .* resume=True, got .*step_00000003"
    ):
        _run(tmp_path, 3)


def test_resume_refuses_another_run(tmp_path: Path) -> None:
    _run(tmp_path, 3)
    with pytest.raises(
        ValueError, match=r"train_config.batch_size: expected 8, to resume .* got 4"
    ):
        _run(tmp_path, 3, batch_size=4, resume=True)
    config = tiny_train_config(max_epochs=1.0)
    wider = tiny_model_config(embed_dim=32)
    with pytest.raises(ValueError, match=r"model_config.embed_dim: expected 16, to resume"):
        train(tiny_dataset(), wider, config, tmp_path, resume=True, progress=False)
    scaled = tiny_dataset()
    scaled = replace(scaled, observations=2 * scaled.observations)  # the same tokens
    with pytest.raises(ValueError, match=r"dataset.sha256: expected"):
        train(scaled, tiny_model_config(), config, tmp_path, resume=True, progress=False)
    other = tiny_dataset(seed=1)
    with pytest.raises(ValueError, match=r"dataset.sha256: expected"):
        train(other, tiny_model_config(), config, tmp_path, resume=True, progress=False)


def test_resume_refuses_a_damaged_state(tmp_path: Path) -> None:
    _run(tmp_path, 3)
    state = tmp_path / "checkpoints" / "step_00000003" / "training_state.safetensors"
    content = bytearray(state.read_bytes())
    content[-5] ^= 1
    state.write_bytes(content)
    with pytest.raises(ValueError, match=r"training_state.safetensors: damaged: its SHA-256"):
        _run(tmp_path, 5, resume=True)
    state.write_bytes(content[:100])
    with pytest.raises(ValueError, match=r"training_state.safetensors: absent or damaged"):
        _run(tmp_path, 5, resume=True)


@pytest.mark.parametrize(
    ("model_changes", "train_changes", "message"),
    [
        (
            {"observation_dim": 4},
            {},
            r"model_config.observation_dim: expected the dataset's 3, got 4",
        ),
        ({"action_dim": 1}, {}, r"model_config.action_dim: expected the dataset's 2, got 1"),
        (
            {"vocab_size": 9},
            {},
            r"model_config.vocab_size: expected train_config.num_bins=8, got 9",
        ),
        (
            {},
            {"max_path_length": 10},
            r"max_path_length: expected at least the longest episode's 20",
        ),
        ({}, {"device": "abacus"}, r"device: expected one that torch can use, got 'abacus'"),
    ],
)
def test_configs_that_do_not_fit(
    tmp_path: Path, model_changes: dict[str, int], train_changes: dict[str, object], message: str
) -> None:
    model_config = replace(tiny_model_config(), **model_changes)
    config = replace(tiny_train_config(max_epochs=1.0), **train_changes)
    with pytest.raises(ValueError, match=message):
        train(tiny_dataset(), model_config, config, tmp_path, progress=False)


def test_wrong_types_are_named(tmp_path: Path) -> None:
    config = tiny_train_config()
    with pytest.raises(
        ValueError, match=r"model_config: expected a tt_fast.ModelConfig, got 'dict'"
    ):
        train(tiny_dataset(), {}, config, tmp_path)  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="output_dir: expected a folder or a new name"):
        train(tiny_dataset(), tiny_model_config(), config, tmp_path / "file")


def test_diverging_loss_stops_with_the_last_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"(loss|norm): expected a finite number, got"):
        _run(tmp_path, 500, learning_rate=1e30, grad_clip=1e30, checkpoint_steps=1)
    Checkpoint.load(tmp_path)


def test_spoilt_gradients_stop_before_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, calls = torch.nn.utils.clip_grad_norm_, iter(range(1, 1000))

    def spoiling_clip(parameters: Any, max_norm: float) -> torch.Tensor:
        parameters = list(parameters)
        if next(calls) == 5:
            parameters[0].grad.view(-1)[0] = torch.inf
        return clip(parameters, max_norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoiling_clip)
    with pytest.raises(FloatingPointError, match=r"gradient norm: expected a finite .* at step 4"):
        _run(tmp_path, 8, checkpoint_steps=1)
    assert Checkpoint.load(tmp_path).metadata["step"] == 4


def test_a_smaller_budget_still_ends_with_an_evaluation(tmp_path: Path) -> None:
    _run(tmp_path, 7)
    resumed = _run(tmp_path, 9, resume=True, checkpoint_steps=1)
    assert resumed.metadata["eval_losses"]
    assert Checkpoint.load(tmp_path).metadata["eval_losses"] == resumed.metadata["eval_losses"]


def test_auto_device_is_one_that_works() -> None:
    assert torch.empty(1, device=pick_device("auto")).numel() == 1
