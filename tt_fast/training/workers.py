"""The processes of one training job: several where torchrun started them, else this one.

Plain torch.distributed in place of DistributedDataParallel: a step's gradients are already summed
by hand, over passes and threads, and those of a model of five megabytes travel in one piece. There
is nothing that buckets and hooks during the backward pass could hide.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from tt_fast.validate import require

#: The others wait while the first one evaluates.
_TIMEOUT = timedelta(hours=6)


class WorkerLostError(ConnectionError):
    """Another process of the job ended, so this one cannot go on."""


@dataclass(frozen=True)
class Workers:
    """This process among those of its job."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes files and shows progress."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> None:
        """Replace a tensor, of one shape everywhere, by its sum over all workers.

        Raises:
            WorkerLostError: one of them has ended.
        """
        if self.count == 1:
            return
        try:
            dist.all_reduce(tensor)
        except RuntimeError as error:
            raise WorkerLostError(
                f"worker {self.rank} of {self.count}: another one has ended or is out of reach: "
                f"{error}; "
                "the newest checkpoint stands, resume from it"
            ) from error

    def total(self, *values: float) -> list[float]:
        """Each value summed over all workers.

        Raises:
            WorkerLostError: one of them has ended.
        """
        if self.count == 1:
            return list(values)
        totals = torch.tensor(values, dtype=torch.float64, device=_collective_device())
        self.sum(totals)
        return totals.tolist()

    def agree(self, value: float) -> float:
        """The first one's value, for all.

        Raises:
            WorkerLostError: one of them has ended.
        """
        return self.total(value if self.is_first else 0.0)[0]

    def wait(self) -> None:
        """Until all have come here.

        Raises:
            WorkerLostError: one of them has ended.
        """
        self.agree(0.0)


@contextmanager
def join_workers(device: str) -> Iterator[Workers]:
    """Meet the other processes, if there are any; leave them at the end.

    A process group that the caller has made is used as it is. Otherwise one is made where torchrun
    started this process: gloo for a processor, NCCL for GPUs, one GPU a process.

    Args:
        device: as in `TrainConfig`.

    Raises:
        ValueError: more processes on this machine than GPUs, or a group of the caller's that cannot
            sum what lies on such a device.
    """
    if not dist.is_available():
        yield Workers()
    elif dist.is_initialized():
        _check_group(device)
        yield Workers(dist.get_rank(), dist.get_world_size())
    elif not dist.is_torchelastic_launched():
        yield Workers()
    else:
        on_gpu = torch.cuda.is_available() and device.partition(":")[0] in ("auto", "cuda")
        if on_gpu:
            _take_gpu(device)
        # what lies on the processor goes by gloo, which notices at once that another one died
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=_TIMEOUT)
        try:
            yield Workers(dist.get_rank(), dist.get_world_size())
        finally:
            dist.destroy_process_group()


def is_first_process() -> bool:
    """Whether this process is the first of its job, outside `join_workers` too."""
    launched = dist.is_available() and dist.is_torchelastic_launched()
    return not launched or os.environ["RANK"] == "0"


def _check_group(device: str) -> None:
    """The caller's process group can sum gradients on the device of this name."""
    name = device.partition(":")[0]
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    # "cpu:gloo,cuda:nccl" and the like
    backends = dist.get_backend_config().split(",")
    known = sorted(backend.partition(":")[0] for backend in backends)
    require(name in known, "device", f"one of the process group's, {' or '.join(known)}", device)


def _take_gpu(device: str) -> None:
    """Make the GPU of this process' number the current one."""
    require(":" not in device, "device", '"auto" or "cuda" under torchrun', device)
    number, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    require(number < count, "nproc_per_node", f"at most this machine's {count} GPUs", number + 1)
    torch.cuda.set_device(number)


def _collective_device() -> torch.device:
    """Where the group's small tensors must lie; a caller's group may know GPUs only."""
    on_gpu = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
