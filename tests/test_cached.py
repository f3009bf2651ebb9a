"""The cached decoder against the reference: the same tokens, whatever is cropped or shared."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ACTION_DIM, NUM_BINS, OBSERVATION_DIM, tiny_discretizer, tiny_model

from tt_fast import PlanConfig, beam_plan
from tt_fast.planning.cached import CachedDecoder, TorchBackend
from tt_fast.planning.reference import Decoder, last_logits

D = OBSERVATION_DIM + ACTION_DIM + 2

configs = st.builds(
    PlanConfig,
    horizon=st.integers(1, 5),
    beam_width=st.integers(1, 5),
    n_expand=st.integers(1, 3),
    max_context_transitions=st.sampled_from([2, 3, 4, 9, None]),
    k_obs=st.sampled_from([1, 3, None]),
    k_act=st.sampled_from([1, 3, None]),
    k_rew=st.sampled_from([1, 3, None]),
    cdf_act=st.sampled_from([0.6, None]),
    cdf_obs=st.sampled_from([0.3, None]),
    estimate=st.sampled_from(["mean", 0.7]),
    temperature=st.sampled_from([1.0, 0.5]),
)


@settings(max_examples=60)
@given(configs, st.integers(0, 6), st.integers(0, 2**32))
def test_plans_equal_the_reference(config: PlanConfig, past: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    context = rng.integers(0, NUM_BINS + 1, (1, past * D + OBSERVATION_DIM))  # stop tokens too
    model, discretizer = tiny_model(seed % 5), tiny_discretizer()
    want, got = (
        beam_plan(model, discretizer, context, config, backend=backend, seed=seed, trace=True)
        for backend in ("reference", "torch")
    )
    assert want.trace is not None
    assert got.trace is not None
    for a, b in zip(want.trace[0].drawn, got.trace[0].drawn, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(want.trace[0].parents, got.trace[0].parents)
    np.testing.assert_array_equal(want.tokens, got.tokens)
    # some 100 float32 roundings of logits of size 10, then expectations over bins of width 5
    np.testing.assert_allclose(want.scores, got.scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("max_len", [2 * D - 1, 4 * D - 1])
def test_logits_equal_a_full_pass_at_every_step(max_len: int) -> None:
    """Through expand, keep and the crop; rows that were equal part, and some meet again."""
    model, rng = tiny_model(), np.random.default_rng(0)
    decoder = CachedDecoder(model, max_len)
    decoder.begin(torch.from_numpy(rng.integers(0, NUM_BINS, D + OBSERVATION_DIM)), 3)
    with torch.no_grad():
        for _ in range(4):
            decoder.expand(2)
            for width in [6] * (ACTION_DIM + 2) + [3] * OBSERVATION_DIM:
                if len(decoder.x) > width:
                    decoder.keep(torch.from_numpy(rng.integers(0, 6, width)))
                want = last_logits(model, decoder.x, max_len)
                torch.testing.assert_close(decoder.logits(), want, rtol=1e-5, atol=1e-5)
                decoder.append(torch.from_numpy(rng.integers(0, 2, width)))


class _CountingDecoder(CachedDecoder):
    """Counts the rows that matrix products run on."""

    rows = 0

    def _embed(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        self.rows += len(tokens)
        return super()._embed(tokens, positions)


def test_equal_prefixes_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A greedy plan of many beams costs what one beam costs."""
    decoders: list[_CountingDecoder] = []

    def make_decoder(_: Any, model: Any, max_len: int) -> Decoder:
        decoders.append(_CountingDecoder(model, max_len))
        return decoders[-1]

    monkeypatch.setattr(TorchBackend, "make_decoder", make_decoder)
    model, context = tiny_model(), np.zeros((1, D + OBSERVATION_DIM), np.int64)
    for beam_width in (1, 8):
        config = PlanConfig(5, beam_width, 2, max_context_transitions=3, k_act=1, cdf_act=None)
        beam_plan(model, tiny_discretizer(), context, config, backend="torch")
    assert decoders[0].rows == decoders[1].rows > 0
