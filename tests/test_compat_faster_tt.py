"""faster-trajectory-transformer's planner: its own plans under its semantics, ours under ours."""

from __future__ import annotations

import gc
import math
import types
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign import FOLDERS, assert_as_exact, golden_folder
from tiny import tiny_checkpoint, tiny_discretizer, tiny_model
from torch import Tensor, nn

import tt_fast
from tt_fast import Checkpoint, Discretizer, PlanConfig
from tt_fast.compat.faster_tt import batch_beam_plan, beam_plan, vec_rollout
from tt_fast.compat.faster_tt_models import PublishedGPT, adopt, as_discretizer
from tt_fast.compat.faster_tt_published import CachedDecoder
from tt_fast.formats import faster_tt as file_format

NAMES = FOLDERS["faster_tt"]
NUM_CASES = 5
PLAN = {"steps": 2, "beam_width": 4, "sample_expand": 2}


def load(name: str) -> tuple[PublishedGPT, Discretizer]:
    return PublishedGPT.load(golden_folder(name)[0])


def golden_plan(name: str, case: int) -> tuple[Tensor, dict[str, Any]]:
    """Contexts and settings of a recorded plan."""
    check = golden_folder(name)[1]
    names = ("steps", "beam_width", "sample_expand", "context_size", "k_obs", "k_reward", "k_act")
    values = check["plan_settings"][case]
    settings = {
        name: None if math.isnan(value) else int(value)
        for name, value in zip(names, values[1:8], strict=True)
    }
    floats = {"temperature": float(values[8]), "discount": float(values[9])}
    return torch.from_numpy(check[f"plan_context_{case}"]), settings | floats


# --- their semantics ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", range(NUM_CASES))
@pytest.mark.filterwarnings("ignore:Seems like cache")
def test_published_plans_are_theirs_token_for_token(name: str, case: int) -> None:
    """The generator stands where theirs stood, too: as many numbers were drawn."""
    (model, bins), check = load(name), golden_folder(name)[1]
    contexts, settings = golden_plan(name, case)
    torch.manual_seed(100 + case)
    plan = beam_plan(model, bins, contexts[:1], **settings, semantics="published")
    assert plan.dtype == torch.int64
    np.testing.assert_array_equal(plan.numpy(), check[f"plan_{case}"])
    assert float(torch.rand(())) == check[f"next_random_{case}"]
    torch.manual_seed(200 + case)
    plans = batch_beam_plan(model, bins, contexts, **settings, semantics="published")
    np.testing.assert_array_equal(plans.numpy(), check[f"batch_plan_{case}"])


@pytest.mark.parametrize("name", NAMES)
def test_cached_logits_are_theirs(name: str) -> None:
    (model, _), check = load(name), golden_folder(name)[1]
    tokens = torch.from_numpy(check["tokens"])
    decoder = CachedDecoder(model, tokens[:, :5])
    logits = [decoder.next_logits(), *(decoder.step(column) for column in tokens.T[5:])]
    theirs, truth = (check[f"{key}_cached_prefill5"][:, 4:] for key in ("logits", "logits64"))
    assert_as_exact(torch.stack(logits, 1), theirs, truth)
    assert np.abs(truth - check["logits64"][:, 4:]).max() > 0.1  # another model than was trained


# --- ours -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_correct_plans_are_the_native_ones(name: str) -> None:
    folder, _ = golden_folder(name)
    (model, bins), checkpoint = load(name), Checkpoint.load(folder)
    contexts, _ = golden_plan(name, 3)
    config = PlanConfig(
        horizon=2, beam_width=4, k_act=5, cdf_act=None, max_context_transitions=None
    )
    assert checkpoint.discretizer is not None
    for start in range(5):
        torch.manual_seed(start)
        seed = int(torch.randint(2**62, ()))
        native = tt_fast.beam_plan(
            checkpoint.model, checkpoint.discretizer, contexts.numpy(), config, seed=seed
        ).tokens.reshape(3, -1)[:, 3:]
        torch.manual_seed(start)
        plans = batch_beam_plan(model, bins, contexts, **PLAN, k_act=5)
        np.testing.assert_array_equal(plans.numpy(), native)
        torch.manual_seed(start)
        one = beam_plan(checkpoint, None, contexts[:1], **PLAN, k_act=5)
        np.testing.assert_array_equal(one.numpy(), native[0])


@pytest.mark.parametrize("name", NAMES)
def test_both_semantics_agree_where_no_value_lies_in_the_cache(name: str) -> None:
    """One step from one observation, every token the likeliest: nothing hidden is ever seen."""
    model, bins = load(name)
    greedy = {"steps": 1, "beam_width": 1, "sample_expand": 1, "k_act": 1}
    generator = torch.Generator().manual_seed(0)
    for context in torch.randint(0, 8, (20, 1, 3), generator=generator):
        plans = [
            beam_plan(model, bins, context, **greedy, semantics=s) for s in ("correct", "published")
        ]
        assert torch.equal(*plans)


def test_estimates_are_taken_at_temperature_one() -> None:
    """Theirs divides by the temperature what it draws from, not what it estimates from."""
    model, bins = load(NAMES[0])
    context, seen = torch.tensor([[1, 2, 3]]), []
    for temperature in (1.0, 2.0):
        backend = adopt(model, bins)
        original, calls = backend.plan, []

        def spy(*args: Any, _plan: Any = original, _calls: Any = calls, **kwargs: Any) -> Any:
            inner = kwargs["value_fn"]
            kwargs["value_fn"] = inner and (lambda p: (_calls.append(inner(p)), _calls[-1])[1])
            plan = _plan(*args, **kwargs)
            _calls.append(plan)
            return plan

        backend.plan = spy  # type: ignore[method-assign]
        try:
            torch.manual_seed(0)
            beam_plan(model, bins, context, 1, 1, 1, k_act=1, k_obs=1, temperature=temperature)
        finally:
            del backend.plan
        seen.append(calls[-1].rewards[0, 0])
    np.testing.assert_allclose(seen[1], seen[0], rtol=1e-4)


def test_the_context_is_cropped_as_theirs() -> None:
    model, bins = load(NAMES[0])
    context = torch.arange(24)[None] % 8
    torch.manual_seed(0)
    cropped = beam_plan(model, bins, context, **PLAN, context_size=2)
    torch.manual_seed(0)
    # 24 tokens, at most 14: two whole transitions go
    assert torch.equal(cropped, beam_plan(model, bins, context[:, 14:], **PLAN))


# --- objects --------------------------------------------------------------------------------------


class FakeGPT(nn.Module):
    """Their GPT's attributes and parameter names, as its callers see them."""

    def __init__(self, name: str) -> None:
        super().__init__()
        published = load(name)[0]
        config = published.config
        self.vocab_size, self.transition_dim = config.vocab_size, config.transition_dim
        self.observation_dim, self.action_dim = config.observation_dim, config.action_dim
        self.seq_len, self.embedding_dim = published.seq_len, config.embed_dim
        self.num_layers = config.num_layers
        self.use_sep_heads = published.weights["head.weight"].ndim == 3
        for key, weight in published.weights.items():
            owner: nn.Module = self
            *path, leaf = key.split(".")
            for part in path:
                if part not in dict(owner.named_children()):
                    owner.add_module(part, _Numbered() if part == "blocks" else nn.Module())
                owner = owner.get_submodule(part)
            owner.register_parameter(leaf, nn.Parameter(weight.clone()))
        self.blocks[0].attention.num_heads = config.num_heads  # type: ignore[index, union-attr]


class _Numbered(nn.Module):
    def __getitem__(self, index: int) -> nn.Module:
        return self.get_submodule(str(index))


@pytest.mark.parametrize("name", NAMES)
def test_their_objects_serve(name: str) -> None:
    (published, bins), model = load(name), FakeGPT(name)
    theirs = types.SimpleNamespace(bin_edges=bins.thresholds.T, n_bins=8)
    context = torch.tensor([[1, 2, 3]])
    for semantics in ("correct", "published"):
        torch.manual_seed(0)
        want = beam_plan(published, bins, context, **PLAN, semantics=semantics)
        torch.manual_seed(0)
        assert torch.equal(beam_plan(model, theirs, context, **PLAN, semantics=semantics), want)


def test_weights_are_converted_once_and_again_when_they_change() -> None:
    model, bins = FakeGPT(NAMES[0]), load(NAMES[0])[1]
    first = adopt(model, bins)
    assert adopt(model, bins) is first
    with torch.no_grad():
        model.pos_emb.mul_(-1.0)  # type: ignore[operator]
    assert adopt(model, bins) is not first
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_the_discretizer_is_theirs() -> None:
    for name in NAMES:
        bins, check = load(name)[1], golden_folder(name)[1]
        np.testing.assert_array_equal(bins.encode(check["disc_X"]), check["disc_idx"])
        obs = bins.encode(check["disc_X"][:, :3], slice(0, 3))
        np.testing.assert_array_equal(obs, check["disc_obs_idx"])
        decoded = bins.decode(check["disc_idx"])
        eps = np.finfo(check["bin_edges"].dtype).eps
        np.testing.assert_allclose(decoded, check["disc_decode"], rtol=2 * eps, atol=eps)
        for i in range(2):
            got = bins.expectation(check["probs"][:, i], i - 2)
            np.testing.assert_allclose(got, check["expectation"][:, i], rtol=1e-6, atol=1e-6)


# --- rollouts -------------------------------------------------------------------------------------


class VecEnv:
    """Counters as environments: environment i is done after i + 2 steps and earns 1 a step."""

    num_envs = 3

    def __init__(self) -> None:
        self.steps, self.actions = np.zeros(3, int), []

    def reset(self) -> np.ndarray:
        return np.zeros((3, 3))

    def step(self, actions: np.ndarray) -> tuple[Any, ...]:
        self.actions.append(actions)
        self.steps += 1
        dones = self.steps == np.arange(3) + 2
        self.steps[dones] = 0
        return np.full((3, 3), 0.1), np.ones(3), dones, [{}] * 3


@pytest.mark.parametrize("semantics", ["correct", "published"])
@pytest.mark.parametrize("plan_every", [1, 2])
def test_rollouts_count_the_first_episode_of_each(semantics: str, plan_every: int) -> None:
    env, (model, bins) = VecEnv(), load(NAMES[0])
    returns = vec_rollout(
        env, model, bins, 2, 2, 4, plan_every=plan_every, max_steps=10, semantics=semantics,
    )  # fmt: skip
    np.testing.assert_array_equal(returns, [2.0, 3.0, 4.0])
    assert len(env.actions) == 4  # until the last was done
    assert env.actions[0].shape == (3, 2)


def test_rollouts_end_at_max_steps() -> None:
    env, (model, bins) = VecEnv(), load(NAMES[0])
    returns = vec_rollout(env, model, bins, None, 2, 2, max_steps=2)
    np.testing.assert_array_equal(returns, [2.0, 2.0, 2.0])


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"semantics": "both"}, "semantics: expected one of 'correct', 'published'"),
        ({"context": torch.zeros(2, 3, dtype=torch.long)}, r"context: expected a tensor \(1, con"),
        ({"context": torch.zeros(1, 4, dtype=torch.long)}, r"context\[0\]: expected a length of k"),
        ({"context": torch.full((1, 3), 8)}, r"context: expected ids in \[0, 7\], got 8"),
        ({"context_size": 0}, "context_size: expected an integer >= 1"),
        ({"steps": 0}, "steps: expected an integer >= 1"),
        ({"k_reward": 9}, "k_reward: expected an integer >= 1 and <= 8, got 9"),
        ({"temperature": 0.0}, "temperature: expected a number in"),
        ({"model": nn.Linear(2, 2)}, "model: expected their GPT, .* got Linear"),
        ({"model": 3}, "model: expected their GPT, .* got 'int'"),
        ({"discretizer": None}, "discretizer: expected their KBinsDiscretizer or"),
        ({"discretizer": Discretizer(np.zeros((9, 6)))}, r"discretizer: expected \(num_bins, tr"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    model, bins = load(NAMES[0])
    arguments = {"model": model, "discretizer": bins, "context": torch.tensor([[1, 2, 3]])}
    with pytest.raises(ValueError, match=message):
        beam_plan(**{**arguments, **PLAN, **changes})


def test_a_context_longer_than_their_window() -> None:
    model, bins = load(NAMES[0])
    long = torch.zeros(1, 5 * 7 + 3, dtype=torch.long)
    with pytest.raises(ValueError, match="context: expected at most 28 tokens, got 38"):
        beam_plan(model, bins, long, **PLAN, semantics="published")
    assert len(beam_plan(model, bins, long, **PLAN)) == 11  # ours drops what does not fit


def test_files_that_are_absent(tmp_path: Path) -> None:
    tiny_checkpoint().save_foreign(tmp_path / "x", "faster_tt")
    (tmp_path / "x" / file_format.DISCRETIZER).unlink()
    with pytest.raises(FileNotFoundError, match=r"expected discretizer.pt, got none"):
        PublishedGPT.load(tmp_path / "x")


def test_models_of_ours_under_their_semantics() -> None:
    torch.manual_seed(0)
    plan = beam_plan(
        tiny_model(), tiny_discretizer(), torch.tensor([[1, 2, 3]]), **PLAN, semantics="published"
    )
    assert tuple(plan.shape) == (11,)
    assert as_discretizer(None, tiny_checkpoint()).num_bins == 8
