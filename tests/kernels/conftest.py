"""These cases lie in the processor's memory, so their kernels run in the interpreter."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        return
    reason = "their cases lie on the processor; whole plans, and benchmarks/, check a GPU's kernels"
    for item in items:
        if "kernels" in item.path.parts:
            item.add_marker(pytest.mark.skip(reason=reason))
