"""The arithmetic of csrc/, one table a processor's instruction set, against float64.

Rule of tolerance: at most twice the error of PyTorch's float32 (or bfloat16) result against the
same float64 one, plus a few roundings of the largest number. PyTorch's error depends on the
processor; where it does not cover sums one after the other, their roundings are counted.
"""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from tt_fast.planning.cpu import _core, available_isas

EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-8}

#: The smallest normal float32; some tables return zero below it.
TINY = 2.0**-126

isas = pytest.mark.parametrize("isa", available_isas())


def assert_close(got: NDArray[np.float32], exact: Tensor, rounded: Tensor) -> None:
    error = np.abs(got - exact.numpy()).max()
    theirs = float((rounded.double() - exact).abs().max())
    assert got.shape == exact.shape
    assert error <= 2 * theirs + 4 * EPS["float32"] * float(exact.abs().max())


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_this_machine_runs_more_than_the_oracle() -> None:
    assert available_isas()[-1] == "scalar"
    assert len(set(available_isas())) == len(available_isas())


#: What Linux says of a processor whose table must be there.
FLAGS = {
    "avx2": {"avx2", "fma"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx512_fp16": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_fp16"},
    "avx512_bf16": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"},
    "amx_bf16": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "amx_bf16"},
}


@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="asks Linux")
@pytest.mark.parametrize("isa", FLAGS)
def test_what_the_processor_has_is_used(isa: str) -> None:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    flags = set(next(line for line in lines if line.startswith("flags")).split())
    if isa == "amx_bf16" and ctypes.CDLL(None).syscall(158, 0x1023, 18) != 0:
        pytest.skip("Linux lends no tile registers")  # arch_prctl(ARCH_REQ_XCOMP_PERM, tile data)
    if isa == "avx512_fp16" and isa not in available_isas():
        compiler = [os.environ.get("CXX", "c++"), "-mavx512fp16", "-E", "-x", "c++", os.devnull]
        if subprocess.run(compiler, capture_output=True, check=False).returncode != 0:
            pytest.skip("the compiler does not know it")
    assert (isa in available_isas()) == (flags >= FLAGS[isa])


@pytest.mark.skipif("avx512_bf16" not in available_isas(), reason="no dot products of pairs")
def test_dot_products_of_pairs_are_used_where_they_pay() -> None:
    # Intel's take as long as four multiply-adds
    intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    names = [isa for isa in available_isas() if isa in ("avx512", "avx512_bf16")]
    assert names == (["avx512", "avx512_bf16"] if intel else ["avx512_bf16", "avx512"])


@pytest.mark.skipif("avx512_fp16" not in available_isas(), reason="no float16")
def test_float16_comes_after_what_is_faster() -> None:
    names = available_isas()
    at = names.index("avx512_fp16")
    assert names[at + 1] == "avx512"
    assert set(names[:at]) <= {"amx_bf16", "avx512_bf16"}


@isas
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 11, 12, 13, 25, 96])
@pytest.mark.parametrize(("k", "n"), [(1, 1), (31, 33), (128, 101), (48, 144), (100, 384)])
def test_gemm(isa: str, rows: int, k: int, n: int) -> None:
    x, weight, bias = normal(0, rows, k), normal(1, n, k), normal(2, n)
    got = _core.gemm(x.numpy(), weight.numpy(), bias.numpy(), dtype="float32", isa=isa)
    exact = F.linear(x.double(), weight.double(), bias.double())
    assert_close(got, exact, F.linear(x, weight, bias))


@isas
@pytest.mark.parametrize("rows", [1, 7, 12, 96])
@pytest.mark.parametrize(("k", "n"), [(1, 1), (31, 33), (128, 101)])
def test_gemm_in_bfloat16(isa: str, rows: int, k: int, n: int) -> None:
    x, weight, bias = normal(0, rows, k), normal(1, n, k), normal(2, n)
    got = _core.gemm(x.numpy(), weight.numpy(), bias.numpy(), dtype="bfloat16", isa=isa)
    low_x, low_weight = x.bfloat16(), weight.bfloat16()
    rounded = F.linear(low_x.float(), low_weight.float(), bias)
    if isa == "avx512_fp16":  # inputs are rounded less, sums more
        exact = F.linear(x.double(), low_weight.double(), bias.double())
        other = _core.gemm(x.numpy(), weight.numpy(), bias.numpy(), dtype="bfloat16", isa="avx512")
        assert (got != other).any()
    else:  # inputs are rounded, sums are not: exact on rounded inputs up to float32
        exact = F.linear(low_x.double(), low_weight.double(), bias.double())
    assert_close(got, exact, rounded)


@isas
def test_gelu(isa: str) -> None:
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e4, 1e4])])
    got = _core.gelu(x[None].numpy(), isa=isa)[0]
    exact = F.gelu(x.double())
    # Phi is right to 1.3e-7 where it is fitted, and is rounded to float32: relative to x
    allowed = 4 * EPS["float32"] * np.maximum(1.0, np.abs(x.numpy()))
    assert (np.abs(got - exact.numpy()) <= allowed).all()


@isas
@pytest.mark.parametrize("cols", [1, 2, 15, 16, 17, 101, 257])
def test_softmax(isa: str, cols: int) -> None:
    x = 5 * normal(0, 9, cols)
    x[0] = -1000.0  # all removed: uniform
    x[1, cols // 2 :] = -1000.0
    x[2, : cols - 1] = -torch.inf
    got = _core.softmax(x.numpy(), isa=isa)
    exact = x.double().softmax(-1).numpy()
    # half an EPS each: the difference to the largest, and 4 of the exponential, above the line and,
    # averaged, in the sum (a mean difference is at most log(cols), as an entropy is); cols - 1
    # additions; the quotient
    below = (x.amax(-1, keepdim=True) - x).clamp(max=200.0).double().numpy()
    allowed = exact * 0.5 * EPS["float32"] * (below + np.log(cols) + cols + 8)
    assert got.shape == exact.shape
    assert (np.abs(got - exact) <= allowed + TINY).all()
    assert (got[2, : cols - 1] == 0.0).all()


@isas
@pytest.mark.parametrize("cols", [1, 3, 16, 31, 48, 128])
def test_layer_norm(isa: str, cols: int) -> None:
    x = 3 * normal(0, 5, cols) + 2
    x[1] = 0.5  # no variance
    gamma, beta = normal(1, cols), normal(2, cols)
    got = _core.layer_norm(x.numpy(), gamma.numpy(), beta.numpy(), isa=isa)
    exact = F.layer_norm(x.double(), (cols,), gamma.double(), beta.double())
    assert_close(got, exact, F.layer_norm(x, (cols,), gamma, beta))


@isas
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 33, 79])
@pytest.mark.parametrize(
    ("heads", "dim"), [(1, 3), (2, 16), (4, 16), (4, 32), (8, 5), (3, 40), (1, 64), (2, 80)]
)
@pytest.mark.parametrize("hidden", [0, 1, 20])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention(isa: str, length: int, heads: int, dim: int, hidden: int, dtype: str) -> None:
    """Two neighbours that share ancestors, the second one without the last `hidden` of them."""
    hidden = min(hidden, length - 1)
    q, k, v = normal(0, 2, heads, dim), normal(1, length, heads, dim), normal(2, length, heads, dim)
    given = rounded = exact = k, v
    if dtype == "bfloat16":
        rounded = k.bfloat16().float(), v.bfloat16().float()
        if not (isa in ("avx512_fp16", "amx_bf16") and "avx512_fp16" in available_isas()):
            exact = rounded  # float16 rounds keys and values less, and sums more
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, length - hidden :] = False

    def attention(precision: Any, k: Tensor, v: Tensor) -> Tensor:
        query, keys, values = (x.to(precision).transpose(0, 1) for x in (q, k, v))
        return F.scaled_dot_product_attention(query, keys, values, mask).transpose(0, 1)

    keys, values = (x.numpy() for x in given)
    got = _core.attend(q.numpy(), keys, values, hidden, dtype=dtype, isa=isa)
    assert_close(got, attention(torch.float64, *exact), attention(torch.float32, *rounded))


def test_kernels_refuse_other_arrays() -> None:
    x = np.zeros((2, 3), np.float32)
    with pytest.raises(ValueError, match="isa: expected one of auto, "):
        _core.gelu(x, isa="vax")
    with pytest.raises(ValueError, match="x: expected a matrix"):
        _core.gelu(x[0], isa="auto")
    with pytest.raises(ValueError, match="weight: expected"):
        _core.gemm(x, np.zeros((2, 4), np.float32), np.zeros(2, np.float32), "float32", "auto")
    with pytest.raises(ValueError, match="rows: expected"):
        _core.gemm(np.zeros((97, 3), np.float32), x, np.zeros(2, np.float32), "float32", "auto")


def test_peak_rate_is_a_rate() -> None:
    assert _core.peak_gflops("float32", num_threads=1, seconds=0.01, isa="scalar") > 0.01
