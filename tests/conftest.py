"""Fixtures that every test may use."""

from __future__ import annotations

import os

# Before torch starts its threads: the tests' tensors are too small to gain from more than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before matplotlib or MuJoCo is imported: no display is needed.
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from hypothesis import settings
from quick_interpreter import hurry_interpreter

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:  # before triton is imported: kernels run in its interpreter, on the processor
    os.environ["TRITON_INTERPRET"] = "1"

# Property tests draw the same examples in every run and have no deadline on a busy machine.
settings.register_profile("tt_fast", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("tt_fast")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--original PATH`: a checkout of the original code, which tests/test_run_original.py runs."""
    parser.addoption("--original", metavar="PATH", help="checkout of the original code to run")


@pytest.fixture
def quick_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where kernels are interpreted, a quicker interpreter."""
    if not HAS_GPU:
        hurry_interpreter(monkeypatch.setattr)


@pytest.fixture(autouse=True)
def _seed_torch() -> None:
    """Tests that draw from torch's global generator do not depend on their order."""
    torch.manual_seed(0)


# in the interpreter, tests/test_cuda.py and a few golden plans do for "cuda"
@pytest.fixture(params=["reference", "torch", "cpu", *(["cuda"] if HAS_GPU else [])])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend of `beam_plan` and `beam_search`; all must equal the golden files."""
    name: str = request.param
    return name
