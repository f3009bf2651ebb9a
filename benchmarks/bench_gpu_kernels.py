"""Each kernel alone, in memory of a plan that was checked: `bench_gpu_kernels.py --out FOLDER`.

Times are the device's: many launches in a CUDA graph. Of dense kernels the numbers are compared
with torch's in float64 first; what the others compute, the plan shows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from bench_gpu import Clock, release, run_part
from gpu_common import (
    DTYPES,
    Dtype,
    Table,
    WrongAnswer,
    check_plans,
    config_of,
    cuda_backend,
    device_ms,
    gpu_case,
    make_row,
    plan_all,
    sizes,
    tasks,
)
from torch import Tensor
from torch.nn import functional as F

from tt_fast.kernels.decode_attention import decode_attention
from tt_fast.kernels.layer_norm_qkv import layer_norm_qkv
from tt_fast.kernels.layerwise import run_layerwise
from tt_fast.kernels.mlp import mlp
from tt_fast.kernels.prefill import Scratch, prefill, tree_attention
from tt_fast.kernels.sample import logits, sample
from tt_fast.kernels.segment import (
    Segment,
    action_segment,
    context_segment,
    fits_segment,
    observation_segment,
    run_segment,
)
from tt_fast.kernels.select import advance, rank
from tt_fast.planning.cuda import is_interpreted
from tt_fast.planning.cuda_session import Session

#: Error allowed of a dense kernel, a share of the largest number.
RELATIVE: dict[Dtype, float] = {"bf16": 2e-2, "tf32": 5e-3, "fp32": 1e-5}


@dataclass(frozen=True)
class Bench:
    """A session that has planned, and activations of a token of all its candidates."""

    session: Session
    scratch: Scratch
    logits: Tensor
    one: Tensor
    """(1,) int32: 1"""

    @property
    def rows(self) -> int:
        """Candidates of all environments."""
        return self.session.num_envs * self.session.plan.num_rows


def make_bench(dtype: Dtype, num_envs: int) -> Bench:
    """Of the first model at the first setting; its plan is checked."""
    case, config = gpu_case(tasks()[0], num_envs), config_of(sizes().settings[0], dtype)
    backend = cuda_backend(case, dtype)
    check_plans(backend, case, config, dtype)
    plan_all(backend, case, config, 0)
    (session,) = backend._sessions.values()
    model, rows = session.model, num_envs * session.plan.num_rows
    generator = torch.Generator().manual_seed(0)

    def random(width: int) -> Tensor:
        return torch.randn(rows, width, generator=generator).to(session.device)

    nodes = torch.full((rows,), -1, dtype=torch.int32, device=session.device)
    widths = (model.embed, model.width, model.width, model.hidden)
    scratch = Scratch(*map(random, widths), nodes)
    scratch.h[:, model.embed_dim :] = 0.0
    one = torch.ones(1, dtype=torch.int32, device=session.device)
    out = torch.zeros(rows, model.ids, device=session.device)
    return Bench(session, scratch, out, one)


# ---- answers of dense kernels ----


def check_dense(bench: Bench, dtype: Dtype) -> None:
    """Queries of the first layer, its second half, and logits.

    Raises:
        WrongAnswer: else.
    """
    session, (h, _, attended, hidden, node) = bench.session, bench.scratch
    model, w = session.model, session.weights
    q, after = torch.zeros_like(attended), h.clone()
    layer_norm_qkv(h, node, q, session.buffers.trees[0], w, 0, bench.one, bench.rows, model)
    _compare(
        "layer_norm_qkv",
        q,
        normed(h, w.norms[0, :2]) @ w.qkv[0, 0].double() + w.qkv_bias[0, 0],
        dtype,
    )
    mlp(after, attended, hidden, w, 0, bench.one, bench.rows, model)
    _compare("mlp", after, second_half(bench), dtype)
    logits(h, bench.logits, w, 0, bench.rows, model)
    want = normed(h, w.last_norm) @ w.head[0].double()
    _compare("logits", bench.logits[:, : model.num_ids], want[:, : model.num_ids], dtype)


def second_half(bench: Bench) -> Tensor:
    """A block after its attention, of the first layer, in float64."""
    w, (h, _, attended, _, _) = bench.session.weights, bench.scratch
    x = h.double() + attended.double() @ w.proj[0].double() + w.out_bias[0, 0]
    hidden = F.gelu(normed(x, w.norms[0, 2:]) @ w.up[0].double() + w.up_bias[0])
    out: Tensor = x + hidden @ w.down[0].double() + w.out_bias[0, 1]
    return out


def normed(h: Tensor, gamma_beta: Tensor) -> Tensor:
    """LayerNorm in float64; no width is padded in the models that are measured."""
    gamma, beta = gamma_beta.reshape(2, -1).double()
    return F.layer_norm(h.double(), h.shape[-1:], gamma, beta)


def _compare(what: str, got: Tensor, want: Tensor, dtype: Dtype) -> None:
    error = float((got.double() - want).abs().max() / want.abs().max())
    if not error <= RELATIVE[dtype]:
        raise WrongAnswer(
            f"{what} {dtype}: expected an error up to {RELATIVE[dtype]}, got {error:.2g}"
        )


# ---- launches ----


def launches(bench: Bench) -> dict[str, Callable[[], None]]:
    """Every launcher by name, in the middle of the plan's sequence."""
    return {**row_launches(bench), **plan_launches(bench), **segment_launches(bench)}


def row_launches(bench: Bench) -> dict[str, Callable[[], None]]:
    """A token of all candidates."""
    s, (h, q, attended, hidden, node) = bench.session, bench.scratch
    tree, draws, step = s.buffers.trees[0], s.buffers.draws, s.plan.first_step
    rows, dim = s.plan.num_rows, s.model.observation_dim
    changed = h.clone()

    def attend() -> None:
        decode_attention(
            q, attended, tree, 0, step, dim, s.num_envs, rows, s.machine, s.model, s.plan
        )

    def draw() -> None:
        sample(bench.logits, tree, draws, step, dim + 1, s.num_envs, rows, s.model, s.plan, s.flags)

    return {
        "layer_norm_qkv": lambda: layer_norm_qkv(
            h, node, q, tree, s.weights, 0, bench.one, bench.rows, s.model
        ),
        "decode_attention": attend,
        "mlp": lambda: mlp(changed, attended, hidden, s.weights, 0, bench.one, bench.rows, s.model),
        "logits": lambda: logits(h, bench.logits, s.weights, dim, bench.rows, s.model),
        "sample": draw,
    }


def plan_launches(bench: Bench) -> dict[str, Callable[[], None]]:
    """The plan's last selection, and the windows that would be encoded anew after it."""
    s = bench.session
    horizon, last = s.plan.horizon, s.plan.num_steps - 1
    scores, nodes = s.buffers.scores, s.buffers.nodes
    tree, other = s.buffers.trees[(horizon - 1) % 2], s.buffers.trees[horizon % 2]
    found = s.buffers.counts[horizon, :1].clone()
    count = torch.zeros_like(found)

    def select() -> None:
        count.zero_()
        advance(scores, tree, other, nodes, count, last, s.num_envs, s.plan)

    def encode() -> None:
        prefill(
            nodes, found, other, s.weights, last + 1, s.num_envs, s.machine, s.model, s.plan,
            s.buffers.scratch,
        )  # fmt: skip

    def attend() -> None:
        rows = len(nodes) * s.model.visible
        _, q, out, _, _ = (buffer[:rows] for buffer in s.buffers.scratch)
        tree_attention(nodes, found, q, out, other, 0, last + 1, s.num_envs, s.model, s.plan)

    ranked = {
        "rank": lambda: rank(scores, s.buffers.draws.estimates, horizon - 1, s.num_envs, s.plan)
    }
    encoded = {"prefill, all layers": encode, "tree_attention": attend}
    return {**ranked, "advance": select, **(encoded if len(nodes) else {})}


def segment_launches(bench: Bench) -> dict[str, Callable[[], None]]:
    """All layers of several tokens."""
    s, step = bench.session, bench.session.plan.first_step
    tree = s.buffers.trees[0]
    newest = s.buffers.newest

    def launch(segment: Segment, at: int, rows: int) -> Callable[[], None]:
        shared = (s.weights, tree, s.buffers.draws, at, s.num_envs, rows, s.machine)
        if fits_segment(s.model):
            return lambda: run_segment(segment, *shared, s.model, s.plan, s.flags)
        return lambda: run_layerwise(segment, *shared, newest, s.model, s.plan, s.flags)

    return {
        "segment, context": launch(context_segment(s.model), step, 1),
        "segment, action": launch(action_segment(s.model), step, s.plan.num_rows),
        "segment, observation": launch(observation_segment(s.model), step + 1, s.plan.num_beams),
    }


def kernels(table: Table, clock: Clock, folder: Path) -> None:
    """One environment and many, in each precision."""
    many = () if is_interpreted() else (64,)
    for num_envs in (1, *many):
        for dtype in DTYPES:
            if clock.left == 0.0:
                print(f"  left out: {dtype}, {num_envs} envs", flush=True)
                continue
            add_kernels(table, dtype, num_envs)


def add_kernels(table: Table, dtype: Dtype, num_envs: int) -> None:
    """A row a launcher."""
    release()
    bench = make_bench(dtype, num_envs)
    check_dense(bench, dtype)
    setting, shape = sizes().settings[0], f"{bench.rows} candidates"
    for name, run in launches(bench).items():
        names = {"dtype": dtype, "engine": "triton", "setting": setting, "shape": shape}
        table.add(make_row(name, device_ms(run), num_envs=num_envs, **names))


def main(arguments: list[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    parser.add_argument("--seconds", type=float, default=600.0, help="after them no row begins")
    options = parser.parse_args(arguments)
    return run_part("kernels", kernels, options.out, options.seconds)


if __name__ == "__main__":
    sys.exit(main())
