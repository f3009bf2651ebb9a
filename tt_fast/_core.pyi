"""The C++ core of csrc/. Private: use `tt_fast.planning` and `tt_fast.training`."""

from collections.abc import Callable, Sequence
from typing import Any, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

@final
class Model:
    """Packed weights."""

    def __init__(
        self,
        *,
        observation_dim: int,
        action_dim: int,
        vocab_size: int,
        num_transitions: int,
        num_layers: int,
        num_heads: int,
        embed_dim: int,
        goal_len: int,
        weights: dict[str, NDArray[np.float32]],
        dtype: str,
        isa: str,
    ) -> None: ...
    @property
    def isa(self) -> str: ...

@final
class BeamSearch:
    """A planner; calls from several threads wait for each other."""

    def __init__(
        self, model: Model, hidden: NDArray[np.uint8], num_threads: int, max_bytes: float
    ) -> None: ...
    def plan(
        self,
        contexts: Sequence[NDArray[np.int64]],
        *,
        horizon: int,
        beam_width: int,
        n_expand: int,
        discount: float,
        max_len: int,
        temperature: float,
        k_obs: int | None,
        k_act: int | None,
        k_rew: int | None,
        cdf_obs: float | None,
        cdf_act: float | None,
        cdf_rew: float | None,
        percentile: float | None,
        thresholds: NDArray[np.float64],
        seeds: Sequence[int],
        plan_indices: Sequence[int],
        uniforms: NDArray[np.float64] | None,
        trace: bool,
        value_fn: Callable[[NDArray[np.float32]], tuple[ArrayLike, ArrayLike]] | None,
        deadline_seconds: float | None,
    ) -> list[dict[str, Any]]: ...
    def search(
        self,
        context: NDArray[np.int64],
        *,
        num_tokens: int,
        beam_width: int,
        goal: NDArray[np.int64] | None,
        top_k: int | None,
        cdf: float | None,
        temperature: float,
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]: ...
    def logits(
        self, context: NDArray[np.int64], goal: NDArray[np.int64] | None
    ) -> NDArray[np.float32]: ...
    def stats(self) -> dict[str, Any]: ...
    def reset_stats(self) -> None: ...
    @property
    def num_threads(self) -> int: ...

def isas() -> list[str]: ...
def gemm(
    x: NDArray[np.float32],
    weight: NDArray[np.float32],
    bias: NDArray[np.float32],
    dtype: str,
    isa: str,
) -> NDArray[np.float32]: ...
def gelu(x: NDArray[np.float32], isa: str) -> NDArray[np.float32]: ...
def softmax(x: NDArray[np.float32], isa: str) -> NDArray[np.float32]: ...
def layer_norm(
    x: NDArray[np.float32], gamma: NDArray[np.float32], beta: NDArray[np.float32], isa: str
) -> NDArray[np.float32]: ...
def attend(
    q: NDArray[np.float32],
    k: NDArray[np.float32],
    v: NDArray[np.float32],
    hidden: int,
    dtype: str,
    isa: str,
) -> NDArray[np.float32]: ...

MAX_TRAIN_LEN: int
MAX_TRAIN_HEAD_DIM: int

def train_attention(
    qkv: NDArray[np.float32] | NDArray[np.int16],
    hidden: NDArray[np.bool_] | NDArray[np.uint8],
    keep: NDArray[np.uint8] | None,
    keep_scale: float,
    isa: str,
) -> tuple[NDArray[Any], NDArray[np.float32]]: ...
def train_attention_grad(
    qkv: NDArray[np.float32] | NDArray[np.int16],
    hidden: NDArray[np.bool_] | NDArray[np.uint8],
    keep: NDArray[np.uint8] | None,
    keep_scale: float,
    stats: NDArray[np.float32],
    out_grad: NDArray[np.float32] | NDArray[np.int16],
    isa: str,
) -> NDArray[Any]: ...
def train_gelu(x: NDArray[np.float32] | NDArray[np.int16], isa: str) -> NDArray[Any]: ...
def train_gelu_grad(
    x: NDArray[np.float32] | NDArray[np.int16],
    out_grad: NDArray[np.float32] | NDArray[np.int16],
    isa: str,
) -> NDArray[Any]: ...
def train_norm(
    x: NDArray[np.float32],
    y: NDArray[np.float32] | NDArray[np.int16],
    keep: NDArray[np.uint8] | None,
    keep_scale: float,
    gamma: NDArray[np.float32],
    beta: NDArray[np.float32],
    eps: float,
    isa: str,
) -> tuple[NDArray[np.float32], NDArray[Any], NDArray[np.float32]]: ...
def train_norm_grad(
    sum: NDArray[np.float32],
    stats: NDArray[np.float32],
    keep: NDArray[np.uint8] | None,
    keep_scale: float,
    gamma: NDArray[np.float32],
    sum_grad: NDArray[np.float32],
    normed_grad: NDArray[np.float32] | NDArray[np.int16],
    isa: str,
) -> tuple[NDArray[np.float32], NDArray[Any], NDArray[np.float32], NDArray[np.float32]]: ...
def draw_keep(
    state: NDArray[np.uint64], first_step: int, first_kept: int, size: int, isa: str
) -> NDArray[np.uint8]: ...
def peak_gflops(dtype: str, num_threads: int, seconds: float, isa: str) -> float: ...
