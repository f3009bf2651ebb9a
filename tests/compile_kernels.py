"""Compile every kernel that plans and training launch, for GPUs that are not here, and say what
each one needs.

`python tests/compile_kernels.py` prints a table and fails where a kernel spills more registers than
it may, or needs more shared memory than the smallest GPU has. The planner and the losses themselves
run, on tensors without memory and with a driver that compiles and launches nothing, so what is
compiled is what a GPU would be asked for. Not in a process with TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# triton 3.9 warns where this is not set; it is what all versions before did
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.jit import JITFunction

from tt_fast import ModelConfig, PlanConfig, TrajectoryTransformer
from tt_fast.kernels.head_loss import HeadShape, head_loss, head_loss_dw, head_loss_dx
from tt_fast.kernels.sample import DrawFlags
from tt_fast.planning.cuda_memory import model_shape, pack_weights, plan_shape
from tt_fast.planning.cuda_session import Session, gpu_machine

#: A program's shared memory on the smallest of GPUs from compute capability 8.0 on (8.6, 8.9).
SHARED_BYTES = 99 * 1024
#: Multiprocessors of a data centre's GPU: decides the size of tiles.
NUM_PROGRAMS = 132
HOPPER = ModelConfig(11, 3)
WIDE = ModelConfig(11, 3, embed_dim=256, num_heads=8, num_layers=2)
WIDEST = ModelConfig(11, 3, embed_dim=512, num_heads=8, vocab_size=300)
LAYERWISE = ModelConfig(11, 3, embed_dim=1024, num_heads=8, num_layers=2)
SMALL, LARGE = 1, 64  # environments: tiles of few rows, and of many
BATCH = 256  # windows of a training step
PLAN = PlanConfig(2, 128, 2, discount=0.99)


@dataclass(frozen=True)
class Needs:
    """Of one compiled kernel."""

    kernel: str
    registers: int
    spilled_bytes: int
    shared_bytes: int


class NoGpu:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def compiling_only(capability: int) -> Iterator[dict[str, tuple[str, Any]]]:
    """Launches compile and do nothing else; yields name and kernel by hash."""
    compiled: dict[str, tuple[str, Any]] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        assert kernel.metadata.target.arch == capability
        compiled[kernel.hash] = (self.__name__, kernel)
        return kernel

    triton.runtime.driver.set_active(NoGpu(capability))
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run


def compile_plan(capability: int, precision: str, model: ModelConfig, num_envs: int) -> list[Needs]:
    """Everything that a plan launches there."""
    torch_model = TrajectoryTransformer(model)
    shape, plan = model_shape(model, precision), plan_shape(torch_model, PLAN)
    weights = pack_weights(torch_model, shape, torch.device("meta"))
    session = Session(weights, shape, plan, DrawFlags(False, False), num_envs, use_graph=False)
    session.machine = gpu_machine(NUM_PROGRAMS, shape)
    with compiling_only(capability) as compiled:
        session._enqueue(None)
    return [needs(name, kernel) for name, kernel in compiled.values()]


def compile_losses(capability: int, precision: str, model: ModelConfig) -> list[Needs]:
    """The heads with the cross-entropy of a training step, forward and backward.

    Under autocast activations and weights are float32, and rounded as they are loaded.
    """
    head = HeadShape(model.transition_dim, model.vocab_size + 1, model.embed_dim, precision)
    rows, meta = (BATCH, model.block_size), torch.device("meta")
    x = torch.empty(*rows, head.embed_dim, device=meta)
    weight = torch.empty(head.num_dims, head.num_ids, head.embed_dim, device=meta)
    targets = torch.empty(*rows, dtype=torch.int64, device=meta)
    with compiling_only(capability) as compiled:
        losses, log_sums = head_loss(x, weight, targets, head)
        head_loss_dx(x, weight, targets, log_sums, losses, head)
        head_loss_dw(x, weight, targets, log_sums, losses, head)
    return [needs(name, kernel) for name, kernel in compiled.values()]


def needs(name: str, kernel: Any) -> Needs:
    """From the assembler's own report."""
    target = re.search(r"^\.target (\w+)", kernel.asm["ptx"], re.MULTILINE)
    assert target, "expected PTX with a .target"
    assembler = get_ptxas(kernel.metadata.target.arch).path
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(kernel.asm["ptx"], encoding="utf-8")
        options = ["-v", f"--gpu-name={target[1]}"]
        command = [assembler, *options, source, "-o", source.with_suffix(".cubin")]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    registers = re.search(r"Used (\d+) registers", report)
    spilled = re.search(r"(\d+) bytes spill stores", report)
    assert registers, report
    return Needs(
        name,
        int(registers[1]),
        int(spilled[1]) if spilled else 0,
        int(kernel.metadata.shared),
    )


def complaints(row: Needs, precision: str) -> list[str]:
    """What must not be."""
    found = []
    if row.spilled_bytes > spill_limit(row.kernel, precision):
        found.append(f"{row.kernel} spills {row.spilled_bytes} bytes")
    if row.shared_bytes > SHARED_BYTES:
        found.append(f"{row.kernel} needs {row.shared_bytes} bytes of shared memory")
    return found


def spill_limit(kernel: str, precision: str) -> int:
    """Bytes a thread. In float32 tiles are twice as large: the two large kernels spill."""
    if precision == "bf16":
        return 0
    return {"segment_kernel": 800, "mlp_kernel": 200}.get(kernel, 16)


def table(case: tuple[int, str]) -> tuple[list[str], list[str]]:
    """Lines and complaints of a compute capability and a precision."""
    capability, precision = case
    lines, found = [], []
    cases = [("hopper", HOPPER, SMALL), ("wide", WIDE, SMALL)]
    if precision == "bf16":  # what many environments are planned in
        cases.append(("hopper", HOPPER, LARGE))
    if precision == ("ieee" if capability == 80 else "bf16"):  # where it is tightest; it takes long
        cases.append(("1024", LAYERWISE, SMALL))
    rows = [
        (name, num_envs, row)
        for name, model, num_envs in cases
        for row in compile_plan(capability, precision, model, num_envs)
    ]
    if precision != "tf32":  # training has none of its own
        for name, model in (("hopper", HOPPER), ("widest", WIDEST)):
            rows += [(name, BATCH, row) for row in compile_losses(capability, precision, model)]
    for name, count, row in rows:
        lines.append(
            f"{capability:4} {precision:>9} {name:>6} {count:4} {row.kernel:26} "
            f"{row.registers:9} {row.spilled_bytes:7} {row.shared_bytes:7}"
        )
        found += [f"sm_{capability} {precision} {c}" for c in complaints(row, precision)]
    return list(dict.fromkeys(lines)), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capability", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--precision", nargs="+", default=["bf16", "tf32", "ieee"])
    options = parser.parse_args()
    cases = [(c, p) for c in options.capability for p in options.precision]
    found: list[str] = []
    print("  sm precision  model many kernel                     registers spilled  shared")
    # a process a case: triton keeps what it compiled, whatever the GPU
    with multiprocessing.get_context("spawn").Pool(maxtasksperchild=1) as pool:
        for lines, wrong in pool.imap(table, cases):
            print("\n".join(lines), flush=True)
            found += wrong
    if found:
        sys.exit("\n".join(["", *found]))


if __name__ == "__main__":
    main()
