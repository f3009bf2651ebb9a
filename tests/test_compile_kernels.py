"""Kernels compile for GPUs that are not here; the fused ones keep their registers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = (
    "segment", "mlp", "layer_norm_qkv", "tree_attention", "rank", "advance",
    "mlp_up", "add_product", "logits", "decode_attention",
    "head_loss", "head_loss_dx", "head_loss_dw",
)  # fmt: skip


@pytest.mark.parametrize("options", [[], ["--capability", "999"]])
def test_kernels_compile_ahead_of_time(options: list[str]) -> None:
    """For three generations, in every precision; and the check can fail."""
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, script, *options],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
    )
    if options:
        assert process.returncode != 0
        return
    assert process.returncode == 0, process.stdout + process.stderr
    for capability in ("80", "90", "100"):
        for kernel in KERNELS:
            rows = [line.split() for line in process.stdout.splitlines()]
            assert any(r[0] == capability and r[4] == f"{kernel}_kernel" for r in rows)
