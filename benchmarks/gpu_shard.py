"""A pytest plugin: of all tests, those of one shard ($GPU_SHARD, "1/4": the second of four).

Tests of one function compile the same kernels, so they stay together, as far as shards take about
as long as each other.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from itertools import groupby

import pytest


@pytest.hookimpl(trylast=True)  # after -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of one shard; most of their time goes by in compiling, a process at a time."""
    shard, _, count = os.environ.get("GPU_SHARD", "0/1").partition("/")
    chosen = set(deal(items, int(count))[int(shard)])
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]


def deal(items: Sequence[pytest.Item], count: int) -> list[list[pytest.Item]]:
    """Runs of tests, the heaviest first, each to the shard that has least."""
    share = max(1.0, weight(items) / count)
    shards: list[list[pytest.Item]] = [[] for _ in range(count)]
    for run in sorted(runs(items, share), key=weight, reverse=True):
        min(shards, key=weight).extend(run)
    return shards


def runs(items: Sequence[pytest.Item], share: float) -> list[list[pytest.Item]]:
    """Tests by file and function; only neighbours, where all of them outweigh a share."""
    found = []
    for _, group in groupby(items, lambda item: item.nodeid.partition("[")[0]):
        tests = list(group)
        size = math.ceil(len(tests) / max(1, math.ceil(weight(tests) / share)))
        found += [tests[i : i + size] for i in range(0, len(tests), size)]
    return found


def weight(items: Sequence[pytest.Item]) -> int:
    """Kernels that tests compile: those of a loss, or of a plan, about."""
    heavy = [item for item in items if item.get_closest_marker("skip") is None]
    return sum(3 if item.path.stem == "test_head_loss" else 12 for item in heavy)
