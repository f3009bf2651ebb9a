"""A pytest plugin: of all tests, every SHARDS-th, from SHARD on ($GPU_SHARD, "1/4")."""

from __future__ import annotations

import os

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of one shard; most of their time goes by in compiling, a process at a time."""
    shard, _, count = os.environ.get("GPU_SHARD", "0/1").partition("/")
    gone = [item for i, item in enumerate(items) if i % int(count) != int(shard)]
    config.hook.pytest_deselected(items=gone)
    items[:] = items[int(shard) :: int(count)]
