"""One plan after another with the same sizes: the order of launches, captured as a CUDA graph."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tt_fast.config import PlanConfig
from tt_fast.discretizer import Discretizer, Tokens
from tt_fast.kernels.layerwise import run_layerwise
from tt_fast.kernels.layout import Machine, ModelShape, PlanShape, Tree, Weights
from tt_fast.kernels.prefill import prefill
from tt_fast.kernels.sample import DrawFlags
from tt_fast.kernels.segment import (
    Segment,
    action_segment,
    context_segment,
    fits_segment,
    observation_segment,
    run_segment,
)
from tt_fast.kernels.select import advance, rank
from tt_fast.planning.base import BeamPlan, Draws, PlanTrace, ValueFn
from tt_fast.planning.cuda_memory import make_buffers
from tt_fast.planning.sampling import require_finite_logits
from tt_fast.validate import require

#: Torch records one graph at a time in a process.
_ONE_RECORDING = threading.Lock()


@dataclass(frozen=True)
class Outputs:
    """Of the best beam of each context, on the device."""

    tokens: Tensor
    """(num_envs, horizon, transition_dim) int32"""
    estimates: Tensor
    """(num_envs, 2: reward and value, horizon) float32"""
    scores: Tensor
    """(num_envs,) float64"""


class Session:
    """Plans for `num_envs` contexts at a time, in memory of its own.

    Args:
        weights: of the model, on the device.
        model: sizes.
        plan: sizes.
        flags: compile-time choices of draws.
        num_envs: contexts of a call.
        use_graph: record the launches of the second plan, and replay them from then on.
    """

    def __init__(
        self,
        weights: Weights,
        model: ModelShape,
        plan: PlanShape,
        flags: DrawFlags,
        num_envs: int,
        *,
        use_graph: bool,
    ) -> None:
        self.weights, self.model, self.plan, self.flags = weights, model, plan, flags
        self.num_envs, self.use_graph = num_envs, use_graph
        self.device = weights.token.device
        self.buffers = make_buffers(model, plan, flags, num_envs, self.device)
        self.machine = _machine(self.device, model)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._outputs: Outputs | None = None

    def run(
        self,
        contexts: Sequence[Tokens],
        config: PlanConfig,
        discretizer: Discretizer,
        draws: Draws,
        *,
        trace: bool,
        value_fn: ValueFn | None,
    ) -> BeamPlan:
        """Plan from `num_envs` contexts; see `PlanBackend.plan`.

        Raises:
            ValueError: logits are not finite.
        """
        self._load_contexts(contexts)
        self._load_settings(config, discretizer)
        self._load_draws(draws)
        outputs = self._launch(value_fn)
        self._require_finite_logits()
        estimates = _download(outputs.estimates)
        return BeamPlan(
            _download(outputs.tokens).astype(np.int64),
            _download(outputs.scores),
            estimates[:, 0],
            estimates[:, 1],
            self._traces(contexts) if trace else None,
        )

    # ---- inputs ----

    def _load_contexts(self, contexts: Sequence[Tokens]) -> None:
        """Tokens of past transitions and current observations, and which transitions to encode."""
        plan, dim = self.plan, self.model.transition_dim
        tokens = np.zeros((self.num_envs, plan.first_step + 1, dim), np.int32)
        past, nodes = [], []
        for env, context in enumerate(contexts):
            count = min(len(context) // dim, plan.first_step, plan.max_past)
            newest = context[len(context) - count * dim - self.model.observation_dim :]
            first = plan.first_step - count
            tokens[env, first:].reshape(-1)[: len(newest)] = newest
            past.append(count)
            steps = env * plan.num_steps + np.arange(first, plan.first_step)
            nodes += list(steps * plan.num_beams)
        tree = self.buffers.trees[0]
        self._upload(tree.past, past)
        placed = tree.tokens[:, : plan.first_step + 1]
        # once over the bus, to every row on the device
        placed.copy_(torch.from_numpy(tokens).to(self.device)[:, :, None])
        tree.slots.zero_()
        tree.origins.zero_()
        self.buffers.counts.zero_()
        self._upload(self.buffers.counts[0, :1], [len(nodes)])
        if nodes:
            self._upload(self.buffers.context_nodes[: len(nodes)], nodes)

    def _load_settings(self, config: PlanConfig, discretizer: Discretizer) -> None:
        assert config.discount is not None  # `beam_plan` and `Planner` fill it in
        cdfs = [-1.0 if c is None else c for c in (config.cdf_obs, config.cdf_act, config.cdf_rew)]
        top_ks = [float(k or 0) for k in (config.k_obs, config.k_act, config.k_rew)]
        percentile = -1.0 if isinstance(config.estimate, str) else config.estimate
        buffers = self.buffers
        self._upload(buffers.draws.settings, [*cdfs, *top_ks, config.temperature, percentile])
        self._upload(buffers.draws.thresholds, discretizer.thresholds[:, -2:].T)
        discounts = np.full(self.plan.horizon, config.discount)
        self._upload(buffers.scores.factors, np.cumprod([1.0, *discounts]))

    def _load_draws(self, draws: Draws) -> None:
        to = self.buffers.draws
        to.broken.zero_()
        self._upload(to.seeds, np.array([s % 2**64 for s in draws.seeds], np.uint64).view(np.int64))
        indices = np.array([i % 2**32 for i in draws.plan_indices], np.uint32)
        self._upload(to.plan_indices, indices.view(np.int32))
        if draws.given is not None:
            self._upload(to.uniforms, draws.given.reshape(to.uniforms.shape))

    def _upload(self, to: Tensor, numbers: object) -> None:
        to.copy_(torch.as_tensor(np.ascontiguousarray(numbers)))

    # ---- launches ----

    def _launch(self, value_fn: ValueFn | None) -> Outputs:
        """The first plan compiles kernels; the second one is recorded; later ones are replayed."""
        if value_fn is not None or not self.use_graph:
            return self._enqueue(value_fn)
        if self._outputs is None:
            self._outputs = self._enqueue(None)
            return self._outputs
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            # a stream of this device, for torch's own is of the first one that ever recorded;
            # other threads may go on working, but not record as well
            recording = torch.cuda.graph(
                graph, stream=torch.cuda.Stream(self.device), capture_error_mode="thread_local"
            )
            with _ONE_RECORDING, recording:
                outputs = self._enqueue(None)
            self._graph, self._outputs = graph, outputs  # only when it is whole
        self._graph.replay()
        return self._outputs

    def _enqueue(self, value_fn: ValueFn | None) -> Outputs:
        """All launches of one plan; no wait but for a value_fn."""
        plan, model, buffers = self.plan, self.model, self.buffers
        tree, other = buffers.trees
        if plan.first_step > 0:
            self._prefill(buffers.context_nodes, 0, tree, plan.first_step)
        self._segment(context_segment(model), tree, plan.first_step, 1)
        for t in range(plan.horizon):
            step = plan.first_step + t
            self._segment(action_segment(model), tree, step, plan.num_rows)
            if value_fn is not None:
                self._call_value_fn(value_fn, t)
            rank(buffers.scores, buffers.draws.estimates, t, self.num_envs, plan)
            advance(
                buffers.scores, tree, other, buffers.nodes, buffers.counts[t + 1, :1],
                step, self.num_envs, plan,
            )  # fmt: skip
            tree, other = other, tree
            if t == plan.horizon - 1:
                break
            if plan.crops:
                self._prefill(buffers.nodes, t + 1, tree, step + 1)
            self._segment(observation_segment(model), tree, step + 1, plan.num_beams)
        return self._best(tree)

    def _prefill(self, nodes: Tensor, count_idx: int, tree: Tree, current: int) -> None:
        count = self.buffers.counts[count_idx, :1]
        prefill(
            nodes, count, tree, self.weights, current, self.num_envs, self.machine, self.model,
            self.plan, self.buffers.scratch,
        )  # fmt: skip

    def _segment(self, segment: Segment, tree: Tree, step: int, rows_per_env: int) -> None:
        draws = self.buffers.draws
        if fits_segment(self.model):
            run_segment(
                segment, self.weights, tree, draws, step, self.num_envs, rows_per_env,
                self.machine, self.model, self.plan, self.flags,
            )  # fmt: skip
        else:
            run_layerwise(
                segment, self.weights, tree, draws, step, self.num_envs, rows_per_env,
                self.machine, self.buffers.newest, self.model, self.plan, self.flags,
            )  # fmt: skip

    def _call_value_fn(self, value_fn: ValueFn, t: int) -> None:
        """Its numbers replace the estimates of planned step t."""
        self._require_finite_logits()
        draws = self.buffers.draws
        probs = _download(draws.probs).reshape(self.num_envs, self.plan.num_rows, 2, -1)
        for env in range(self.num_envs):
            pair = _check_pair(value_fn(probs[env]), self.plan.num_rows)
            self._upload(draws.estimates[env, :, t], np.stack(pair))

    # ---- outputs ----

    def _require_finite_logits(self) -> None:
        """Of all draws so far; waits for the device."""
        require_finite_logits(not _download(self.buffers.draws.broken).any())

    def _best(self, tree: Tree) -> Outputs:
        """Of the first beam, whose origins say where its tokens and estimates are."""
        plan, draws = self.plan, self.buffers.draws
        origins = tree.origins[:, plan.first_step :, 0].long()
        tokens = tree.tokens[:, plan.first_step :]
        index = origins[:, :, None, None].expand(-1, -1, 1, tokens.shape[-1])
        columns = origins[:, None, :, None].expand(-1, 2, -1, 1)
        best = self.buffers.scores.parents[:, -1, :1].long()
        return Outputs(
            tokens.gather(2, index)[:, :, 0],
            draws.estimates.gather(3, columns)[..., 0],
            self.buffers.scores.scores[:, -1].gather(1, best)[:, 0],
        )

    def _traces(self, contexts: Sequence[Tokens]) -> tuple[PlanTrace, ...]:
        """Everything the last plan decided."""
        plan, scores = self.plan, self.buffers.scores
        tree = self.buffers.trees[plan.horizon % 2]
        tokens = _download(tree.tokens[:, plan.first_step :]).astype(np.int64)
        origins = _download(tree.origins[:, plan.first_step :])
        estimates = _download(self.buffers.draws.estimates)
        all_scores, parents = _download(scores.scores), _download(scores.parents)
        traces = []
        for env, context in enumerate(contexts):
            past = context[: len(context) - self.model.observation_dim]
            beams = np.take_along_axis(tokens[env], origins[env][:, :, None], axis=1)
            planned = beams.transpose(1, 0, 2).reshape(plan.num_beams, -1)
            traces.append(
                PlanTrace(
                    tuple(self._drawn(tokens[env])),
                    estimates[env, 0],
                    estimates[env, 1],
                    all_scores[env],
                    parents[env].astype(np.int64),
                    np.concatenate([np.tile(past, (plan.num_beams, 1)), planned], axis=1),
                )
            )
        return tuple(traces)

    def _drawn(self, tokens: NDArray[np.int64]) -> list[Tokens]:
        """Draws in order, from tokens (horizon, num_rows, transition_dim)."""
        observation_dim, drawn = self.model.observation_dim, []
        for t in range(self.plan.horizon):
            drawn += list(tokens[t, :, observation_dim:].T)
            if t + 1 < self.plan.horizon:
                drawn += list(tokens[t + 1, : self.plan.num_beams, :observation_dim].T)
        return drawn


def _check_pair(pair: Any, num_rows: int) -> list[NDArray[np.float32]]:
    """Rewards and values that a value_fn returned.

    Raises:
        ValueError: no pair of (num_rows,) finite numbers.
    """
    expected = f"a pair of arrays of shape ({num_rows},)"
    require(isinstance(pair, (tuple, list)) and len(pair) == 2, "value_fn", expected, pair)
    arrays = [np.asarray(numbers, np.float32) for numbers in pair]
    for array in arrays:
        require(array.shape == (num_rows,), "value_fn", expected, f"shape {array.shape}")
        require(bool(np.isfinite(array).all()), "value_fn", "finite numbers", "NaN or Inf")
    return arrays


def _download(tensor: Tensor) -> NDArray[Any]:
    """A copy on the host, in memory of its own."""
    return tensor.to("cpu", copy=True).numpy()


def gpu_machine(num_programs: int, model: ModelShape) -> Machine:
    """A GPU with so many multiprocessors."""
    # a larger tile of float32 does not fit registers
    row_tile = 64 if model.is_bf16 and model.embed <= 128 else 16
    return Machine(num_programs=num_programs, key_tile=4096, row_tile=row_tile)


def _machine(device: torch.device, model: ModelShape) -> Machine:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return gpu_machine(properties.multi_processor_count, model)
    # the interpreter runs programs one after another: large ones cost least there
    return Machine(num_programs=1, key_tile=65536, row_tile=512)
