"""What this process may use of the machine: its own limits, and its container's.

A container that may use two processors of sixty-four still sees all of them. Sixty-four threads
would then spend their common share of time waiting for each other.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

_GROUPS = Path("/proc/self/cgroup")
_ROOT = Path("/sys/fs/cgroup")


def available_cpus(groups: Path = _GROUPS, root: Path = _ROOT) -> int:
    """Processors that this process may run on, and no more than its share of time, rounded up.

    Args:
        groups: the control groups that this process is in, as Linux lists them.
        root: where their limits are.
    """
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    shares = [share for folder in _folders("cpu", groups, root) if (share := _cpu_share(folder))]
    return max(1, min([count, *map(math.ceil, shares)]))


def memory_limit(groups: Path = _GROUPS, root: Path = _ROOT) -> int | None:
    """Bytes that the machine has, or those that this process may use if they are fewer; None where
    neither is known. What others use already is not looked at.

    Args: see `available_cpus`.
    """
    limits = []
    if {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= getattr(os, "sysconf_names", {}).keys():
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for folder in _folders("memory", groups, root):
        for name in ("memory.max", "memory.limit_in_bytes"):  # of version 2, of version 1
            limits += _numbers(folder / name)
    return min(limits, default=None)


def _cpu_share(folder: Path) -> float | None:
    """Processors' worth of time that a control group has; None without a limit."""
    quota = _numbers(folder / "cpu.max")  # version 2: quota and period, microseconds
    if not quota:
        quota = _numbers(folder / "cpu.cfs_quota_us") + _numbers(folder / "cpu.cfs_period_us")
    if len(quota) != 2 or quota[1] == 0:
        return None
    return quota[0] / quota[1]


def _folders(controller: str, groups: Path, root: Path) -> Iterator[Path]:
    """Where the limits of this process's group are, and those of all groups around it.

    From within a container the path may be the host's, and lead nowhere; the root of what is seen
    there is then the container's own group.
    """
    for line in _read(groups).splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number != "0" and controller not in controllers.split(","):
            continue
        base = root if number == "0" else root / controller  # version 2 has one tree for all
        parts = Path(path).parts[1:]
        yield from (base.joinpath(*parts[:i]) for i in range(len(parts) + 1))


def _numbers(path: Path) -> list[int]:
    """Those in a file that are no less than zero: -1 and "max" stand for no limit."""
    return [int(word) for word in _read(path).split() if word.isdecimal()]


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
