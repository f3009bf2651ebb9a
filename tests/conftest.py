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

# Property tests draw the same examples in every run and have no deadline on a busy machine.
settings.register_profile("tt_fast", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("tt_fast")


@pytest.fixture(autouse=True)
def _seed_torch() -> None:
    """Tests that draw from torch's global generator do not depend on their order."""
    torch.manual_seed(0)


@pytest.fixture(params=["reference", "torch", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend of `beam_plan` and `beam_search`; all must equal the golden files."""
    name: str = request.param
    return name
