"""Training resumes bit for bit, and survives being killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_model_config, weights_equal
from train_runs import columns, interrupt_in_step, run

from tt_fast import Checkpoint
from tt_fast.checkpoint import newest_checkpoint
from tt_fast.files import locked


# before the first checkpoint, on one, in epoch 2
@pytest.mark.parametrize(
    ("stop", "goal_conditioned"), [(2, False), (5, False), (17, False), (5, True)]
)
def test_interrupted_and_resumed_equals_uninterrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int, goal_conditioned: bool
) -> None:
    model = tiny_model_config(goal_conditioned=goal_conditioned)
    whole = run(tmp_path / "whole", 20, model)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_in_step(stop, patch)
        run(tmp_path / "parts", 20, model)
    assert Checkpoint.load(tmp_path / "parts").metadata["step"] == stop
    resumed = run(tmp_path / "parts", 20, model, resume=True)
    assert weights_equal(resumed.model, whole.model)
    assert columns(tmp_path / "parts") == columns(tmp_path / "whole")


def test_checkpoints_do_not_change_the_result(tmp_path: Path) -> None:
    rare, frequent = run(tmp_path / "rare", 9), run(tmp_path / "often", 9, checkpoint_steps=1)
    assert weights_equal(rare.model, frequent.model)


def test_more_frequent_rows_after_resuming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_in_step(5, patch)
        run(tmp_path, 10, log_steps=100)
    run(tmp_path, 10, log_steps=2, resume=True)
    assert [row[0] for row in columns(tmp_path)] == [6, 8, 10]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_resumed_run_keeps_no_checkpoint_mapped(tmp_path: Path) -> None:
    mapped = []

    def evaluator(checkpoint: Checkpoint) -> float:
        mapped.append("training_state" in Path("/proc/self/maps").read_text())
        return 0.0

    run(tmp_path, 4)
    run(tmp_path, 8, resume=True, eval_every=8, evaluator=evaluator)
    assert mapped == [False]


def test_a_finished_run_resumes_to_itself(tmp_path: Path) -> None:
    first = run(tmp_path, 7)
    again = run(tmp_path, 7, resume=True)
    assert weights_equal(first.model, again.model)
    assert again.metadata["eval_losses"] == first.metadata["eval_losses"]


def test_a_longer_budget_goes_on(tmp_path: Path) -> None:
    run(tmp_path, 7)
    assert run(tmp_path, 11, resume=True).metadata["step"] == 11


def test_resume_without_a_checkpoint_starts(tmp_path: Path) -> None:
    assert run(tmp_path, 3, resume=True).metadata["step"] == 3


_KILLED_RUN = """
import os, signal, sys
from importlib import import_module
from pathlib import Path

_, tests, folder, steps, module, name, fatal_call = sys.argv
sys.path.insert(0, tests)
from train_runs import run

function, calls = getattr(import_module(module), name), iter(range(1, 10**9))

def deadly(*args, **kwargs):
    if next(calls) == int(fatal_call):
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*args, **kwargs)

setattr(import_module(module), name, deadly)
run(Path(folder), int(steps), checkpoint_steps=1, resume=True)
"""

# a save flushes five files and a folder, and deletes the oldest of three checkpoints
_KILLS = [
    ("tt_fast.files", "_flush_to_disk", 5),  # in the first save: nothing is there yet
    ("tt_fast.files", "_flush_to_disk", 11),  # in the second: the first one stands
    ("shutil", "rmtree", 2),  # deleting: first what the kill before left, then a checkpoint
    ("torch.nn.utils", "clip_grad_norm_", 3),  # between saves
    ("tt_fast.checkpoint", "save_file", 2),  # writing weights
]


def test_kill_9_in_a_save_then_resume_equals_uninterrupted(tmp_path: Path) -> None:
    folder, total = tmp_path / "killed", 12
    steps = []
    for kill in _KILLS:
        arguments = [str(Path(__file__).parent), str(folder), str(total), *map(str, kill)]
        done = subprocess.run(
            [sys.executable, "-c", _KILLED_RUN, *arguments],
            check=False,
            capture_output=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
        newest = newest_checkpoint(folder)
        steps.append(0 if newest is None else Checkpoint.load(newest).metadata["step"])
    assert steps == sorted(steps)
    assert 0 == steps[0] < steps[1] < steps[-1] < total
    resumed = run(folder, total, resume=True)
    whole = run(tmp_path / "whole", total)
    assert weights_equal(resumed.model, whole.model)
    assert columns(folder) == columns(tmp_path / "whole")
    leftovers = [p.name for p in (folder / "checkpoints").iterdir() if p.name.startswith(".")]
    assert leftovers == []


def test_kill_9_between_two_renames_of_a_checkpoint(tmp_path: Path) -> None:
    whole = run(tmp_path, 4)
    newest = tmp_path / "checkpoints" / "step_00000004"
    newest.rename(newest.with_name(".step_00000004.old"))
    (newest.parent / "..step_00000004.new.abcdefgh").mkdir()
    again = run(tmp_path, 4, resume=True)
    assert weights_equal(again.model, whole.model)
    assert [path.name for path in newest.parent.iterdir()] == [newest.name]


def test_sigterm_saves_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_in_step(3, monkeypatch, signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, 8)
    assert Checkpoint.load(tmp_path).metadata["step"] == 3


def test_kill_9_between_two_renames_is_no_reason_to_start_again(tmp_path: Path) -> None:
    run(tmp_path, 4)
    newest = tmp_path / "checkpoints" / "step_00000004"
    newest.rename(newest.with_name(".step_00000004.old"))
    with pytest.raises(FileExistsError, match="step_00000004"):
        run(tmp_path, 2)
    assert Checkpoint.load(tmp_path).metadata["step"] == 4


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path, "run"):
        with pytest.raises(BlockingIOError, match="output_dir: expected no other run at work"):
            run(tmp_path, 2)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert run(tmp_path, 2).metadata["step"] == 2
