"""Gradients of one optimiser step: over passes, threads and the processes of a job.

A step's windows are split into passes, numbered through the whole step; worker r of n takes passes
r, r + n, ... Dropout is addressed by (seed, step, pass). So a job of several processes computes
what one process does with the same `pass_windows`, up to the order of additions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tt_fast.config import TOKEN_KINDS, TrainConfig
from tt_fast.data.windows import TokenWindows
from tt_fast.model import TrajectoryTransformer
from tt_fast.training import fused_loss
from tt_fast.training.losses import model_batch
from tt_fast.training.passes import Batch, ParallelPasses, add_gradients, even_passes
from tt_fast.training.workers import Workers
from tt_fast.validate import require

_NUM_KINDS = len(TOKEN_KINDS)


class StepResult(NamedTuple):
    """What a step saw, over all workers."""

    loss: float
    """Weighted, masked, over all tokens; nats"""
    losses: dict[str, float]
    """Unweighted mean per kind of token; nats"""
    tokens: int
    """Targets, stop tokens not counted"""
    gradient_norm: float
    """Before clipping"""


class StepGradients:
    """Sets a model's gradients, step by step.

    Args:
        model: in training mode.
        config: of the training.
        windows: where batches are gathered, on the model's device.
        workers: this process among those of the job.
    """

    def __init__(
        self,
        model: TrajectoryTransformer,
        config: TrainConfig,
        windows: TokenWindows,
        workers: Workers,
    ) -> None:
        self._model, self._config, self._windows, self._workers = model, config, windows, workers
        on_cpu = model.pos_emb.device.type == "cpu"
        self._passes = ParallelPasses(model, torch.get_num_threads()) if on_cpu else None
        self._pass_windows = config.pass_windows or _pass_windows(model, config, windows, workers)
        several = self._pass_windows * workers.count < config.batch_size
        self._token_losses = _token_losses(model, config, several)
        self._kinds = model.target_kinds(windows.window_len)

    def run(self, window_ids: Tensor, step: int) -> StepResult:
        """Set the model's gradients, clipped, to those of a batch.

        Args:
            window_ids: (batch,) int64, the same on every worker.
            step: number of the step, an address of its dropout.

        Raises:
            WorkerLostError: another process of the job has ended.
        """
        model, workers = self._model, self._workers
        passes = list(enumerate(window_ids.split(self._pass_windows)))[
            workers.rank :: workers.count
        ]
        batches = [Batch(*model_batch(model, self._windows, ids)) for _, ids in passes]
        addresses = [(self._config.seed, step, pass_idx) for pass_idx, _ in passes]
        losses = self._backward(batches, addresses, len(window_ids))
        counts = self._counts(batches, losses, len(window_ids))
        if workers.count > 1:  # as numbers: what has died shows there, and not in a wait for a GPU
            counts = torch.tensor(workers.total(*counts.tolist()), dtype=counts.dtype)
        self._sum_gradients()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), self._config.grad_clip)
        # all that the loop wants to know in one transfer: it waits for a GPU here
        loss, tokens, gradient_norm, *kinds = torch.cat(
            [counts[:2], norm.to(counts)[None], counts[2:]]
        ).tolist()
        means = [
            total / max(1.0, count)
            for total, count in zip(kinds[:_NUM_KINDS], kinds[_NUM_KINDS:], strict=True)
        ]
        by_kind = dict(zip(TOKEN_KINDS, means, strict=True))
        return StepResult(loss, by_kind, int(tokens), gradient_norm)

    def close(self) -> None:
        """End the threads."""
        if self._passes is not None:
            self._passes.close()

    def _backward(
        self, batches: list[Batch], addresses: Sequence[tuple[int, ...]], num_windows: int
    ) -> list[Tensor]:
        """This worker's part of the gradients; the losses of each batch's tokens, (B, T)."""
        bfloat16 = self._config.precision == "bfloat16"
        if self._passes is not None:
            return self._passes.backward(
                batches, addresses=addresses, num_windows=num_windows, bfloat16=bfloat16
            )
        model, found = self._model, []
        model.zero_grad(set_to_none=True)
        for batch, address in zip(batches, addresses, strict=True):
            seed_device(model.pos_emb.device, _address_seed(address))
            with torch.autocast(model.pos_emb.device.type, torch.bfloat16, enabled=bfloat16):
                losses = self._token_losses(batch.inputs, batch.targets, batch.goal)
            # a recorded graph writes the next pass's losses over these
            found.append(add_gradients(model, losses, batch.mask, num_windows).clone())
        return found

    def _counts(self, batches: list[Batch], losses: list[Tensor], num_windows: int) -> Tensor:
        """(2 + 2 kinds,), which add up over workers: loss, tokens, sums and counts."""
        model, device = self._model, self._model.pos_emb.device
        # Apple's GPUs know no float64
        dtype = torch.float32 if device.type == "mps" else torch.float64
        totals = torch.zeros(2 + 2 * _NUM_KINDS, dtype=dtype, device=device)
        for batch, found in zip(batches, losses, strict=True):
            share = len(batch.inputs) / num_windows
            totals[0] += share * model.weighted_loss(found, batch.mask)
            totals[1] += (batch.targets != model.config.vocab_size).sum()
            sums, counts = (found * batch.mask).sum(0), batch.mask.sum(0)
            totals[2 : 2 + _NUM_KINDS].index_add_(0, self._kinds, sums.to(dtype))
            totals[2 + _NUM_KINDS :].index_add_(0, self._kinds, counts.to(dtype))
        return totals

    def _sum_gradients(self) -> None:
        """Over workers, in one piece."""
        if self._workers.count == 1:
            return
        for parameter in self._model.parameters():
            if parameter.grad is None:  # this worker had no pass
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in self._model.parameters() if p.grad is not None]
        together = torch.cat([gradient.flatten() for gradient in gradients])
        self._workers.sum(together)
        parts = together.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


TokenLosses = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


def _token_losses(model: TrajectoryTransformer, config: TrainConfig, several: bool) -> TokenLosses:
    """How losses are computed where the processor's passes do not.

    Args:
        several: a step has more than one pass. Compiled, they are then not recorded as CUDA graphs,
            whose next run would write over gradients that the last one left.

    Raises:
        ValueError: compiled ones are asked for on a processor.
    """
    if not config.compile:
        return functools.partial(fused_loss.token_losses, model)
    device = model.pos_emb.device
    require(device.type != "cpu", "compile", "False, as the model trains on a processor", True)
    mode = "reduce-overhead" if device.type == "cuda" and not several else "default"
    compiled: TokenLosses = torch.compile(model.token_losses, dynamic=False, mode=mode)
    return compiled


def _pass_windows(
    model: TrajectoryTransformer, config: TrainConfig, windows: TokenWindows, workers: Workers
) -> int:
    """Windows of one pass: what fits a processor's caches; a worker's share elsewhere."""
    if model.pos_emb.device.type != "cpu":
        return math.ceil(config.batch_size / workers.count)
    threads = torch.get_num_threads() * workers.count
    found = even_passes(config.batch_size, windows.window_len, threads)
    return int(workers.agree(found))  # processes may differ in threads


def seed_device(device: torch.device, seed: int) -> None:
    """Seed torch's generator of a device (of GPUs, the current one), and no other."""
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def _address_seed(address: Sequence[int]) -> int:
    """A seed of torch's generators for an address, in [0, 2^63)."""
    return int(np.random.SeedSequence(list(address)).generate_state(1, np.uint64)[0]) >> 1
