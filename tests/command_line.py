"""`tt-fast` in this process: run it, read what it prints, and a small model to run it on."""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import pytest
from toy_env import ACTION_DIM, OBSERVATION_DIM, register_toy

from tt_fast.checkpoint import Checkpoint
from tt_fast.cli import main
from tt_fast.config import ModelConfig
from tt_fast.discretizer import Discretizer
from tt_fast.model import TrajectoryTransformer

TOY = register_toy()
DEMO = str(files("tt_fast") / "assets" / "hopper-demo.hdf5")
BEAM = ["--horizon", "2", "--beam-width", "3", "--k-act", "3", "--cdf-act", "None"]
SMALL = ["--embed-dim", "8", "--num-heads", "2", "--num-layers", "1", "--num-transitions", "2"]
SMALL += ["--batch-size", "8", "--no-progress"]


def save_model(folder, **metadata):
    """A small model with random weights for the toy environment."""
    config = ModelConfig(OBSERVATION_DIM, ACTION_DIM, 10, 4, 1, 2, 8)
    edges = np.linspace(-3.0, 3.0, 11)[:, None] * np.ones(config.transition_dim)
    metadata = {"discount": 0.9, "env_id": TOY, "dataset": "toy-data", "step": 5} | metadata
    model = TrajectoryTransformer(config).eval()
    return Checkpoint(model, Discretizer(edges), metadata).save(folder)


def run(*argv, status=0):
    assert main([str(word) for word in argv]) == status


def refuse(capsys, *argv):
    """The one line that a user's error prints."""
    run(*argv, status=2)
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert shown.startswith("tt-fast: error: ")
    return shown.removeprefix("tt-fast: error: ").strip()


def usage_error(capsys, *argv):
    """What the parser prints about a wrong command line, its box removed."""
    with pytest.raises(SystemExit) as exit_info:
        main([str(word) for word in argv])
    assert exit_info.value.code == 2
    return " ".join(capsys.readouterr().err.replace("│", " ").split())


def help_text(capsys, *argv):
    with pytest.raises(SystemExit) as exit_info:
        main([*argv, "--help"])
    assert exit_info.value.code == 0
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


def ctrl_c(*args, **kwargs):
    raise KeyboardInterrupt


def collect_toy(folder):
    """A file with 200 random steps in the toy environment."""
    out = folder / "toy.hdf5"
    run("data", "collect", TOY, "--num-transitions", 200, "--no-progress", "--out", out)
    return out
