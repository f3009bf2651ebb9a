"""What a process may use: processors and memory, as containers limit them."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
from cpu_cases import CONFIG, DRAWS, context, tiny_backend

from tt_fast import encoding, limits
from tt_fast.planning import cpu

GB = 2**30


@pytest.fixture(autouse=True)
def _large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 processors and 256 GB, of which the process may run on 48."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(48)), raising=False)
    monkeypatch.setattr(os, "sysconf_names", {"SC_PHYS_PAGES": 1, "SC_PAGE_SIZE": 2})
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 64 * GB // 1024, "SC_PAGE_SIZE": 4096}.get)


# groups as Linux lists them, files with limits, and what is left: processors, memory
CASES = {
    "no containers": ("", {}, 48, 256 * GB),
    "no limits": (
        "0::/user.slice",
        {"user.slice/cpu.max": "max 100000", "user.slice/memory.max": "max"},
        48,
        256 * GB,
    ),
    "version 2, seen from within": (
        "0::/",
        {"cpu.max": "200000 100000\n", "memory.max": f"{4 * GB}\n"},
        2,
        4 * GB,
    ),
    "version 2, a part of a processor": ("0::/", {"cpu.max": "50000 100000"}, 1, 256 * GB),
    "version 2, rounded up": ("0::/", {"cpu.max": "250000 100000"}, 3, 256 * GB),
    "version 2, the group around it has less": (
        "0::/pod/box",
        {
            "pod/cpu.max": "400000 100000",
            "pod/box/cpu.max": "800000 100000",
            "pod/memory.max": f"{8 * GB}",
            "pod/box/memory.max": f"{2 * GB}",
        },
        4,
        2 * GB,
    ),
    "version 1": (
        "4:memory:/box\n2:cpu,cpuacct:/box\n1:name=systemd:/box",
        {
            "cpu/box/cpu.cfs_quota_us": "600000",
            "cpu/box/cpu.cfs_period_us": "100000",
            "memory/box/memory.limit_in_bytes": f"{16 * GB}",
        },
        6,
        16 * GB,
    ),
    "version 1, no limits": (
        "4:memory:/box\n2:cpu,cpuacct:/box\n0::/",
        {
            "cpu/box/cpu.cfs_quota_us": "-1",
            "cpu/box/cpu.cfs_period_us": "100000",
            "memory/box/memory.limit_in_bytes": "9223372036854771712",
        },
        48,
        256 * GB,
    ),
    "version 1, seen from within by the path outside": (
        "4:memory:/docker/0123\n2:cpu:/docker/0123",
        {
            "cpu/cpu.cfs_quota_us": "300000",
            "cpu/cpu.cfs_period_us": "100000",
            "memory/memory.limit_in_bytes": f"{GB}",
        },
        3,
        GB,
    ),
    "another controller's limits": (
        "3:cpuset:/box\n2:cpuacct:/box",
        {"cpu/box/cpu.cfs_quota_us": "100000", "cpu/box/cpu.cfs_period_us": "100000"},
        48,
        256 * GB,
    ),
    "more than there is": (
        "0::/",
        {"cpu.max": "9900000 100000", "memory.max": f"{999 * GB}"},
        48,
        256 * GB,
    ),
    "files that say nothing": (
        "0\n\n2\nnot:this:",
        {"cpu.max": "", "memory.max": "much"},
        48,
        256 * GB,
    ),
}


@pytest.mark.parametrize(("groups", "files", "cpus", "memory"), CASES.values(), ids=CASES)
def test_a_container_limits(
    tmp_path: Path, groups: str, files: dict[str, str], cpus: int, memory: int
) -> None:
    root = tmp_path / "root"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (tmp_path / "groups").write_text(groups)
    assert limits.available_cpus(tmp_path / "groups", root) == cpus
    assert limits.memory_limit(tmp_path / "groups", root) == memory


def test_a_system_without_any_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.delattr(os, "sysconf_names")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    nowhere = tmp_path / "nowhere", tmp_path
    assert limits.available_cpus(*nowhere) == 1
    assert limits.memory_limit(*nowhere) is None


@pytest.mark.skipif(not cpu.is_available(), reason="built without the C++ core")
def test_a_plan_beyond_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(CONFIG, beam_width=600)
    monkeypatch.setattr(cpu, "memory_limit", lambda: 2_000_000)
    message = r"beam_width: expected .* fits in memory, got 1800 rows, .* [1-9]\d* MB of 2"
    with pytest.raises(ValueError, match=message):
        tiny_backend().plan([context()], config, DRAWS)
    monkeypatch.setattr(cpu, "memory_limit", lambda: None)
    tiny_backend().plan([context()], config, DRAWS)


@pytest.mark.skipif(not cpu.is_available(), reason="built without the C++ core")
def test_threads_are_as_many_as_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "available_cpus", lambda: 3)
    assert tiny_backend().num_threads == 3


@pytest.mark.parametrize(("free", "limit"), [(2799, 2800), (2800, 2799), (None, 2799)])
def test_tokens_stay_in_memory_if_free_memory_and_the_limit_are_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int | None, limit: int
) -> None:
    """In memory: at most a quarter of either."""
    monkeypatch.setattr(encoding, "_available_memory", lambda: free)
    monkeypatch.setattr(encoding, "memory_limit", lambda: limit)
    assert encoding._choose_file("auto", 700, tmp_path)
    assert not encoding._choose_file("auto", 699, tmp_path)
