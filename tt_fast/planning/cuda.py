"""The GPU backend: whole plans in Triton kernels, one CUDA graph a plan.

The kernels are kernels/, installed as `tt_fast.kernels`. Under TRITON_INTERPRET=1 the same code
runs on the processor, slowly, for tests.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tt_fast.config import ModelConfig, PlanConfig
from tt_fast.discretizer import Discretizer, Tokens
from tt_fast.kernels.machine import MIN_CAPABILITY, is_interpreted
from tt_fast.model import TrajectoryTransformer
from tt_fast.planning.base import BeamPlan, Draws, ValueFn
from tt_fast.planning.cached import TorchBackend
from tt_fast.planning.fingerprint import fingerprint

if TYPE_CHECKING:
    from tt_fast.kernels.layout import ModelShape, PlanShape, Weights
    from tt_fast.kernels.sample import DrawFlags
    from tt_fast.planning.cuda_session import Session

#: Sizes of plans whose memory and graph are kept.
MAX_SESSIONS = 8
#: Offsets inside one layer's keys are 32-bit.
MAX_INDEX = 2**31 - 1
#: Wider rows would not fit registers, wider heads not shared memory.
MAX_EMBED_DIM, MAX_HEAD_DIM = 2048, 256


def why_unavailable(model: TrajectoryTransformer | None = None) -> str | None:
    """Why this machine cannot run the backend, or not with this model; None if it can.

    Args:
        model: the GPU that it is on is asked; the current one for a model elsewhere.
    """
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed (pip install 'tt_fast[cuda]')"
    if is_interpreted():
        return None
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    device = None if model is None else model.pos_emb.device
    on_gpu = device is not None and device.type == "cuda"
    capability = torch.cuda.get_device_capability(device if on_gpu else None)
    if capability < MIN_CAPABILITY:
        return f"the GPU has compute capability {capability}, and 8.0 is needed"
    return None if model is None else _why_too_wide(model.config)


def _why_too_wide(model: ModelConfig) -> str | None:
    """What its kernels could not hold; None if they can."""
    head_dim = model.embed_dim // model.num_heads
    if model.embed_dim > MAX_EMBED_DIM:
        return f"embed_dim is {model.embed_dim}, and at most {MAX_EMBED_DIM} is served"
    if head_dim > MAX_HEAD_DIM:
        return f"embed_dim / num_heads is {head_dim}, and at most {MAX_HEAD_DIM} is served"
    return None


def require_available(model: TrajectoryTransformer | None = None) -> None:
    """This machine can run the backend; `model` as in `why_unavailable`.

    Raises:
        ValueError: it cannot.
    """
    reason = why_unavailable(model)
    if reason is not None:
        raise ValueError(f'backend: expected a GPU for "cuda", {reason}; use "torch"')


def _device_of(model: TrajectoryTransformer) -> torch.device:
    """Where a model is planned: the GPU that it is on, else the current one."""
    if is_interpreted():
        return torch.device("cpu")
    device = model.pos_emb.device
    on_gpu = device.type == "cuda"
    return device if on_gpu else torch.device("cuda", torch.cuda.current_device())


class CudaBackend(TorchBackend):
    """Plans on a GPU; `search` is the torch backend's.

    Weights are packed on first use, and again after they have changed. The first plan of a size
    compiles, the second one is recorded as a CUDA graph.

    Args:
        model: on any device; one that is on no GPU is copied to the current one.
        discretizer: its thresholds turn probabilities into rewards; `search` needs none.
        tf32: round the inputs of float32 matrix products to tf32, which is faster, and no longer
            the reference's arithmetic.
        use_graphs: False launches kernels one by one, for debugging.

    Raises:
        ValueError: no GPU of compute capability 8.0 or more, no triton, or too wide a model.
    """

    name = "cuda"

    def __init__(
        self,
        model: TrajectoryTransformer,
        discretizer: Discretizer | None,
        *,
        tf32: bool = False,
        use_graphs: bool = True,
    ) -> None:
        require_available(model)
        super().__init__(model, discretizer)
        self.tf32 = tf32
        self.use_graphs = use_graphs and not is_interpreted()
        self.device = _device_of(model)
        self._weights: dict[str, Weights] = {}  # by precision
        self._versions: dict[str, tuple[Any, ...]] = {}
        self._sessions: OrderedDict[object, Session] = OrderedDict()

    @torch.inference_mode(False)  # memory of a first plan is written by later ones
    @torch.no_grad()
    def plan(
        self,
        contexts: Sequence[Tokens],
        config: PlanConfig,
        draws: Draws,
        *,
        trace: bool = False,
        value_fn: ValueFn | None = None,
        deadline_ms: float | None = None,
    ) -> BeamPlan:
        """See `PlanBackend.plan`; all contexts are planned at once, as far as memory goes."""
        assert self.discretizer is not None
        assert deadline_ms is None  # has_deadline is False
        from tt_fast.kernels.sample import DrawFlags
        from tt_fast.planning.cuda_memory import model_shape, plan_shape

        shape = model_shape(self.model.config, self._precision(config))
        sizes = plan_shape(self.model, config)
        waves = []
        on_gpu = self.device.type == "cuda"
        with torch.cuda.device(self.device) if on_gpu else contextlib.nullcontext():
            flags = DrawFlags(draws.given is not None, value_fn is not None)
            size = self._wave_size(shape, sizes, flags, len(contexts))
            for first in range(0, len(contexts), size):
                part = slice(first, min(first + size, len(contexts)))
                wave = contexts[part]
                given = None if draws.given is None else draws.given[part]
                session = self._session(shape, sizes, flags, len(wave))
                part_draws = Draws(draws.seeds[part], draws.plan_indices[part], given)
                waves.append(
                    session.run(
                        wave, config, self.discretizer, part_draws, trace=trace, value_fn=value_fn
                    )
                )
        return _concatenate(waves)

    def _session(
        self, shape: ModelShape, plan: PlanShape, flags: DrawFlags, num_envs: int
    ) -> Session:
        """The one for these sizes, made if need be; for memory, least recently used ones go."""
        from tt_fast.planning.cuda_memory import plan_bytes
        from tt_fast.planning.cuda_session import Session

        weights = self._current_weights(shape)
        key = (shape, plan, flags, num_envs)
        if key not in self._sessions:
            needed = plan_bytes(shape, plan, flags, num_envs)
            while self._sessions and needed > self._usable_bytes() - self._held_bytes():
                self._sessions.popitem(last=False)
            self._sessions[key] = Session(
                weights, shape, plan, flags, num_envs, use_graph=self.use_graphs
            )
        self._sessions.move_to_end(key)
        while len(self._sessions) > MAX_SESSIONS:
            self._sessions.popitem(last=False)
        return self._sessions[key]

    def _precision(self, config: PlanConfig) -> str:
        """Of matrix products, as kernels call it."""
        if config.dtype == "bfloat16":
            return "bf16 in float32" if is_interpreted() else "bf16"
        return "tf32" if self.tf32 else "ieee"

    def _current_weights(self, shape: ModelShape) -> Weights:
        """The model's weights as they are now; always in the same memory, which graphs read."""
        from tt_fast.planning.cuda_memory import pack_weights, refresh_weights

        precision = shape.precision
        version = fingerprint(self.model.parameters())
        if precision not in self._weights:
            self._weights[precision] = pack_weights(self.model, shape, self.device)
        elif self._versions[precision] != version:
            refresh_weights(self._weights[precision], self.model, shape)
        self._versions[precision] = version
        return self._weights[precision]

    def _wave_size(
        self, model: ModelShape, plan: PlanShape, flags: DrawFlags, num_envs: int
    ) -> int:
        """Contexts at once: waves of equal sizes, as few as memory and 32-bit offsets allow.

        Raises:
            ValueError: not even one.
        """
        from tt_fast.planning.cuda_memory import encoded_rows, kept_hidden, plan_bytes

        offsets = max(  # of one context: keys of a layer, tokens, hidden columns
            plan.num_levels * plan.level_nodes * model.width,
            plan.num_steps * plan.num_rows * model.transition_dim,
            max(encoded_rows(model, plan), plan.num_rows) * kept_hidden(model),
            # logits, probabilities of rewards and values, random numbers
            plan.num_rows * max(model.ids, 2 * model.num_ids, plan.num_draws),
        )
        needed = plan_bytes(model, plan, flags, 1)
        fitting = min(MAX_INDEX // offsets, self._usable_bytes() // needed)
        if fitting < 1:
            size = f"{needed / 1e9:.1f} GB"
            raise ValueError(
                f"beam_width: expected a search that fits the GPU, got one of {size}; "
                'use fewer beams, or backend="torch"'
            )
        num_waves = math.ceil(num_envs / int(fitting))
        return math.ceil(num_envs / num_waves)

    def _usable_bytes(self) -> int:
        """Memory for sessions, those that there are included."""
        if self.device.type != "cuda":
            return sys.maxsize
        free = torch.cuda.mem_get_info(self.device)[0] + self._held_bytes()
        # what torch keeps for later is as good as free
        free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return int(0.8 * free)

    def _held_bytes(self) -> int:
        """Memory of sessions that may be dropped or used again."""
        from tt_fast.planning.cuda_memory import plan_bytes

        return sum(
            plan_bytes(s.model, s.plan, s.flags, s.num_envs) for s in self._sessions.values()
        )


def _concatenate(plans: Sequence[BeamPlan]) -> BeamPlan:
    if len(plans) == 1:
        return plans[0]
    traces = [plan.trace for plan in plans if plan.trace is not None]
    return BeamPlan(
        np.concatenate([plan.tokens for plan in plans]),
        np.concatenate([plan.scores for plan in plans]),
        np.concatenate([plan.rewards for plan in plans]),
        np.concatenate([plan.values for plan in plans]),
        tuple(trace for part in traces for trace in part) if traces else None,
    )
