"""Several processes train one model: as one process would, whoever dies, whoever resumes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from command_line import DEMO, SMALL, run
from tiny import weights_equal

from tt_fast.checkpoint import Checkpoint, newest_checkpoint
from tt_fast.training.log import COLUMNS, read_metrics
from tt_fast.training.workers import Workers, is_first_process, join_workers

#: Of every run here: each step has four passes, two a process or thread.
OPTIONS = [*SMALL, "--pass-windows", "2", "--checkpoint-steps", "4", "--log-steps", "2"]
STEPS, BATCH = 12, 8

# sends a signal to the process of rank 1, by itself, in the middle of a step
_SIGNALLED = """
import os, signal, sys
import torch
from tt_fast.cli import main

clip, calls = torch.nn.utils.clip_grad_norm_, iter(range(1, 10**9))

def signalled(*args, **kwargs):
    if os.environ["RANK"] == "1" and next(calls) == 7:
        os.kill(os.getpid(), int(sys.argv[1]))
    return clip(*args, **kwargs)

torch.nn.utils.clip_grad_norm_ = signalled
sys.exit(main(sys.argv[2:]))
"""


def train_words(folder: Path, steps: int = STEPS) -> list[str]:
    """`tt-fast` arguments of a run of so many steps."""
    budget = ["--max-windows", str(steps * BATCH)]
    return ["train", DEMO, "--output-dir", str(folder), *OPTIONS, *budget]


def torchrun(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """A job of two processes, of one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*command, "--nproc-per-node", "2", *words],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def alone(words: Sequence[str]) -> None:
    """The same in this process, with two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run(*words)
    finally:
        torch.set_num_threads(before)


def signalled(folder: Path, number: signal.Signals, run_folder: Path) -> list[str]:
    """Words of a job whose process of rank 1 gets a signal in its seventh step."""
    script = folder / "signalled.py"
    script.write_text(_SIGNALLED)
    return [str(script), str(number.value), *train_words(run_folder)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of one process, undisturbed."""
    folder = tmp_path_factory.mktemp("whole")
    alone(train_words(folder))
    return folder


def assert_same_run(folder: Path, whole: Path) -> None:
    """The same weights, bit for bit, and the same losses: gradients were summed in one order."""
    assert weights_equal(Checkpoint.load(folder).model, Checkpoint.load(whole).model)
    rows, wanted = (read_metrics(path / "metrics.csv") for path in (folder, whole))
    assert len(rows) == len(wanted) == STEPS // 2
    names = [name for name in COLUMNS if name != "tokens_per_second"]
    for row, want in zip(rows, wanted, strict=True):
        # losses are float64 sums of float32 ones, printed with 8 digits
        assert [row[k] for k in names] == pytest.approx([want[k] for k in names], rel=2e-7)


def test_two_processes_train_what_one_trains(tmp_path: Path, whole: Path) -> None:
    done = torchrun(["-m", "tt_fast", *train_words(tmp_path)])
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path, whole)
    assert done.stdout.count("loss, nats per token") == 1  # one of them speaks
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_a_job_of_another_size_resumes(tmp_path: Path, whole: Path) -> None:
    grows, shrinks = tmp_path / "grows", tmp_path / "shrinks"
    alone(train_words(grows, steps=6))
    done = torchrun(["-m", "tt_fast", *train_words(shrinks, steps=6)])
    assert done.returncode == 0, done.stderr
    # a shorter budget warms up and cools down faster: these runs differ from the whole one
    alone([*train_words(shrinks), "--resume"])
    done = torchrun(["-m", "tt_fast", *train_words(grows), "--resume"])
    assert done.returncode == 0, done.stderr
    assert Checkpoint.load(grows).metadata["step"] == STEPS
    assert weights_equal(Checkpoint.load(grows).model, Checkpoint.load(shrinks).model)
    assert not weights_equal(Checkpoint.load(grows).model, Checkpoint.load(whole).model)


def test_a_killed_process_ends_the_job_which_resumes(tmp_path: Path, whole: Path) -> None:
    folder = tmp_path / "run"
    done = torchrun(signalled(tmp_path, signal.SIGKILL, folder))
    assert done.returncode != 0
    assert re.search(
        r"worker 0 of 2: another one has ended or is out of reach: .* resume from it", done.stderr
    )
    assert f"Signal {signal.SIGKILL.value} (SIGKILL)" in done.stderr  # torchrun names the culprit
    newest = newest_checkpoint(folder)
    assert newest is not None
    assert Checkpoint.load(newest).metadata["step"] == 4
    alone([*train_words(folder), "--resume"])
    assert_same_run(folder, whole)


def test_one_that_is_told_to_end_stops_all_after_the_step(tmp_path: Path, whole: Path) -> None:
    folder = tmp_path / "run"
    done = torchrun(signalled(tmp_path, signal.SIGTERM, folder))
    assert done.returncode != 0
    assert "tt-fast: interrupted: the newest checkpoint is" in done.stderr
    newest = newest_checkpoint(folder)
    assert newest is not None
    assert Checkpoint.load(newest).metadata["step"] == 7
    alone([*train_words(folder), "--resume"])
    assert_same_run(folder, whole)


def test_workers_that_see_other_folders_are_refused(tmp_path: Path) -> None:
    script = tmp_path / "apart.py"
    script.write_text(
        "import os, sys\n"
        "from tt_fast.cli import main\n"
        "if os.environ['RANK'] == '1':\n"
        "    sys.argv[3] += '-other'  # a disk of its own\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    folder = tmp_path / "run"
    words = ["train", "--output-dir", str(folder), *train_words(folder)[1:2], *OPTIONS]
    alone([*words, "--max-windows", "32"])
    done = torchrun([str(script), *words, "--max-windows", "64", "--resume"])
    assert done.returncode != 0
    assert "output_dir: expected one folder that all of them see" in done.stderr
    assert Checkpoint.load(folder).metadata["step"] == 4


def test_alone_nothing_is_exchanged() -> None:
    with join_workers("auto") as workers:
        assert workers == Workers(0, 1)
        value = torch.tensor([3.0])
        workers.sum(value)
        assert value.item() == 3.0
        assert workers.agree(0.1) == 0.1
        workers.wait()
    assert not torch.distributed.is_initialized()


def test_a_group_of_the_callers_is_used_and_left(tmp_path: Path) -> None:
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        with join_workers("cpu") as workers:
            assert workers == Workers(0, 1)
        assert torch.distributed.is_initialized()
    finally:
        torch.distributed.destroy_process_group()


def test_a_torch_without_processes_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    monkeypatch.delattr(torch.distributed, "is_torchelastic_launched")
    assert is_first_process()
    with join_workers("cpu") as workers:
        assert workers == Workers()


def test_a_group_that_cannot_sum_there_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        monkeypatch.setattr(dist, "get_backend_config", lambda: "cuda:nccl")
        message = "device: expected one of the process group's, cuda, got 'cpu'"
        with pytest.raises(ValueError, match=message), join_workers("cpu"):
            pass
    finally:
        dist.destroy_process_group()
