"""Training: it learns what it should, and says what it cannot do."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import NUM_BINS, tiny_dataset, tiny_model_config, tiny_train_config, weights_equal
from train_runs import columns, interrupt_in_step, run

from tt_fast import Checkpoint, train
from tt_fast.config import TOKEN_KINDS
from tt_fast.encoding import tokenize
from tt_fast.train import pick_device
from tt_fast.training.losses import marginal_losses
from tt_fast.training.optimizer import build_optimizer


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


def test_numpys_numbers_train(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", 2, pass_windows=3, betas=(0.5, 0.75))
    config = {"pass_windows": np.int64(3), "betas": (np.float32(0.5), np.float32(0.75))}
    assert weights_equal(plain.model, run(tmp_path / "numpy", 2, **config).model)


def test_same_seed_same_weights_and_global_random_state_untouched(tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b = run(tmp_path / "a", 4), run(tmp_path / "b", 4)
    assert torch.equal(torch.get_rng_state(), before)
    assert weights_equal(a.model, b.model)
    assert not weights_equal(a.model, run(tmp_path / "c", 4, seed=1).model)


def test_metadata_and_files(tmp_path: Path) -> None:
    checkpoint = run(tmp_path, 7)
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
    assert [row[0] for row in columns(tmp_path)] == [3, 6, 7]
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
    low = run(tmp_path / "low", 3, precision="bfloat16")
    full = run(tmp_path / "full", 3)
    assert next(low.model.parameters()).dtype == torch.float32
    assert low.metadata["losses"]["value"] == pytest.approx(
        full.metadata["losses"]["value"], rel=0.05
    )
    assert not weights_equal(low.model, full.model)


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
    checkpoint = run(tmp_path, 20, ema_decay=0.6)
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
    plain, averaged = run(tmp_path / "plain", 4), run(tmp_path / "average", 4, ema_decay=0.0)
    assert weights_equal(plain.model, averaged.model)


def test_an_average_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tmp_path / "whole", 12, ema_decay=0.9)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_in_step(7, patch)
        run(tmp_path / "parts", 12, ema_decay=0.9)
    resumed = run(tmp_path / "parts", 12, ema_decay=0.9, resume=True)
    assert weights_equal(resumed.model, whole.model)
    assert columns(tmp_path / "parts") == columns(tmp_path / "whole")


# ---- errors ----


def test_an_old_run_is_not_overwritten(tmp_path: Path) -> None:
    run(tmp_path, 3)
    with pytest.raises(
        FileExistsError, match=r"output_dir: expected .* resume=True, got .*step_00000003"
    ):
        run(tmp_path, 3)


def test_resume_refuses_another_run(tmp_path: Path) -> None:
    run(tmp_path, 3)
    with pytest.raises(
        ValueError, match=r"train_config.batch_size: expected 8, to resume .* got 4"
    ):
        run(tmp_path, 3, batch_size=4, resume=True)
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
    run(tmp_path, 3)
    state = tmp_path / "checkpoints" / "step_00000003" / "training_state.safetensors"
    content = bytearray(state.read_bytes())
    content[-5] ^= 1
    state.write_bytes(content)
    with pytest.raises(ValueError, match=r"training_state.safetensors: damaged: its SHA-256"):
        run(tmp_path, 5, resume=True)
    state.write_bytes(content[:100])
    with pytest.raises(ValueError, match=r"training_state.safetensors: absent or damaged"):
        run(tmp_path, 5, resume=True)


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
        run(tmp_path, 500, learning_rate=1e30, grad_clip=1e30, checkpoint_steps=1)
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
        run(tmp_path, 8, checkpoint_steps=1)
    assert Checkpoint.load(tmp_path).metadata["step"] == 4


def test_a_smaller_budget_still_ends_with_an_evaluation(tmp_path: Path) -> None:
    run(tmp_path, 7)
    resumed = run(tmp_path, 9, resume=True, checkpoint_steps=1)
    assert resumed.metadata["eval_losses"]
    assert Checkpoint.load(tmp_path).metadata["eval_losses"] == resumed.metadata["eval_losses"]


def test_auto_device_is_one_that_works() -> None:
    assert torch.empty(1, device=pick_device("auto")).numel() == 1
