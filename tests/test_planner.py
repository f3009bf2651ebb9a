"""The planner's clocks: what enters the context, when it plans, and every refusal."""

from typing import Any

import numpy as np
import pytest
import torch
from tiny import ACTION_DIM, NUM_BINS, OBSERVATION_DIM, tiny_checkpoint

from tt_fast import Checkpoint, PlanConfig, Planner, beam_plan

D = OBSERVATION_DIM + ACTION_DIM + 2
CONFIG = PlanConfig(horizon=3, beam_width=3, n_expand=2, max_context_transitions=2)


def make_planner(config: PlanConfig = CONFIG, **options: Any) -> Planner:
    return Planner(tiny_checkpoint(), config, **options)


def observations(num_steps: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=(num_steps, OBSERVATION_DIM))


def play(planner: Planner, num_steps: int, seed: int = 0) -> list[Any]:
    """Actions of an episode whose observations and rewards do not depend on them."""
    actions = []
    for observation in observations(num_steps, seed):
        actions.append(planner.act(observation))
        planner.observe(float(observation.sum()))
    return actions


def test_acts_as_the_original_loop() -> None:
    """scripts/plan.py:60-110 by hand, through beam_plan."""
    checkpoint = tiny_checkpoint()
    assert checkpoint.discretizer is not None
    planner = Planner(checkpoint, CONFIG, seed=3)
    history: list[Any] = []
    for t, observation in enumerate(observations(5)):
        action = planner.act(observation)
        now = checkpoint.discretizer.encode(observation[None], slice(0, OBSERVATION_DIM))[0]
        plan = beam_plan(
            checkpoint.model,
            checkpoint.discretizer,
            [np.concatenate([*history, now])],
            PlanConfig(**{**vars(CONFIG), "discount": 0.9}),
            seed=3,
            plan_index=t,
        )
        decoded = checkpoint.discretizer.decode(plan.tokens[0])
        want = decoded[0, OBSERVATION_DIM:-2]
        np.testing.assert_array_equal(action, want.astype(np.float32))
        assert not isinstance(planner.last_plan, list)
        assert planner.last_plan is not None
        np.testing.assert_array_equal(planner.last_plan.tokens, plan.tokens[0])
        np.testing.assert_array_equal(planner.last_plan.observations, decoded[:, :OBSERVATION_DIM])
        assert planner.last_plan.score == plan.scores[0]
        planner.observe(1.5)
        row = np.concatenate([observation, want, [1.5, 1e6]])
        history = [*history, checkpoint.discretizer.encode(row[None])[0]][-2:]
        assert history[-1][-1] == NUM_BINS - 1  # the placeholder


def test_same_seed_same_actions() -> None:
    first, again = play(make_planner(seed=4), 4), play(make_planner(seed=4), 4)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, play(make_planner(seed=5), 4))


def test_reset_forgets_everything() -> None:
    planner = make_planner()
    first = play(planner, 4)
    planner.reset()
    np.testing.assert_array_equal(play(planner, 4), first)
    planner.reset(seed=9)
    np.testing.assert_array_equal(play(planner, 4), play(make_planner(seed=9), 4))


def test_plan_freq_follows_the_last_plan() -> None:
    planner = make_planner(plan_freq=2)
    for t, observation in enumerate(observations(6)):
        action = planner.act(observation)
        assert planner.num_plans == t // 2 + 1
        assert not isinstance(planner.last_plan, list)
        assert planner.last_plan is not None
        want = planner.last_plan.actions[t % 2].astype(np.float32)
        np.testing.assert_array_equal(action, want)
        planner.observe(0.0)


def test_a_plan_that_the_deadline_cut_is_followed_by_a_new_one() -> None:
    """Its actions are used up before plan_freq steps have passed."""
    config = PlanConfig(**{**vars(CONFIG), "horizon": 60, "beam_width": 64})
    planner = make_planner(config, plan_freq=60, deadline_ms=1e-3)
    lengths = []
    for step, observation in enumerate(observations(4)):
        plans_before = planner.num_plans
        planner.act(observation)
        planner.observe(0.0)
        plan = planner.last_plan
        assert not isinstance(plan, list)
        assert plan is not None
        if planner.num_plans > plans_before:
            lengths.append(step + len(plan.actions))
        assert 1 <= plan.num_beams < 64
        assert step < lengths[-1] < 60  # there was an action for this step
    assert len(lengths) >= 1


def test_a_far_deadline_and_threads_change_nothing() -> None:
    want = play(make_planner(), 4)
    np.testing.assert_array_equal(play(make_planner(deadline_ms=1e6), 4), want)
    np.testing.assert_array_equal(play(make_planner(num_threads=3), 4), want)


def test_without_prefix_context_only_the_observation_counts() -> None:
    config = PlanConfig(**{**vars(CONFIG), "k_act": 1, "k_obs": 1})
    with_past, alone = make_planner(config), make_planner(config, prefix_context=False)
    play(alone, 3, seed=1)
    last = observations(1, seed=2)[0]
    fresh = make_planner(config, prefix_context=False)
    np.testing.assert_array_equal(alone.act(last), fresh.act(last))
    play(with_past, 3, seed=1)
    assert with_past.act(last).shape == (ACTION_DIM,)
    assert not isinstance(with_past.last_plan, list)
    assert with_past.last_plan is not None
    assert not isinstance(fresh.last_plan, list)
    assert fresh.last_plan is not None
    assert with_past.last_plan.score != fresh.last_plan.score


def test_actions_are_clipped_to_the_bounds() -> None:
    free, bound = play(make_planner(), 4), play(make_planner(action_bounds=(-0.1, [0.1, 0.2])), 4)
    assert np.abs(free[0]).max() > 0.2
    np.testing.assert_array_equal(
        bound[0], np.clip(free[0], np.float32(-0.1), np.float32([0.1, 0.2]))
    )


def test_other_types_are_refused() -> None:
    message = (
        r"checkpoint: expected a tt_fast.Checkpoint \(Checkpoint.load reads a folder\), got 'st"
    )
    with pytest.raises(ValueError, match=message):
        Planner("runs/hopper")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"plan_config: expected a tt_fast.PlanConfig, got 'dict'"):
        Planner(tiny_checkpoint(), {"horizon": 3})  # type: ignore[arg-type]


def test_discount_is_the_checkpoints_unless_given() -> None:
    assert make_planner().plan_config.discount == 0.9
    assert make_planner(PlanConfig(discount=0.5)).plan_config.discount == 0.5
    checkpoint = tiny_checkpoint()
    for metadata, want in (({}, 0.99), ({"discount": None}, 0.99), ({"discount": 0.0}, 0.0)):
        other = Checkpoint(checkpoint.model, checkpoint.discretizer, metadata)
        assert Planner(other, CONFIG).plan_config.discount == want
    other = Checkpoint(checkpoint.model, checkpoint.discretizer, {"discount": "x"})
    with pytest.raises(ValueError, match=r"checkpoint.metadata\['discount'\]: expected a finite"):
        Planner(other, CONFIG)


@pytest.mark.parametrize("plan_freq", [1, 2])
def test_staggered_environments_equal_single_ones(plan_freq: int) -> None:
    """Three environments, each reset at its own time, against three planners of their own."""
    batch = make_planner(seed=7, num_envs=3, plan_freq=plan_freq)
    single = [make_planner(seed=7 + i, plan_freq=plan_freq) for i in range(3)]
    rng = np.random.default_rng(0)
    for t in range(12):
        rows = rng.normal(size=(3, OBSERVATION_DIM))
        for i in range(3):
            if t % (3 + i) == 2:
                batch.reset(i)
                single[i].reset()
        active = rng.random(3) < 0.7
        rows[~active] = np.nan  # whatever an inactive environment shows is not looked at
        actions = batch.act(rows, active)
        np.testing.assert_array_equal(actions[~active], 0.0)
        for i in np.flatnonzero(active):
            np.testing.assert_array_equal(actions[i], single[i].act(rows[i]))
        if active.any():
            rewards = rng.normal(size=3)
            batch.observe(rewards, np.zeros(3, bool))
            for i in np.flatnonzero(active):
                single[i].observe(rewards[i])
    assert batch.num_plans == sum(planner.num_plans for planner in single)


def test_a_seed_given_at_reset_stays() -> None:
    planner = make_planner(num_envs=2)
    planner.reset(seed=9)
    planner.reset()
    planner.reset(1)
    rows = observations(2)
    want = [make_planner(seed=9 + i).act(rows[i]) for i in range(2)]
    np.testing.assert_array_equal(planner.act(rows), want)


def test_one_terminated_flag_for_all_environments() -> None:
    planner, rows = make_planner(num_envs=2), observations(2)
    planner.act(rows)
    planner.observe(np.zeros(2))
    planner.act(rows)
    planner.observe(np.zeros(2), terminated=True)
    with pytest.raises(RuntimeError, match="expected reset first, environment 0"):
        planner.act(rows)


def test_replicate_makes_fresh_clocks_on_the_same_model() -> None:
    planner = make_planner(seed=2, plan_freq=2)
    play(planner, 1)
    batch = planner.replicate(2)
    assert batch.checkpoint is planner.checkpoint
    assert (batch.plan_freq, batch.num_envs, batch.num_plans) == (2, 2, 0)
    rows = observations(2)
    np.testing.assert_array_equal(batch.act(rows)[0], make_planner(seed=2).act(rows[0]))


def test_a_replica_keeps_bounds_and_deadline() -> None:
    planner = make_planner(action_bounds=(-0.1, 0.5), deadline_ms=1e6)
    replica = planner.replicate(1, (-1.0, [0.2, 1.0]))
    assert replica.deadline_ms == 1e6
    rows = observations(1)
    free, low, high = make_planner().act(rows[0]), np.float32(-0.1), np.float32([0.2, 0.5])
    np.testing.assert_array_equal(replica.act(rows)[0], np.clip(free, low, high))
    np.testing.assert_array_equal(planner.replicate(1).act(rows)[0], np.clip(free, low, 0.5))
    with pytest.raises(ValueError, match="action_bounds: expected low <= high"):
        planner.replicate(1, (0.7, 1.0))


# ---- refusals ----


@pytest.mark.parametrize(
    ("observation", "message"),
    [
        ([0.0, np.nan, 0.0], r"observation: expected finite numbers, got 'nan at index 1 of env"),
        ([0.0, np.inf, 0.0], r"observation: expected finite numbers, got 'inf"),
        ([0.0, 0.0], r"observation: expected shape \(3,\), got \(2,\)"),
        ([[0.0, 0.0, 0.0]], r"observation: expected shape \(3,\), got \(1, 3\)"),
        ({"pixels": 1}, r"observation: expected numbers of shape \(3,\)"),
        ("abc", r"observation: expected numbers of shape \(3,\)"),
        ([0.0, [1.0], 0.0], r"observation: expected numbers of shape \(3,\)"),
        (np.array(["1", "2", "3"]), r"observation: expected numbers of shape \(3,\)"),
        (np.array([1.0 + 2.0j, 0.0, 0.0]), r"observation: expected numbers of shape \(3,\)"),
        (torch.zeros(3, requires_grad=True), r"observation: expected numbers of shape \(3,\)"),
    ],
)
def test_bad_observations_enter_nothing(observation: Any, message: str) -> None:
    planner = make_planner()
    play(planner, 2)
    with pytest.raises(ValueError, match=message):
        planner.act(observation)
    untouched = make_planner()
    play(untouched, 2)
    row = observations(1, seed=5)[0]
    np.testing.assert_array_equal(planner.act(row), untouched.act(row))


def test_bad_rewards_enter_nothing() -> None:
    planner, row = make_planner(), observations(1)[0]
    planner.act(row)
    with pytest.raises(ValueError, match=r"reward: expected finite numbers, got 'nan"):
        planner.observe(np.nan)
    with pytest.raises(ValueError, match=r"reward: expected shape \(\), got \(1,\)"):
        planner.observe([1.0])
    with pytest.raises(ValueError, match=r"reward: expected numbers of shape \(\)"):
        planner.observe(torch.tensor(1.0, requires_grad=True))
    for flag in (None, 2, -1, 0.5, [True]):
        with pytest.raises(ValueError, match=r"terminated: expected bool of shape \(\)"):
            planner.observe(1.0, flag)
    planner.observe(1.0)
    other = make_planner()
    other.act(row)
    other.observe(1.0)
    np.testing.assert_array_equal(planner.act(row), other.act(row))


def test_one_bad_environment_stops_the_batch_before_anything_enters() -> None:
    planner = make_planner(num_envs=2)
    rows = observations(2)
    bad = rows.copy()
    bad[1, 0] = np.nan
    with pytest.raises(ValueError, match=r"got 'nan at index 0 of environment 1"):
        planner.act(bad)
    np.testing.assert_array_equal(planner.act(rows), make_planner(num_envs=2).act(rows))


def test_calls_out_of_order() -> None:
    planner, row = make_planner(), observations(1)[0]
    with pytest.raises(RuntimeError, match="observe: expected after act"):
        planner.observe(1.0)
    planner.act(row)
    with pytest.raises(RuntimeError, match="act: expected observe first, environment 0"):
        planner.act(row)
    planner.observe(1.0, terminated=True)
    with pytest.raises(RuntimeError, match="act: expected reset first, environment 0"):
        planner.act(row)
    planner.reset()
    planner.act(row)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plan_freq": 4}, r"plan_freq: expected an integer >= 1 and <= 3, got 4"),
        ({"num_envs": 0}, r"num_envs: expected an integer >= 1, got 0"),
        ({"seed": -1}, r"seed: expected an integer >= 0"),
        ({"action_bounds": (1.0, -1.0)}, r"action_bounds: expected low <= high"),
        ({"action_bounds": (-1.0, [1.0] * 3)}, r"action_bounds: expected \(low, high\)"),
        ({"action_bounds": (1.0,)}, r"action_bounds: expected \(low, high\)"),
        ({"backend": "abacus"}, r"backend: expected one of"),
        ({"prefix_context": "no"}, r"prefix_context: expected one of False, True, got 'no'"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_planner(**options)


def test_settings_that_do_not_fit_the_model() -> None:
    with pytest.raises(
        ValueError, match=r"overflow: expected context \+ horizon <= .*got '2 \+ 3 = 5"
    ):
        make_planner(PlanConfig(horizon=3, max_context_transitions=2, overflow="grow"))
    make_planner(PlanConfig(horizon=3, max_context_transitions=None, overflow="grow"))
    with pytest.raises(ValueError, match="model: expected one without goal"):
        Planner(tiny_checkpoint(goal_conditioned=True), CONFIG)
    with pytest.raises(ValueError, match="checkpoint: expected one with a discretizer"):
        Planner(Checkpoint(tiny_checkpoint().model, None), CONFIG)


def test_active_is_for_batches() -> None:
    with pytest.raises(ValueError, match="active: expected None without num_envs"):
        make_planner().act(observations(1)[0], active=[True])
    with pytest.raises(ValueError, match=r"active: expected \(2,\) bool, got"):
        make_planner(num_envs=2).act(observations(2), active=[1, 0])
    with pytest.raises(ValueError, match="env_idx: expected an integer >= 0 and <= 1, got 2"):
        make_planner(num_envs=2).reset(2)
