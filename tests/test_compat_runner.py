"""The runner of the original's scripts, on a made-up checkout: stand-ins, planner, errors."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from raw_data import make_arrays

from tt_fast.compat.jannerm import shims
from tt_fast.compat.jannerm.__main__ import main
from tt_fast.compat.jannerm.runner import (
    Run,
    find_root,
    planner_functions,
    prepare,
    replace_search,
)
from tt_fast.compat.jannerm.tap_stand_in import Tap
from tt_fast.data.hdf5 import write_hdf5

pytest.importorskip("gymnasium")

FILES = {
    "trajectory/__init__.py": "",
    "trajectory/utils/__init__.py": "",
    "trajectory/utils/arrays.py": """
        DEVICE = "cuda:0"

        def set_device(device):
            DEVICE = device  # forgotten: global
    """,
    "trajectory/search/__init__.py": """
        from .core import beam_plan, beam_search
        from .utils import extract_actions, make_prefix, update_context
    """,
    "trajectory/search/core.py": """
        def beam_plan(): return "theirs"
        def beam_search(): return "theirs"
    """,
    "trajectory/search/utils.py": """
        from ..utils.arrays import DEVICE
        def extract_actions(): return "theirs"
        def make_prefix(): return "theirs"
        def update_context(): return "theirs"
    """,
    "config/__init__.py": "",
    "config/offline.py": "answer = 42",
    "scripts/beside.py": "here = True",
    "scripts/train.py": """
        import json, sys
        import gym
        env = gym.make("hopper-medium-v2").unwrapped
        data = env.get_dataset()
        print("RESULT", json.dumps({"argv": sys.argv[1:], "rows": len(data["rewards"])}))
    """,
    "scripts/plan.py": """
        import collections, glob, importlib, json, os, sys
        import numpy as np
        import torch
        import d4rl, git, gym, mujoco_py, skvideo.io
        from tap import Tap
        import trajectory.search
        from trajectory.search import beam_plan, make_prefix
        from trajectory.utils.arrays import set_device
        import trajectory.utils.arrays as arrays
        import beside

        make_renderer = "this script draws"

        class Parser(Tap):
            dataset: str = "halfcheetah-medium-v2"
            config: str = "config.offline"

        class Config(collections.Mapping):
            def __getitem__(self, key): return key
            def __iter__(self): return iter(())
            def __len__(self): return 0

        args = Parser().parse_args(known_only=True)
        args.extra = args.extra_args
        args.tuned = lambda: None
        args.save("args.json", skip_unpicklable=True)
        env = gym.make(args.dataset)
        bare = env.unwrapped
        observation = bare.reset()
        step = bare.step(np.zeros(3))
        viewer = "no"
        if "DebugRenderer" not in args.extra_args:
            context = mujoco_py.MjRenderContextOffscreen(bare.sim)
            context.cam.distance, context.cam.elevation = 3, -10
            context.cam.lookat[:] = [0, -0.5, 1]
            context.render(64, 32)
            pixels = context.read_pixels(64, 32, depth=False)
            both = context.read_pixels(64, 32)
            context.render(700, 500)  # more than MuJoCo's own buffer
            large = context.read_pixels(700, 500, depth=False)
            spread = [float(rows.std()) for rows in (large[:50], large[-50:])]
            viewer = [pixels.shape, both[1].shape, *spread]
            frames = np.stack([pixels[::-1]] * 3)
            skvideo.io.vwrite("video.mp4", frames, inputdict={"-r": "30"}, outputdict={"-f": "mp4"})
        try:
            git.Repo("nowhere")
        except BaseException as error:
            repo = type(error).__name__
        torch.save(torch.zeros(2), "state_3.pt")
        result = {
            "dataset": args.dataset,
            "answer": importlib.import_module(args.config).answer,
            "extra": args.extra_args,
            "limit": env._max_episode_steps,
            "step": [len(step), type(step[2]).__name__],
            "width": [observation.size, gym.spaces.Box.__name__],
            "viewer": viewer,
            "repo": repo,
            "bool": np.zeros(2, dtype=np.bool).dtype.name,
            "states": glob.glob1(".", "state_*"),
            "loaded": str(torch.load("state_3.pt").device),
            "device": arrays.DEVICE,
            "planner": [f.__module__ for f in (
                beam_plan, trajectory.search.core.beam_plan, trajectory.search.beam_search,
                trajectory.search.extract_actions)],
            "prefix": getattr(make_prefix, "keywords", None),
            "main": __name__,
        }
        print("RESULT", json.dumps(result))
    """,
}


@pytest.fixture
def checkout(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / "checkout" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")
    return tmp_path / "checkout"


def run(folder, *argv, **environment):
    """The runner in a process of its own, as it changes modules for good."""
    command = [sys.executable, "-m", "tt_fast.compat.jannerm", *map(str, argv)]
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "RESULT" not in done.stderr
    return done


def result(done):
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))


def write_dataset(folder):
    path = folder / "rows.hdf5"
    write_hdf5(path, make_arrays(30, 11, 3, (9,), (19,)), {})
    return path


def decode(path, size):
    """Frames (count, *size, 3) of a video, and what ffmpeg says about it."""
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path), "-f", "rawvideo"]
    done = subprocess.run([*command, "-pix_fmt", "rgb24", "-"], capture_output=True, check=True)
    shown = done.stderr.decode()
    assert f"{size[1]}x{size[0]}" in shown
    return np.frombuffer(done.stdout, np.uint8).reshape(-1, *size, 3), shown


OURS = "tt_fast.compat.jannerm.search"


def test_script_runs_with_stand_ins(checkout, tmp_path):
    pytest.importorskip("mujoco")
    work = tmp_path / "work"
    script = checkout / "scripts" / "plan.py"
    options = ["--dataset", "hopper-medium-v2", "--renderer", "DebugRenderer", "--horizon", "5"]
    done = run(work, "--max-episode-steps", 7, script, *options)
    found = result(done)
    assert (found["dataset"], found["answer"], found["main"]) == (
        "hopper-medium-v2",
        42,
        "__main__",
    )
    assert found["extra"] == [*options[2:], "--device", "cpu"]
    assert (found["limit"], found["step"]) == (7, [4, "bool"])
    assert found["width"] == [11, "Box"]
    assert (found["bool"], found["states"]) == ("bool", ["state_3.pt"])
    assert found["repo"] in ("ImportError", "NoSuchPathError")
    # the device of the command line reaches what `set_device` does not
    assert (found["device"], found["loaded"]) == ("cpu", "cpu")
    assert found["planner"] == [OURS] * 4
    assert found["prefix"] == {"device": "cpu"}
    assert "tt_fast: torch has no CUDA device here: added --device cpu" in done.stderr
    assert "DebugRenderer" not in done.stderr
    saved = json.loads((work / "args.json").read_text())
    assert saved["dataset"] == "hopper-medium-v2"
    # nothing is left beside the user's own files
    assert sorted(path.name for path in work.iterdir()) == ["args.json", "state_3.pt"]


def test_own_planner_can_be_kept(checkout, tmp_path):
    pytest.importorskip("mujoco")
    script = checkout / "scripts" / "plan.py"
    options = ["--dataset", "hopper-medium-v2", "--renderer", "DebugRenderer", "--device", "cpu:0"]
    done = run(tmp_path / "work", "--keep-search", script, *options)
    found = result(done)
    core, utils = "trajectory.search.core", "trajectory.search.utils"
    assert found["planner"] == [core, core, core, utils]
    assert found["prefix"] is None
    assert (found["device"], found["extra"]) == ("cpu:0", options[2:])
    assert found["limit"] == 1000
    assert "CUDA" not in done.stderr


def test_pictures_and_videos(checkout, tmp_path):
    from tt_fast.compat.offscreen import opengl_problem

    pytest.importorskip("mujoco")
    if (problem := opengl_problem() or shims.video_problem()) is not None:
        pytest.skip(problem)
    work = tmp_path / "work"
    found = result(run(work, checkout / "scripts" / "plan.py", "--dataset", "hopper-medium-v2"))
    pixels, depth, low, high = found["viewer"]
    assert (pixels, depth) == ([32, 64, 3], [32, 64])
    assert low > 2 * high  # rows from below: the chess board first, then the sky
    frames, shown = decode(work / "video.mp4", (32, 64))
    assert len(frames) == 3
    assert "30 fps" in shown
    assert "yuv420p" in shown


def test_without_opengl_the_script_is_told_to_draw_nothing(checkout, tmp_path):
    pytest.importorskip("mujoco")
    script = checkout / "scripts" / "plan.py"
    # a MuJoCo that cannot open a context, whatever this machine has
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "sitecustomize.py").write_text("import sys; sys.modules['mujoco.egl'] = None\n")
    path = os.pathsep.join([str(broken), os.environ.get("PYTHONPATH", "")])
    work = tmp_path / "work"
    variables = {"PYTHONPATH": path, "MUJOCO_GL": "egl"}
    if sys.platform != "linux":
        pytest.skip("egl is Linux's")
    done = run(work, script, "--dataset", "hopper-medium-v2", **variables)
    assert "tt_fast: no videos: added --renderer DebugRenderer, because" in done.stderr
    assert "(MUJOCO_GL=egl)" in done.stderr
    assert result(done)["extra"] == ["--device", "cpu", "--renderer", "DebugRenderer"]


def test_dataset_file_takes_the_place_of_the_download(checkout, tmp_path):
    pytest.importorskip("mujoco")
    file = write_dataset(tmp_path)
    done = run(tmp_path / "work", "--dataset-file", file, checkout / "scripts" / "train.py", "--x")
    # a script that draws nothing gets no option about it
    assert result(done) == {"argv": ["--x", "--device", "cpu"], "rows": 30}


def test_checkout_is_found_before_other_packages_of_its_name(checkout, tmp_path):
    pytest.importorskip("mujoco")
    work = tmp_path / "work"
    (work / "trajectory").mkdir(parents=True)
    (work / "trajectory" / "__init__.py").write_text("raise RuntimeError('the wrong one')\n")
    (work / "config.py").write_text("raise RuntimeError('the wrong one')\n")
    options = ["--dataset", "hopper-medium-v2", "--renderer", "DebugRenderer"]
    found = result(run(work, checkout / "scripts" / "plan.py", *options))
    assert found["answer"] == 42


def test_package_that_is_loaded_already_is_refused(checkout, tmp_path):
    code = "import sys; sys.modules['trajectory'] = type(sys)('trajectory')\n"
    code += "from tt_fast.compat.jannerm.__main__ import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(checkout / "scripts" / "train.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert f"trajectory.utils.arrays: expected the one of {checkout}" in done.stderr


def test_scripts_own_error_shows_its_traceback(checkout, tmp_path):
    script = checkout / "scripts" / "fails.py"
    script.write_text("raise ValueError('of the script')\n", encoding="utf-8")
    done = run(tmp_path / "work", script)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.strip().endswith("ValueError: of the script")


@pytest.mark.parametrize("debug", [False, True])
def test_our_error_inside_the_script_is_one_line(checkout, tmp_path, debug):
    script = checkout / "scripts" / "typo.py"
    script.write_text("import gym\ngym.make('hoper-medium-v2')\n", encoding="utf-8")
    done = run(tmp_path / "work", *(["--debug"] if debug else []), script)
    assert done.returncode == (1 if debug else 2)
    assert ("Traceback" in done.stderr) == debug
    last = done.stderr.strip().splitlines()[-1]
    assert "env_id: expected a Gymnasium id, got 'hoper-medium-v2'" in last
    assert "hopper-medium-v2" in last


def test_importing_changes_nothing():
    code = "import sys, collections, tt_fast.compat.jannerm.runner, tt_fast.compat.legacy_gym\n"
    code += f"print([n for n in {('gym', 'd4rl', 'mujoco_py', 'tap', 'skvideo')} if n in "
    code += "sys.modules], hasattr(collections, 'Mapping'), 'gymnasium' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "[] False False", done.stderr


# --- the command line


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["gone.py"], "SCRIPT: expected an existing script, got gone.py"),
        (["other.py"], "SCRIPT: expected a script in a checkout of jannerm/trajectory-transformer"),
        (["--dataset-file", "gone.hdf5", "SCRIPT"], "gone.hdf5: no such file"),
        (["--dataset-file", "other.py", "SCRIPT"], "other.py: expected a whole HDF5 file"),
        (["--max-episode-steps", "0", "SCRIPT"], "--max-episode-steps: expected an integer >= 1"),
    ],
)
def test_errors_are_one_line(checkout, tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.py").write_text("raise SystemExit('ran')\n")
    script = str(checkout / "scripts" / "train.py")
    monkeypatch.setattr("runpy.run_path", lambda *args, **kwargs: pytest.fail("ran"))
    assert main([script if word == "SCRIPT" else word for word in argv]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"python -m tt_fast.compat.jannerm: error: {message}")
    assert shown.count("\n") == 1


def test_help_lists_the_options(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["--help"])
    assert exit_info.value.code == 0
    shown = capsys.readouterr().out
    assert all(
        f"--{name}" in shown for name in ("keep-search", "dataset-file", "max-episode-steps")
    )
    assert "SCRIPT" in shown
    with pytest.raises(SystemExit) as exit_info:
        main([])
    assert exit_info.value.code == 2


def test_interruption(checkout, monkeypatch, capsys):
    def interrupt(run):
        raise KeyboardInterrupt

    monkeypatch.setattr("tt_fast.compat.jannerm.__main__.run_script", interrupt)
    assert main([str(checkout / "scripts" / "train.py")]) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")


def test_root_is_found_from_any_depth(checkout):
    deep = checkout / "scripts" / "deep" / "plan.py"
    deep.parent.mkdir()
    deep.write_text("")
    assert find_root(deep) == find_root(checkout / "scripts" / "plan.py") == checkout.resolve()
    assert Run(deep).options == ()


@pytest.mark.parametrize(
    ("changes", "replaced"), [({}, False), ({"max_episode_steps": 3}, True), ({"file": True}, True)]
)
def test_options_of_ours_need_our_environments(checkout, tmp_path, monkeypatch, changes, replaced):
    """Real gym and D4RL know nothing of them."""
    asked = []

    def install(make, *, device, replace_simulators):
        asked.append((make.keywords, device, replace_simulators))
        raise ImportError("stop here")

    monkeypatch.setattr(shims, "install", install)
    file = write_dataset(tmp_path) if "file" in changes else None
    limit = changes.get("max_episode_steps")
    one = Run(checkout / "scripts" / "plan.py", dataset_file=file, max_episode_steps=limit)
    with pytest.raises(ImportError, match="stop here"):
        prepare(one, "cuda:1")
    assert asked == [({"max_episode_steps": limit, "dataset_file": file}, "cuda:1", replaced)]


# --- the pieces


def test_only_what_a_module_has_is_replaced():
    module = type(sys)("some")
    module.beam_plan = module.other = "theirs"
    replace_search(module, planner_functions("cpu"))
    assert module.beam_plan.__module__ == OURS
    assert module.other == "theirs"
    assert not hasattr(module, "make_prefix")


class Options(Tap):
    """Two words and a flag."""

    name: str
    rate: float = 0.5
    loud: bool = False


def test_annotations_become_options():
    found = Options().parse_args(["--name", "a", "--x", "-1", "--loud"], known_only=True)
    assert (found.name, found.rate, found.loud) == ("a", 0.5, True)
    assert found.extra_args == ["--x", "-1"]
    assert found.as_dict() == {"name": "a", "rate": 0.5, "loud": True}


def test_options_of_a_subclass_come_first_and_bases_too():
    class Deeper(Options):
        rate: int = 3

    found = Deeper().parse_args(["--name", "b", "--rate", "4"])
    assert (found.name, found.rate) == ("b", 4)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: --name"),
        (["--name", "a", "--rate", "x"], "invalid float value"),
        (["--name", "a", "--y", "1"], "unrecognized arguments: --y 1"),
    ],
)
def test_wrong_options(capsys, argv, message):
    with pytest.raises(SystemExit):
        Options().parse_args(argv)
    assert message in capsys.readouterr().err


def test_options_are_saved_and_loaded(tmp_path):
    path = str(tmp_path / "args.json")
    options = Options().parse_args(["--name", "a"])
    options.extra, options.function = [1, None], test_wrong_options
    with pytest.raises(ValueError, match="function: expected a value that JSON can hold, got <fu"):
        options.save(path)
    assert not list(tmp_path.iterdir())
    options.save(path, skip_unpicklable=True)
    loaded = Options().load(path)
    assert (loaded.name, loaded.extra, loaded.loud) == ("a", [1, None], False)
    assert not hasattr(loaded, "function")


def test_unsupported_annotation_is_named():
    kind = type("Odd", (Tap,), {"__annotations__": {"sizes": list[int]}})
    with pytest.raises(ValueError, match=r"type of sizes: expected str, int, float or bool, got"):
        kind().parse_args([])


@pytest.mark.parametrize(
    ("frames", "rate", "message"),
    [
        (np.zeros((2, 8, 8, 4)), "30", "videodata: expected (frames, height, width, 3)"),
        (np.zeros((0, 8, 8, 3)), "30", "videodata: expected (frames, height, width, 3)"),
        (np.zeros((2, 8, 8, 3)), "fast", "-r: expected a finite number in (0.0, 1000.0]"),
        (np.zeros((2, 8, 8, 3)), "0", "-r: expected a number in (0.0, 1000.0]"),
    ],
)
def test_videos_that_are_refused(tmp_path, frames, rate, message):
    path = tmp_path / "a.mp4"
    with pytest.raises(ValueError, match=re.escape(message)):
        shims.vwrite(str(path), frames, inputdict={"-r": rate})
    assert not path.exists()


def test_missing_encoder_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"videos need imageio and imageio_ffmpeg: pip install"):
        shims.vwrite(str(tmp_path / "a.mp4"), np.zeros((1, 8, 8)))


def test_grey_video_of_odd_size(tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    path = tmp_path / "a.mp4"
    ramp = np.linspace(0, 255, 31) * np.ones((2, 17, 1))
    shims.vwrite(str(path), ramp)
    frames, shown = decode(path, (18, 32))
    assert "25 fps" in shown
    [first, _] = frames
    assert first[:, :4].mean() < 40
    assert first[:, -4:].mean() > 200


def test_real_modules_are_kept_where_they_serve():
    class Real:
        def parse_args(self, args=None, known_only=False): ...
        def save(self, path, skip_unpicklable=False): ...

    module = type(sys)("tap")
    assert not shims._is_usable_tap(module)
    module.Tap = type("Tap", (), {"parse_args": lambda self, args: None})
    assert not shims._is_usable_tap(module)
    module.Tap = Real
    assert shims._is_usable_tap(module)


def test_real_simulators_need_all_three(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    names = ("tt_first", "tt_second")
    (tmp_path / "tt_first.py").write_text("")
    assert not shims._all_import(names)
    assert "tt_first" not in sys.modules  # not even tried
    (tmp_path / "tt_second.py").write_text("raise OSError('libGL')")
    assert not shims._all_import(names)
    (tmp_path / "tt_second.py").write_text("loud = print('banner')")
    sys.modules.pop("tt_second", None)
    assert shims._all_import(names)
    for name in names:
        shims._forget(name)
    assert not set(names) & set(sys.modules)


def test_hidden_files_match_only_if_asked(tmp_path):
    for name in ("state_1.pt", ".state_2.pt", "other"):
        (tmp_path / name).touch()
    assert shims._glob1(str(tmp_path), "*state*") == ["state_1.pt"]
    assert shims._glob1(str(tmp_path), ".state*") == [".state_2.pt"]
    assert shims._glob1(str(tmp_path / "gone"), "*") == []


def test_no_repository_is_an_error():
    with pytest.raises(ImportError, match=r"git.Repo: expected GitPython and git"):
        shims.Repo("anywhere", search_parent_directories=True)


def test_gpu_is_left_to_the_script(monkeypatch):
    monkeypatch.setattr(torch, "load", torch.load)
    before = torch.load
    monkeypatch.setattr(shims, "_restore_old_names", lambda: None)
    monkeypatch.setattr(shims, "_install_simulators", lambda make: None)
    monkeypatch.setattr(shims, "_import", lambda name: type(sys)(name))
    monkeypatch.setattr(shims, "_is_usable_tap", lambda module: True)
    wanted = ["gym", "d4rl", "mujoco_py"]
    assert shims.install(len, device="cuda:0", replace_simulators=True) == wanted
    assert torch.load is before
    shims.install(len, device="cpu", replace_simulators=True)
    assert torch.load.keywords == {"map_location": "cpu"}
