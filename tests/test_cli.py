"""The command line: what each command prints and writes, and how it fails."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import h5py
import numpy as np
import pytest
from command_line import (
    BEAM,
    DEMO,
    SMALL,
    TOY,
    collect_toy,
    ctrl_c,
    help_text,
    refuse,
    run,
    save_model,
    usage_error,
)

import tt_fast
from tt_fast.checkpoint import Checkpoint, newest_checkpoint
from tt_fast.cli import main, parse
from tt_fast.commands.plan import read_observation
from tt_fast.config import PlanConfig
from tt_fast.data import load_dataset
from tt_fast.planning import Planner


@pytest.fixture
def model(tmp_path):
    return save_model(tmp_path / "model")


# ---- help, version, usage ----


def test_help_names_every_command(capsys):
    shown = help_text(capsys)
    for command in ("data", "train", "plan", "evaluate", "demo"):
        assert f"• {command} " in shown
    shown = help_text(capsys, "data")
    for command in ("info", "download", "collect"):
        assert f"• {command} " in shown


def test_help_imports_no_extras():
    program = (
        "import sys; from tt_fast.cli import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "slow = {'matplotlib', 'gymnasium', 'mujoco', 'imageio', 'minari'}\n"
        "sys.exit(', '.join(slow & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_shows_defaults_and_units(capsys):
    shown = help_text(capsys, "train")
    assert "--max-minutes {None}|FLOAT Budget in minutes of wall time" in shown
    assert "--batch-size INT Windows per optimiser step. (default: 256)" in shown
    assert "--embed-dim INT Width of the residual stream. (default: 128)" in shown
    # what the dataset decides is no option
    assert "--observation-dim" not in shown
    assert "--vocab-size" not in shown
    shown = help_text(capsys, "evaluate")
    assert "--horizon INT Transitions planned. (default: 15)" in shown


def test_version(capsys):
    run("--version")
    assert capsys.readouterr().out == f"tt-fast {tt_fast.__version__}\n"


def test_module_can_be_run():
    command = [sys.executable, "-m", "tt_fast", "data", "info", "no-such-file.hdf5"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("tt-fast: error: source: ")
    assert "Traceback" not in done.stderr


def test_wrong_option_names_the_nearest(capsys):
    shown = usage_error(capsys, "train", DEMO, "--output-dir", "x", "--max-minuts", "3")
    assert "--max-minuts" in shown
    assert "Perhaps you meant: --max-minutes" in shown
    shown = usage_error(capsys, "evaluate", "x", "--horizn", "3")
    assert "Perhaps you meant: --horizon" in shown


def test_home_after_an_equals_sign(monkeypatch):
    monkeypatch.setenv("HOME", "/home/jane")
    assert parse(["demo", "--output-dir=~/x=~/y"]).output_dir == Path("/home/jane/x=~/y")
    assert parse(["demo", "--output-dir=~jane"]).output_dir == Path("~jane")  # a folder's name
    assert parse(["demo", "--output-dir", "~/x"]).output_dir == Path("~/x")  # quoted in a shell


def test_wrong_command_lists_them(capsys):
    shown = usage_error(capsys, "evaluat", "x")
    assert "Available subcommands: data, train, plan, evaluate, convert, demo" in shown


def test_missing_and_malformed_options(capsys):
    assert "Missing from tt-fast train: --output-dir" in usage_error(capsys, "train", DEMO)
    shown = usage_error(capsys, "train", DEMO, "--output-dir", "x", "--batch-size", "many")
    assert "--batch-size" in shown
    assert "'many'" in shown
    shown = usage_error(capsys, "train", DEMO, "--output-dir", "x", "--max-minutes", "-3")
    assert "max_minutes: expected a number in (0.0, inf), got -3.0" in shown


def test_debug_shows_the_traceback(capsys, tmp_path):
    refuse(capsys, "data", "info", tmp_path / "none.hdf5")
    with pytest.raises(FileNotFoundError):
        main(["data", "info", str(tmp_path / "none.hdf5"), "--debug"])


@pytest.mark.parametrize(
    "error",
    [MemoryError("Unable to allocate 9 TiB"), RuntimeError("tried to allocate 9 bytes")],
)
def test_too_little_memory_is_one_line(monkeypatch, capsys, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("tt_fast.data.load_dataset", fail)
    assert refuse(capsys, "data", "info", DEMO) == str(error)


def test_our_own_bugs_are_not_hidden(monkeypatch):
    def fail(*args, **kwargs):
        raise TypeError("a bug")

    monkeypatch.setattr("tt_fast.data.load_dataset", fail)
    with pytest.raises(TypeError, match="a bug"):
        main(["data", "info", DEMO])


def test_error_of_many_lines_becomes_one(monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise ValueError("one\n  two\n")

    monkeypatch.setattr("tt_fast.data.load_dataset", fail)
    assert refuse(capsys, "data", "info", DEMO) == "one two"


def readme_commands():
    """Every `tt-fast` line of the README, as words."""
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    lines = [line.split("tt-fast ", 1)[1] for line in text.splitlines() if "tt-fast " in line]
    return [shlex.split(line, comments=True) for line in lines]


def test_every_command_of_the_readme_parses():
    commands = [words for words in readme_commands() if "`" not in "".join(words)]
    assert len(commands) >= 6
    for words in commands:
        assert parse(words).run


# ---- data ----


def test_data_info(capsys):
    run("data", "info", DEMO)
    assert str(load_dataset(DEMO).summary()) in capsys.readouterr().out
    run("data", "info", DEMO, "--json", "--ref-scores", "0", "100", "--env-id", "Own-v0")
    shown = json.loads(capsys.readouterr().out)
    assert shown["num_transitions"] == load_dataset(DEMO).num_steps
    assert shown["env_id"] == "Own-v0"
    assert shown["normalized"] == pytest.approx(shown["returns"])


def test_data_download_finds_what_is_there(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    path = tmp_path / "hopper_medium-v2.hdf5"
    path.touch()
    run("data", "download", "hopper-medium-v2")
    assert capsys.readouterr().out == f"{path}\n"


def test_data_download_of_an_unknown_name(capsys):
    shown = refuse(capsys, "data", "download", "hoper-medium-v2")
    assert shown.startswith("name: expected one of D4RL's (hopper-medium-v2, ")
    assert shown.endswith("got 'hoper-medium-v2'")


def test_data_collect(capsys, tmp_path):
    out = tmp_path / "toy.hdf5"
    argv = ["data", "collect", TOY, "--out", out, "--num-transitions", 40, "--no-progress"]
    run(*argv, "--seed", "3")
    assert capsys.readouterr().out == f"{out}\n"
    assert load_dataset(out).num_steps == 40
    with h5py.File(out) as file:
        assert file["metadata/seed"][()] == 3
    assert "out: expected a new file" in refuse(capsys, *argv)


@pytest.mark.parametrize("argv", [["--help"], ["data", "info", DEMO]])
def test_nobody_reads_it(argv):
    command = [sys.executable, "-m", "tt_fast", *argv]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 141)


def test_another_broken_pipe_is_an_error(capsys, monkeypatch):
    def broken(self):
        print("something")
        raise BrokenPipeError("a service went away")

    monkeypatch.setattr("tt_fast.commands.data.DataInfo.run", broken)
    assert refuse(capsys, "data", "info", DEMO) == "a service went away"
    with pytest.raises(BrokenPipeError):
        run("data", "info", DEMO, "--debug")


def test_without_standard_output(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    run("--version")
    run("data", "info", DEMO)


def test_data_interrupted(capsys, tmp_path, monkeypatch):
    interrupt(monkeypatch, "tt_fast.collect", "collect")
    out = tmp_path / "toy.hdf5"
    run("data", "collect", TOY, "--out", out, "--num-transitions", 40, status=130)
    assert f"whole episodes are kept in {out}.partial" in capsys.readouterr().err
    interrupt(monkeypatch, "tt_fast.data.download", "fetch_dataset")
    run("data", "download", "hopper-medium-v2", status=130)
    assert "the same command continues after it" in capsys.readouterr().err
    interrupt(monkeypatch, "tt_fast.data", "load_dataset")
    run("data", "info", DEMO, status=130)
    assert capsys.readouterr().err == "tt-fast: interrupted: nothing was written\n"


def interrupt(monkeypatch, module, name):
    """Ctrl-C when this function is called."""
    # by import_module, for the package's `collect` and `train` are the functions
    monkeypatch.setattr(import_module(module), name, ctrl_c)


# ---- train ----


@pytest.fixture(scope="module")
def toy_data(tmp_path_factory):
    return collect_toy(tmp_path_factory.mktemp("data"))


def test_train_and_resume(capsys, tmp_path, toy_data):
    folder = tmp_path / "run"
    argv = ["train", toy_data, "--output-dir", folder, "--num-bins", "20", *SMALL]
    run(*argv, "--max-tokens", "500", "--ref-scores", "0", "50")
    shown = capsys.readouterr().out
    assert shown.startswith("loss, nats per token")
    assert shown.endswith(f"{newest_checkpoint(folder)}\n")
    checkpoint = Checkpoint.load(folder)
    assert checkpoint.model.config.vocab_size == 20
    assert checkpoint.model.config.embed_dim == 8
    assert checkpoint.metadata["ref_scores"] == [0.0, 50.0]
    for kind in ("observation", "action", "reward", "value"):
        assert f"{checkpoint.metadata['eval_losses'][kind]:.3f}" in shown

    assert "output_dir: expected one without checkpoints" in refuse(capsys, *argv)
    run(*argv, "--max-tokens", "1000", "--resume")
    assert Checkpoint.load(folder).metadata["step"] > checkpoint.metadata["step"]


def test_train_interrupted(capsys, tmp_path, toy_data, monkeypatch):
    argv = ["train", toy_data, "--output-dir", tmp_path, "--num-bins", "20", *SMALL]
    run(*argv, "--max-tokens", "300")
    capsys.readouterr()
    interrupt(monkeypatch, "tt_fast.train", "train")
    run(*argv, status=130)
    expected = f"the newest checkpoint is {newest_checkpoint(tmp_path)}, and --resume continues"
    assert expected in capsys.readouterr().err
    run("train", toy_data, "--output-dir", tmp_path / "new", status=130)
    assert "no checkpoint was written yet" in capsys.readouterr().err


def test_train_names_a_bad_dataset(capsys, tmp_path):
    shown = refuse(capsys, "train", tmp_path / "none.hdf5", "--output-dir", tmp_path)
    assert shown.startswith(f"source: no file {tmp_path / 'none.hdf5'}")


# ---- plan ----


@pytest.mark.parametrize(
    ("words", "numbers"),
    [
        (["1.5", "-2", "3e-1"], [1.5, -2.0, 0.3]),
        (["1.5,-2,3"], [1.5, -2.0, 3.0]),
        (["1.5, -2,", "3"], [1.5, -2.0, 3.0]),
        (["-1.5 -2 3"], [-1.5, -2.0, 3.0]),
    ],
)
def test_observations_as_words(words, numbers):
    assert read_observation(words) == numbers


def test_observation_files(tmp_path):
    np.save(tmp_path / "o.npy", np.array([1.0, 2.0], np.float32))
    (tmp_path / "o.json").write_text("[1, 2]")
    assert read_observation([str(tmp_path / "o.npy")]) == [1.0, 2.0]
    assert read_observation([str(tmp_path / "o.json")]) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("o.json", b"[1, ", "observation: expected numbers in {path}, got "),
        ("o.json", b'["a"]', "observation: expected numbers in {path}, got "),
        ("o.json", b'{"x": 1}', "observation: expected numbers in {path}, got "),
        ("o.json", b"[[1, 2]]", "observation in {path}: expected a list of numbers, got (1, 2)"),
        ("o.npy", b"", "observation: expected numbers in {path}, got "),
        ("o.npy", b"no numbers", "observation: expected numbers in {path}, got "),
    ],
)
def test_bad_observation_files(capsys, tmp_path, model, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    shown = refuse(capsys, "plan", model, "--observation", path)
    assert shown.startswith(message.format(path=path))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a,b"], "observation: expected numbers, one .npy or one .json file, got 'a,b'"),
        (["none.npy"], "observation: no file none.npy"),
        (["1,2"], "observation: expected shape (3,), got (2,)"),
        (["1", "nan", "2"], "observation: expected finite numbers, got 'nan at index 1 of "),
    ],
)
def test_bad_observations(capsys, model, words, message):
    assert refuse(capsys, "plan", model, "--observation", *words).startswith(message)


def test_plan_is_the_planners(capsys, model):
    argv = ["plan", model, "--seed", "4", *BEAM, "--observation", "-0.5,0.25,1"]
    run(*argv, "--json")
    shown = json.loads(capsys.readouterr().out)
    plan_config = PlanConfig(horizon=2, beam_width=3, k_act=3, cdf_act=None)
    planner = Planner(Checkpoint.load(model), plan_config, seed=4)
    action = planner.act(np.array([-0.5, 0.25, 1.0]))
    plan = planner.last_plan
    assert shown["tokens"] == plan.tokens.tolist()
    assert shown["observations"] == plan.observations.tolist()
    assert shown["score"] == plan.score
    np.testing.assert_allclose(shown["actions"][0], action, rtol=1e-6)

    run(*argv)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"score {plan.score:.2f}, 2 steps, 3 beams"
    assert len(lines) == 2 + plan_config.horizon
    first = [float(text) for text in lines[2].split()]
    expected = [0, plan.rewards[0], plan.values[0], *plan.actions[0]]
    np.testing.assert_allclose(first, expected, atol=5e-3)


def test_plan_without_a_checkpoint(capsys, tmp_path):
    shown = refuse(capsys, "plan", tmp_path / "none", "--observation", "1")
    assert shown.startswith(f"{tmp_path / 'none'}: expected a checkpoint")


# ---- demo ----


def test_demo_passes_its_options_on(capsys, tmp_path, monkeypatch):
    calls = []

    def run_demo(output_dir, **options):
        options.pop("say")("a line")
        calls.append((output_dir, options))
        return output_dir / "report.html"

    monkeypatch.setattr("tt_fast.demo.run_demo", run_demo)
    run("demo", "--output-dir", tmp_path, "--minutes", 2, "--seed", 3, "--smoke", "--no-progress")
    options = {"minutes": 2.0, "seed": 3, "smoke": True, "pretrained": False, "progress": False}
    assert calls == [(tmp_path, options)]
    assert capsys.readouterr().out == f"a line\nreport: {tmp_path / 'report.html'}\n"


def test_demo_interrupted(capsys, tmp_path, monkeypatch):
    interrupt(monkeypatch, "tt_fast.demo", "run_demo")
    run("demo", "--output-dir", tmp_path, status=130)
    assert f"no checkpoint was written yet in {tmp_path}" in capsys.readouterr().err
    save_model(tmp_path / "run" / "checkpoints" / "step_00000005")
    run("demo", "--output-dir", tmp_path, status=130)
    assert f"the model is {tmp_path / 'run'}" in capsys.readouterr().err


def test_demo_refuses_a_full_folder(capsys, tmp_path):
    (tmp_path / "mine.txt").touch()
    shown = refuse(capsys, "demo", "--output-dir", tmp_path, "--smoke")
    assert shown == f"output_dir: expected a new or empty folder, got {tmp_path}"
