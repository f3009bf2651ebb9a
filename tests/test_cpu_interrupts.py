"""The C++ backend beside other threads and processes, and plans that end early."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cpu_cases import CONFIG, DRAWS, assert_same_plan, context, mean_values, tiny_backend
from numpy.typing import NDArray
from tiny import OBSERVATION_DIM

from tt_fast.planning import BeamPlan
from tt_fast.planning.base import Draws

# --- threads and forks ----------------------------------------------------------------------------


def test_two_python_threads_share_a_backend() -> None:
    backend = tiny_backend()
    want = [backend.plan([context(seed=i)], CONFIG, DRAWS) for i in range(8)]
    got: list[BeamPlan | None] = [None] * 8

    def work(first: int) -> None:
        for i in range(first, 8, 2):
            got[i] = backend.plan([context(seed=i)], CONFIG, DRAWS)

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for plan, other in zip(got, want, strict=True):
        assert plan is not None
        assert_same_plan(plan, other)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_child_can_plan() -> None:
    """It has none of its parent's threads, drops what it got of them, and has threads itself."""
    backend, other = tiny_backend(num_threads=4), tiny_backend(num_threads=4)
    want = backend.plan([context()], CONFIG, DRAWS)
    other.plan([context()], CONFIG, DRAWS)

    def plans_the_same() -> bool:
        own = tiny_backend(num_threads=4)
        plans = [b.plan([context()], CONFIG, DRAWS) for b in (own, backend)]
        other._searches.clear()
        plans += [b.plan([context()], CONFIG, DRAWS) for b in (own, other)]
        return all(np.array_equal(plan.tokens, want.tokens) for plan in plans)

    assert exit_code_of_child(plans_the_same) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_child_forked_in_the_middle_of_a_plan_can_plan() -> None:
    backend = tiny_backend(num_threads=2)
    started, forked = threading.Event(), threading.Event()

    def value_fn(probs: NDArray[np.float32]) -> tuple[Any, Any]:
        started.set()
        forked.wait()
        return mean_values(probs)

    def plans() -> bool:
        return backend.stats().rows_asked == 0 and len(
            backend.plan([context()], CONFIG, DRAWS).tokens
        )

    thread = threading.Thread(
        target=backend.plan, args=([context()], CONFIG, DRAWS), kwargs={"value_fn": value_fn}
    )
    thread.start()
    started.wait()
    code = exit_code_of_child(plans)
    forked.set()
    thread.join()
    assert code == 0


def exit_code_of_child(works: Callable[[], bool]) -> int:
    """0 if it works in a forked child; that one is ended after 20 seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of any fork beside threads
        child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(0 if works() else 1)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


# --- deadlines and interrupts ---------------------------------------------------------------------


def test_a_far_deadline_changes_nothing() -> None:
    backend = tiny_backend()
    want = backend.plan([context()], CONFIG, DRAWS)
    got = backend.plan([context()], CONFIG, DRAWS, deadline_ms=1e6)
    assert_same_plan(got, want)
    assert got.num_steps is not None
    assert got.num_steps.tolist() == [CONFIG.horizon]
    assert got.num_beams_of(0, CONFIG) == CONFIG.beam_width


@pytest.mark.parametrize("num_contexts", [1, 3])
def test_a_passed_deadline_still_gives_a_step(num_contexts: int) -> None:
    backend = tiny_backend()
    config = replace(CONFIG, horizon=50, beam_width=64)
    contexts = [context(i) for i in range(num_contexts)]
    draws = Draws(tuple(range(num_contexts)), (0,) * num_contexts)
    plan = backend.plan(contexts, config, draws, deadline_ms=1e-3)
    assert plan.num_steps is not None
    for i in range(num_contexts):
        tokens = plan.tokens_of(i)
        assert 1 <= len(tokens) < config.horizon
        assert (tokens[0, :OBSERVATION_DIM] == contexts[i][-OBSERVATION_DIM:]).all()
        assert plan.num_beams_of(i, config) < config.beam_width
        assert np.isfinite(plan.rewards[i, : len(tokens)]).all()
        assert np.isfinite(plan.scores[i])


def test_a_deadline_foresees_the_value_function() -> None:
    """It is not called for a step that it would finish too late."""
    calls = 0

    def slow(probs: NDArray[np.float32]) -> tuple[Any, Any]:
        nonlocal calls
        calls += 1
        threading.Event().wait(0.5)
        return mean_values(probs)

    backend, config = tiny_backend(), replace(CONFIG, horizon=10)
    plan = backend.plan([context()], config, DRAWS, value_fn=slow, deadline_ms=1400)
    # twice 500 ms have passed, or once on a busy machine: 400 ms are left at most
    assert calls == len(plan.tokens_of(0)) <= 2


def test_a_plan_cut_short_is_the_shorter_plan() -> None:
    """What a deadline leaves is what the plan of so many steps would have been."""
    backend = tiny_backend()
    config = replace(CONFIG, horizon=40)
    calls = 0

    def slow(probs: NDArray[np.float32]) -> tuple[Any, Any]:
        nonlocal calls
        calls += 1
        if calls == 3:
            threading.Event().wait(1.5)
        return mean_values(probs)

    got = backend.plan([context()], config, DRAWS, value_fn=slow, deadline_ms=1400)
    num_steps = len(got.tokens_of(0))
    assert 1 <= num_steps <= 3  # the third step outlasts the deadline
    shorter = replace(config, horizon=num_steps)
    want = backend.plan([context()], shorter, DRAWS, value_fn=mean_values)
    np.testing.assert_array_equal(got.tokens_of(0), want.tokens[0])
    np.testing.assert_array_equal(got.scores, want.scores)


def test_ctrl_c_ends_a_plan() -> None:
    backend = tiny_backend()
    config = replace(CONFIG, horizon=100_000, beam_width=32)
    timer = threading.Timer(0.2, signal.raise_signal, (signal.SIGINT,))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        backend.plan([context()], config, DRAWS)
    timer.join()


ENDS_WHILE_A_THREAD_PLANS = """
import threading, time
from dataclasses import replace
from cpu_cases import CONFIG, DRAWS, context, tiny_backend

def busy(probs):
    return sum(probs[:, 0].T), sum(probs[:, 1].T)

def asleep(probs):
    time.sleep(0.02)
    return probs[:, 0].sum(axis=1), probs[:, 1].sum(axis=1)

backend, config = tiny_backend(num_threads=2), replace(CONFIG, horizon=100_000, beam_width=32)
options = dict(value_fn={value_fn})
plan = threading.Thread(
    target=backend.plan, args=([context()], config, DRAWS), kwargs=options, daemon=True
)
plan.start()
time.sleep(0.3)
assert plan.is_alive()
"""


@pytest.mark.parametrize("value_fn", ["None", "busy", "asleep"])
def test_the_interpreter_ends_while_a_daemon_thread_plans(value_fn: str) -> None:
    """That thread asks for the interpreter's lock at every step, and gets it no more."""
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", ENDS_WHILE_A_THREAD_PLANS.format(value_fn=value_fn)],
            cwd=Path(__file__).parent, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
