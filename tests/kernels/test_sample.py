"""The head, truncation, draws and estimates, against the reference's own functions."""

from __future__ import annotations

from typing import Any

import kernel_twins as twins
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import (
    GIVEN,
    Case,
    assert_exact_enough,
    copy_tree,
    fill_draws,
    make_case,
    plan_config,
)
from torch import Tensor

from tt_fast.kernels.sample import DrawFlags, Draws, logits, report_broken, sample, uniform
from tt_fast.planning.philox import philox_uniforms

pytestmark = pytest.mark.usefixtures("quick_interpreter")

PHILOX = DrawFlags(given_uniforms=False, keep_probs=False)
#: First and last dimension of observations, actions, then reward and value.
DIMS = (0, 2, 3, 4, 5, 6)


def make_logits(case: Case, rows_per_env: int, *, grid: float | None = None, std: float = 2.0,
                seed: int = 0) -> Tensor:  # fmt: skip
    """-inf in the padding; multiples of `grid` have ties."""
    rows, generator = case.num_envs * rows_per_env, torch.Generator().manual_seed(seed)
    x = torch.randn(rows, case.shape.ids, generator=generator) * std
    if grid is not None:
        x = (x / grid).round() * grid
    x[:, case.shape.num_ids :] = -torch.inf
    return x


def fresh_draws(draws: Draws) -> Draws:
    """What is written is in memory of its own, NaN."""
    estimates, probs = (torch.full_like(t, torch.nan) for t in (draws.estimates, draws.probs))
    return draws._replace(estimates=estimates, probs=probs)


def check(case: Case, x: Tensor, step: int, out_dim: int, rows_per_env: int,
          flags: DrawFlags = GIVEN) -> tuple[Tensor, Draws]:  # fmt: skip
    """Returns tokens (num_envs, num_rows) of this step and dimension, and what was estimated."""
    sizes = (step, out_dim, case.num_envs, rows_per_env)
    case.tree.tokens.fill_(-9)

    def twin(x: Tensor) -> tuple[Tensor, Draws]:
        tree, draws = copy_tree(case.tree, x.dtype), fresh_draws(case.buffers.draws)
        draws = draws._replace(estimates=draws.estimates.to(x.dtype), probs=draws.probs.to(x.dtype))
        twins.sample(x, tree, draws, *sizes, case.shape, case.plan, flags)
        return tree.tokens, draws

    tokens, plain = twin(x)
    _, exact = twin(x.double())
    got = fresh_draws(case.buffers.draws)
    sample(x, case.tree, got, *sizes, case.shape, case.plan, flags)
    assert torch.equal(case.tree.tokens, tokens)
    for ours, theirs, torchs in ((got.estimates, exact.estimates, plain.estimates),
                                 (got.probs, exact.probs, plain.probs)):  # fmt: skip
        written = ~theirs.isnan()
        assert torch.equal(~ours.isnan(), written)
        if written.any():
            assert_exact_enough(ours[written], theirs[written], torchs[written])
    return tokens[:, step, :, out_dim], got


def drawing_case(*, vocab_size: int = 22, flags: DrawFlags = GIVEN, num_envs: int = 3,
                 **changes: Any) -> Case:  # fmt: skip
    """18 rows of candidates: two tiles of 16, the second one partial."""
    values = {"beam_width": 3, "k_obs": None, "k_act": None, "k_rew": None, "cdf_act": None}
    config = plan_config(**(values | changes))
    case = make_case(vocab_size=vocab_size, num_envs=num_envs, plan=config, flags=flags)
    fill_draws(case, config)
    return case


def rows_of(case: Case, out_dim: int) -> int:
    """Beams draw observations and first actions."""
    plan, shape = case.plan, case.shape
    return plan.num_beams if out_dim <= shape.observation_dim else plan.num_rows


# --- draws ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("out_dim", range(7))
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_every_dimension(out_dim: int, temperature: float) -> None:
    case = drawing_case(temperature=temperature)
    rows = rows_of(case, out_dim)
    tokens, _ = check(case, make_logits(case, rows), case.plan.first_step + 2, out_dim, rows)
    assert len(tokens.unique()) > 2
    beams = tokens[:, : case.plan.num_beams]
    is_shared = torch.equal(tokens[:, case.plan.num_beams :], beams)
    assert is_shared == (out_dim < case.shape.observation_dim)


@pytest.mark.parametrize("vocab_size", [2, 15, 16, 22, 150, 300])
def test_any_vocabulary(vocab_size: int) -> None:
    """The stop token included; tiles of 16 rows down to 4."""
    case = drawing_case(vocab_size=vocab_size, num_envs=2)
    tokens, _ = check(case, make_logits(case, 6), case.plan.first_step, 3, 6)
    assert tokens.max() <= vocab_size


@pytest.mark.parametrize("rows_per_env", [1, 3, 6])
def test_children_draw_for_themselves(rows_per_env: int) -> None:
    """From one distribution a beam, or one for all."""
    case = drawing_case()
    x = make_logits(case, rows_per_env, std=0.1)
    tokens, _ = check(case, x, case.plan.first_step, 3, rows_per_env)
    assert len(tokens[0].unique()) > 2


@pytest.mark.parametrize("u", [0.0, 1.0 - 2.0**-53])
def test_the_ends_of_the_unit_interval(u: float) -> None:
    """Tokens of no probability are never drawn: here the first one and the last four."""
    case = drawing_case()
    case.buffers.draws.uniforms.fill_(u)
    x = make_logits(case, 6)
    x[:, 0] = -200.0
    x[:, 19:] = -200.0
    tokens, _ = check(case, x, case.plan.first_step, 3, 6)
    assert (tokens == (1 if u == 0.0 else 18)).all()


# --- logits that are not finite -------------------------------------------------------------------


@triton.jit
def report_kernel(x_ptr, draws, num_live, model: tl.constexpr):
    row, column = tl.arange(0, 4), tl.arange(0, model.ids)
    x = tl.load(x_ptr + row[:, None] * model.ids + column[None, :])
    report_broken(x, draws, row < num_live, model)


def is_reported(case: Case, x: Tensor, num_live: int) -> bool:
    draws = case.buffers.draws
    draws.broken.zero_()
    report_kernel[(1,)](x, draws, num_live, case.shape)
    return bool(draws.broken[0])


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("column", [0, 22])
def test_one_logit_that_is_not_finite(number: float, column: int) -> None:
    """Of a row that somebody has; padding is infinite anyway."""
    case = drawing_case()
    x = make_logits(case, 2)[:4].contiguous()
    assert case.shape.num_ids == 23 < case.shape.ids
    assert not is_reported(case, x, 4)
    x[2, column] = number
    assert is_reported(case, x, 4)
    assert is_reported(case, x, 3)
    assert not is_reported(case, x, 2)


# --- truncation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cdf", [0.0, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("top_k", [None, 1, 4, 23])
def test_truncation(top_k: int | None, cdf: float) -> None:
    """The second context's logits have ties."""
    case = drawing_case(cdf_act=cdf, k_act=top_k, num_envs=2)
    x = torch.cat([make_logits(case, 6)[:6], make_logits(case, 6, grid=1.0)[6:]])
    check(case, x, case.plan.first_step, 4, 6)


@pytest.mark.parametrize("top_k", [1, 2, 5, 22, 23])
def test_top_k_alone(top_k: int) -> None:
    case = drawing_case(k_act=top_k)
    x = make_logits(case, 6, grid=0.5)
    tokens, _ = check(case, x, case.plan.first_step, 4, 6)
    kept = x.gather(1, tokens.reshape(-1, 1).long()) >= x.topk(top_k).values[:, -1:]
    assert kept.all()


@pytest.mark.parametrize("out_dim", DIMS)
def test_each_kind_has_its_own_settings(out_dim: int) -> None:
    settings = {"k_obs": 2, "k_act": 5, "k_rew": 1, "cdf_obs": 0.1, "cdf_act": 0.5, "cdf_rew": 0.2}
    case = drawing_case(**settings)
    rows = rows_of(case, out_dim)
    check(case, make_logits(case, rows), case.plan.first_step + 1, out_dim, rows)


def test_nothing_is_left_of_equal_tokens() -> None:
    """All get -1000, not -inf, and are drawn alike; the padding is not."""
    case = drawing_case(cdf_act=0.0)
    x = make_logits(case, 6)
    x[:, : case.shape.num_ids] = 0.5
    draws = case.buffers.draws.uniforms.view(3, -1, 6)
    tokens, _ = check(case, x, case.plan.first_step, 3, 6)
    assert torch.equal(tokens, (draws[:, 0] * case.shape.num_ids).int())


@pytest.mark.parametrize("top_k", [None, 3])
def test_removed_tokens_come_back_below_minus_1000(top_k: int | None) -> None:
    """-1000 is likelier than what was kept there, as in the original."""
    case = drawing_case(cdf_act=0.5, k_act=top_k)
    x = make_logits(case, 6) - 3000.0
    tokens, _ = check(case, x, case.plan.first_step, 3, 6)
    assert not (tokens.reshape(-1) == x.argmax(dim=1)).any()


# --- random numbers -------------------------------------------------------------------------------


@triton.jit
def uniform_kernel(out_ptr, draws, draw_idx, plan: tl.constexpr, flags: tl.constexpr):
    env, row = tl.program_id(0), tl.arange(0, 16)
    live = row < plan.num_rows
    numbers = uniform(draws, row * 0 + env, row, draw_idx, live, plan, flags)
    tl.store(out_ptr + env * plan.num_rows + row, numbers, mask=live)


def generated(case: Case, draw_idx: int) -> Tensor:
    """(num_envs, num_rows)"""
    out = torch.full((case.num_envs, case.plan.num_rows), torch.nan, dtype=torch.float64)
    uniform_kernel[(case.num_envs,)](out, case.buffers.draws, draw_idx, case.plan, PHILOX)
    return out


@pytest.mark.parametrize("draw_idx", [0, 1, 30])
@pytest.mark.parametrize("seed", [0, 42, 2**32 + 7, 2**63 - 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("plan_index", [0, 2, 2**31, 2**32 - 1])
def test_the_generator_is_the_references(seed: int, plan_index: int, draw_idx: int) -> None:
    case = drawing_case(flags=PHILOX, num_envs=2)
    draws = case.buffers.draws
    draws.seeds.copy_(torch.from_numpy(np.array([seed, 5], np.uint64).view(np.int64)))
    draws.plan_indices.copy_(torch.from_numpy(np.array([plan_index, 9], np.uint32).view(np.int32)))
    want = [philox_uniforms(s, i, 31, 6)[draw_idx] for s, i in ((seed, plan_index), (5, 9))]
    np.testing.assert_array_equal(generated(case, draw_idx).numpy(), np.stack(want))


def test_known_answers_of_the_generator() -> None:
    """The words of tests/test_philox.py."""
    case = drawing_case(flags=PHILOX, num_envs=2)
    case.buffers.draws.seeds.copy_(torch.tensor([0, 42]))
    case.buffers.draws.plan_indices.copy_(torch.tensor([0, 2]))
    assert generated(case, 0)[0, 0] == (0x6627E8D5 >> 8) / 2**24
    assert generated(case, 7)[1, 5] == (0x8434339E >> 8) / 2**24


@pytest.mark.parametrize("out_dim", DIMS)
def test_draws_of_the_generator(out_dim: int) -> None:
    case = drawing_case(flags=PHILOX)
    rows = rows_of(case, out_dim)
    x, step = make_logits(case, rows, std=0.2), case.plan.first_step + 3
    tokens, _ = check(case, x, step, out_dim, rows, PHILOX)
    assert len(tokens.unique()) > 2


# --- estimates ------------------------------------------------------------------------------------


@pytest.mark.parametrize("out_dim", [5, 6])
@pytest.mark.parametrize("estimate", ["mean", 0.1, 0.5, 0.9])
@pytest.mark.parametrize("vocab_size", [2, 22, 300])
def test_estimates(vocab_size: int, estimate: Any, out_dim: int) -> None:
    """Only this token's are written: of reward or value, and of this step."""
    case = drawing_case(vocab_size=vocab_size, estimate=estimate, num_envs=2, k_rew=1)
    step = case.plan.first_step + 2
    _, draws = check(case, make_logits(case, 6), step, out_dim, 6)
    written = ~draws.estimates.isnan()
    assert written[:, out_dim - 5, 2].all()
    assert written.sum() == 2 * 6


def test_estimates_are_of_raw_probabilities() -> None:
    """Truncation and the token drawn do not matter; the temperature does."""
    numbers = []
    for changes in ({}, {"k_rew": 1, "cdf_rew": 0.9}, {"temperature": 3.0}):
        case = drawing_case(**changes)
        _, draws = check(case, make_logits(case, 6), case.plan.first_step, 5, 6)
        numbers.append(draws.estimates[:, 0, 0])
    assert torch.equal(numbers[0], numbers[1])
    assert not torch.isclose(numbers[0], numbers[2]).any()


@pytest.mark.parametrize(("bin_", "before", "after"), [(0, -1, 0), (1, 0, 1), (21, 20, 21),
                                                     (22, -1, 0)])  # fmt: skip
def test_percentiles_wrap(bin_: int, before: int, after: int) -> None:
    """Nearly all mass is in one bin; the first one, and the stop token, wrap to both ends."""
    case = drawing_case(estimate=0.4)
    x = make_logits(case, 6)
    x[:, bin_] = 30.0
    _, draws = check(case, x, case.plan.first_step, 6, 6)
    edges = case.buffers.draws.thresholds[1]
    want = ((edges[before] + edges[after]) / 2).float()
    assert (draws.estimates[:, 1, 0] == want).all()


def test_probabilities_are_kept_only_if_wanted() -> None:
    case = drawing_case(flags=DrawFlags(given_uniforms=True, keep_probs=False))
    assert case.buffers.draws.probs.numel() == 0
    _, draws = check(case, make_logits(case, 6), case.plan.first_step, 5, 6, DrawFlags(True, False))
    assert draws.probs.numel() == 0


# --- the head -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, 6])
@pytest.mark.parametrize(
    ("embed_dim", "num_heads", "vocab_size", "precision"),
    [
        (11, 1, 8, "ieee"), (48, 3, 22, "ieee"), (72, 3, 150, "ieee"), (160, 5, 300, "ieee"),
        (48, 3, 22, "bf16 in float32"),
    ],
)  # fmt: skip
def test_logits(embed_dim: int, num_heads: int, vocab_size: int, precision: str, dim: int) -> None:
    """19 rows of 20: two tiles, the second one partial; the last row is nobody's."""
    sizes = {"embed_dim": embed_dim, "num_heads": num_heads, "vocab_size": vocab_size}
    case = make_case(precision=precision, **sizes)
    shape = case.shape
    h = torch.randn(20, shape.embed, generator=torch.Generator().manual_seed(1)) * 2 + 1
    h[:, embed_dim:] = 0
    got = torch.full((20, shape.ids), torch.nan)
    logits(h, got, case.weights, dim, 19, shape)

    def twin(dtype: torch.dtype) -> Tensor:
        out = torch.full(got.shape, torch.nan, dtype=dtype)
        twins.logits(h.to(dtype), out, case.twin(dtype), dim, 19, shape)
        return out[:19, : shape.num_ids]

    assert got[19].isnan().all()
    assert (got[:19, shape.num_ids :] == -torch.inf).all()
    plain = twin(torch.bfloat16 if shape.is_bf16 else torch.float32)
    assert_exact_enough(got[:19, : shape.num_ids], twin(torch.float64), plain)
