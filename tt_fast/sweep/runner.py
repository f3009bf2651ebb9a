"""Run trials side by side on Ray: as many as there are places, each again if it fails."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from tt_fast.files import to_json, write_text
from tt_fast.limits import available_cpus
from tt_fast.sweep.trial import (
    FailedAttempt,
    SweepConfig,
    Trial,
    TrialResult,
    attempt,
    read_result,
    write_error,
)
from tt_fast.validate import require, require_int, require_number

RAY_EXTRA = 'pip install "tt_fast[ray]"'

#: Of a local cluster; Ray's least is 75 MiB, and trials pass no data through it.
_OBJECT_STORE_BYTES = 80 * 2**20


@dataclass(frozen=True)
class Cluster:
    """Where trials run."""

    workers: int | None = None
    """Trials side by side; None: as many as there are processors and GPUs for."""
    cpus_per_trial: int = 1
    """Processors of a trial: threads of its training and planning."""
    gpus_per_trial: float = 0.0
    """GPUs of a trial; a share such as 0.5 lets trials use one together. With 0 they train on the
    processor."""
    retries: int = 2
    """Times that a failed trial is tried again, from its newest checkpoint."""
    address: str | None = None
    """Of a Ray cluster; None starts one on this machine, and ends it with the sweep."""

    def __post_init__(self) -> None:
        if self.workers is not None:
            require_int("workers", self.workers, 1)
        require_int("cpus_per_trial", self.cpus_per_trial, 1, 1024)
        require_number("gpus_per_trial", self.gpus_per_trial, 0.0)
        whole = self.gpus_per_trial < 1.0 or float(self.gpus_per_trial).is_integer()
        require(whole, "gpus_per_trial", "a share below 1 or a whole number", self.gpus_per_trial)
        require_int("retries", self.retries, 0)

    def places(self, resources: Mapping[str, float]) -> int:
        """Trials side by side in a cluster of these resources."""
        places = int(resources.get("CPU", 0.0)) // self.cpus_per_trial
        if self.gpus_per_trial > 0.0:
            places = min(places, int(resources.get("GPU", 0.0) / self.gpus_per_trial))
        return self.workers or max(1, places)


@dataclass(frozen=True)
class TrialFailure:
    """A trial that was given up."""

    trial: Trial
    attempts: int
    error: str
    """Last line of the error; all of it is in the trial's error.txt"""


class SweepRecord:
    """sweep.json: settings, datasets, and the state of every trial."""

    def __init__(self, output_dir: Path, values: Mapping[str, Any]) -> None:
        """`values` is everything but the trials, and those that the file had before."""
        self.output_dir = output_dir
        self._values = {**values, "trials": dict(values["trials"])}
        self._save()

    def state(self, trial: Trial) -> str | None:
        """waiting, running, done or failed; None for a new one."""
        state: str | None = self._values["trials"].get(trial.folder, {}).get("state")
        return state

    def set(self, trial: Trial, state: str, attempts: int, error: str | None = None) -> None:
        """Change a trial's state."""
        self._values["trials"][trial.folder] = {
            "dataset": trial.dataset,
            "source": trial.source,
            "seed": trial.seed,
            "state": state,
            "attempts": attempts,
            "error": error,
        }
        self._save()

    def _save(self) -> None:
        write_text(self.output_dir / "sweep.json", to_json(self._values))


class TrialRunner:
    """Keeps as many trials running as there are places."""

    def __init__(
        self,
        ray: Any,
        config: SweepConfig,
        cluster: Cluster,
        record: SweepRecord,
        say: Callable[[str], None],
    ) -> None:
        self.ray, self.config, self.cluster, self.record = ray, config, cluster, record
        self.say = say
        self.failures: list[TrialFailure] = []
        self._running: dict[Any, Trial] = {}  # by what Ray calls it
        self._attempts: dict[Trial, int] = {}

    def run(self, trials: Sequence[Trial], progress: bool) -> None:
        """Run those that have no result."""
        waiting = deque(trial for trial in trials if self._result(trial) is None)
        for trial in trials:
            if trial in waiting:
                self.record.set(trial, "waiting", 0)
            elif self.record.state(trial) != "done":  # the sweep was killed before it noted so
                self.record.set(trial, "done", 0)
        if not waiting:
            return
        bar = tqdm(
            total=len(trials),
            initial=len(trials) - len(waiting),
            unit="trial",
            disable=not progress,
        )
        with open_cluster(self.ray, self.cluster) as places, bar:
            try:
                self._run(waiting, places, bar)
            except (KeyboardInterrupt, SystemExit):  # Ray makes the latter of SIGTERM
                self._stop()
                raise

    def _run(self, waiting: deque[Trial], places: int, bar: Any) -> None:
        while waiting or self._running:
            while waiting and len(self._running) < places:
                self._start(waiting.popleft())
            names = sorted(trial.folder for trial in self._running.values())
            bar.set_postfix_str("running: " + ", ".join(names))
            # every second, so that the bar's clock moves
            ended, _ = self.ray.wait(list(self._running), num_returns=1, timeout=1.0)
            for task in ended:
                trial = self._running.pop(task)
                if self._finish(trial, self._outcome(trial, task)):
                    bar.update()
                else:
                    waiting.appendleft(trial)

    def _start(self, trial: Trial) -> None:
        attempts = self._attempts.get(trial, 0) + 1
        self._attempts[trial] = attempts
        self.record.set(trial, "running", attempts)
        # Ray's own retries would neither count nor tell
        task = self.ray.remote(attempt).options(
            name=trial.folder,
            num_cpus=self.cluster.cpus_per_trial,
            num_gpus=self.cluster.gpus_per_trial,
            max_retries=0,
        )
        folder = self.record.output_dir / trial.folder
        num_threads, paths = self.cluster.cpus_per_trial, [path for path in sys.path if path]
        ref = task.remote(trial, self.config, folder, num_threads, paths)
        self._running[ref] = trial

    def _outcome(self, trial: Trial, task: Any) -> FailedAttempt | None:
        try:
            outcome: FailedAttempt | None = self.ray.get(task)
        except self.ray.exceptions.RayError as error:  # its process died, or never began
            write_error(self.record.output_dir / trial.folder, str(error))
            return FailedAttempt(_death(error), again=True)
        return outcome

    def _finish(self, trial: Trial, failed: FailedAttempt | None) -> bool:
        """Note how an attempt ended; False if the trial is to be tried again."""
        attempts, most = self._attempts[trial], self.cluster.retries + 1
        if failed is None:
            self.record.set(trial, "done", attempts)
            self.say(str(self._result(trial)))
            return True
        if failed.again and attempts < most:
            self.record.set(trial, "waiting", attempts, failed.error)
            self.say(f"{trial.folder}: attempt {attempts} of {most} failed: {failed.error}")
            return False
        self.record.set(trial, "failed", attempts, failed.error)
        self.failures.append(TrialFailure(trial, attempts, failed.error))
        self.say(f"{trial.folder}: failed: {failed.error}")
        return True

    def _stop(self) -> None:
        """Let every trial write a checkpoint."""
        if not self._running:
            return
        self.say("interrupted: waiting for the trials to write their checkpoints")
        for task in self._running:
            self.ray.cancel(task)
        self.ray.wait(list(self._running), num_returns=len(self._running))
        for trial in self._running.values():
            state = "waiting" if self._result(trial) is None else "done"
            self.record.set(trial, state, self._attempts[trial])

    def _result(self, trial: Trial) -> TrialResult | None:
        return read_result(self.record.output_dir, trial, self.config)


# ---- Ray ----


def import_ray() -> Any:
    """Ray, told to report nothing and to leave CUDA_VISIBLE_DEVICES alone where no GPU is asked.

    It takes these two from the environment only, when it is imported and started.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise ImportError(f"a sweep needs ray: {RAY_EXTRA}") from error
    return ray


@contextlib.contextmanager
def open_cluster(ray: Any, cluster: Cluster) -> Iterator[int]:
    """Yield the number of trials that run side by side."""
    started = not ray.is_initialized()
    if started:
        _start_ray(ray, cluster)
    try:
        resources = ray.cluster_resources()
        if cluster.address is None:  # others may grow
            for name, key in (("cpus_per_trial", "CPU"), ("gpus_per_trial", "GPU")):
                wanted, there = getattr(cluster, name), resources.get(key, 0.0)
                require(wanted <= there, name, f"at most the {there:g} of Ray here", wanted)
        yield cluster.places(resources)
    finally:
        if started:
            ray.shutdown()


def _start_ray(ray: Any, cluster: Cluster) -> None:
    own: dict[str, Any] = {}
    if cluster.address is None:
        workers = cluster.workers or max(1, available_cpus() // cluster.cpus_per_trial)
        own["num_cpus"] = workers * cluster.cpus_per_trial
        own["object_store_memory"] = _OBJECT_STORE_BYTES
        own["include_dashboard"] = False
    else:
        _check_address(cluster.address)
    # without "local" it would join any cluster that runs on this machine
    address = cluster.address or "local"
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)


def _check_address(address: str) -> None:
    """Something listens at host:port; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        return  # "auto", "ray://..."
    try:
        socket.create_connection((host, int(port)), timeout=10.0).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(
            f"address: expected that of a Ray cluster, got {address!r}: {error}"
        ) from error


def _death(error: Exception) -> str:
    """In a line, why a trial's process is gone."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
