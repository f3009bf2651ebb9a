"""The recipes of docs/migrate.md, run as they are written."""

from __future__ import annotations

import re
import shlex
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gpt_twin import GPT, QuantileDiscretizer
from tiny import tiny_model

from tt_fast import Checkpoint, Discretizer
from tt_fast.cli import parse

PAGE = (Path(__file__).parents[1] / "docs" / "migrate.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"<!-- recipe: (.+?) -->\n```python\n(.*?)```", PAGE, re.DOTALL))
DIMS = {"observation_dim": 11, "action_dim": 3}  # hopper's

METADATA = {"dataset": "hopper-medium-v2", "env_id": "Hopper-v4", "discount": 0.99}


def hopper() -> Checkpoint:
    """A tiny model of hopper's dimensions."""
    rows = np.random.default_rng(0).normal(size=(500, 16))
    return Checkpoint(tiny_model(**DIMS), Discretizer.fit(rows, 8), METADATA)


def run(recipe: str, **names: Any) -> dict[str, Any]:
    """The names after a recipe, which found `names` when it began."""
    exec(compile(RECIPES[recipe], f"docs/migrate.md: {recipe}", "exec"), names)
    return names


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_every_recipe_is_run() -> None:
    assert set(RECIPES) == {"jannerm import", "jannerm checkpoint", "faster_tt", "huggingface"}
    assert len(re.findall(r"^Before:\n\n```python\n", PAGE, re.MULTILINE)) == 3


def test_jannerm_import() -> None:
    checkpoint = hopper()
    assert checkpoint.discretizer is not None
    discretizer = QuantileDiscretizer(checkpoint.discretizer.thresholds)
    names = run(
        "jannerm import",
        gpt=GPT(checkpoint.model), discretizer=discretizer, context=[], observation=np.zeros(11),
        value_fn=lambda probs: discretizer.value_fn(probs, "mean"), **DIMS,
    )  # fmt: skip
    assert tuple(names["sequence"].shape) == (15, 16)
    assert names["action"].shape == (3,)
    assert [tuple(tokens.shape) for tokens in names["context"]] == [(1, 16)]


def test_jannerm_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = hopper().save_foreign("logs/hopper-medium-v2/gpt/azure", "jannerm")
    (folder / "discretizer.npz").unlink()  # as the original writes it
    demo = next(p for p in files("tt_fast").joinpath("assets").iterdir() if ".hdf5" in p.name)
    shutil.copy(str(demo), tmp_path / "hopper_medium-v2.hdf5")
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    names = run("jannerm checkpoint")
    assert names["checkpoint"].discretizer.num_bins == 8
    assert float(capsys.readouterr().out) == names["result"].normalized_mean


class VecEnv:
    """Two environments that are done at the third step."""

    num_envs, steps = 2, 0

    def reset(self) -> Any:
        return np.zeros((2, 11))

    def step(self, actions: Any) -> tuple[Any, ...]:
        assert actions.shape == (2, 3)
        self.steps += 1
        return np.zeros((2, 11)), np.ones(2), np.full(2, self.steps == 3), [{}, {}]


def test_faster_tt() -> None:
    hopper().save_foreign("pretrained/hopper", "faster_tt")
    names = run("faster_tt", vec_env=VecEnv())
    assert tuple(names["plan"].shape) == (5 * 16 - 11,)
    np.testing.assert_array_equal(names["rewards"], [3.0, 3.0])


def test_huggingface() -> None:
    hopper().save_foreign("CarlCochet/trajectory-transformer-hopper-medium-v2", "huggingface")
    names = run(
        "huggingface",
        trajectories=torch.randint(0, 8, (2, 27)),
        transitions=np.random.default_rng(0).normal(size=(400, 16)),
    )
    assert tuple(names["outputs"].logits.shape) == (2, 27, 9)
    assert names["plan"].tokens.shape == (2, 15, 16)


def test_the_commands_parse() -> None:
    lines = [line for line in PAGE.splitlines() if line.startswith("tt-fast ")]
    assert len(lines) == 2
    for line in lines:
        assert parse(shlex.split(line)[1:]).run
