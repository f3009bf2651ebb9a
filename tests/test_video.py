"""Videos of episodes: what they show, how many frames, and what happens without OpenGL."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from synthetic import imagine, random_record, roll_out

from tt_fast import video
from tt_fast.planning import ImaginedPlan
from tt_fast.results import EpisodeRecord

mujoco = pytest.importorskip("mujoco")
gymnasium = pytest.importorskip("gymnasium")


@pytest.fixture(scope="module")
def hopper() -> EpisodeRecord:
    return imagine(roll_out("Hopper-v4", num_steps=9), horizon=4)


@pytest.fixture
def _opengl() -> None:
    try:
        video._Stage(mujoco.MjModel.from_xml_string("<mujoco/>"), (64, 64)).close()
    except video.RenderError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("_opengl")
def test_hopper_gets_its_plan_beside_it(hopper: EpisodeRecord, tmp_path: Path) -> None:
    path = tmp_path / "hopper.mp4"
    caption = video.render_episode(hopper, "Hopper-v4", path, size=(240, 180))
    assert "Right: the plan" in caption
    assert "Played at 0.4 times real time." in caption  # 125 steps/s at 50 frames/s
    frames = _frames(path)
    assert frames.shape == (10, 180 + 2 * 36, 2 * 240 + 8, 3)
    executed, imagined = frames[:, 36:-36, :240], frames[:, 36:-36, 248:]
    assert executed.std() > 10.0
    # the same scene, but bins and the ghost tell it from the episode
    assert 0.5 < np.abs(executed - imagined).mean() < 30.0
    assert [p.name for p in tmp_path.iterdir()] == ["hopper.mp4"]


@pytest.mark.usefixtures("_opengl")
def test_stride_leaves_frames_out_but_keeps_the_last(hopper: EpisodeRecord, tmp_path: Path) -> None:
    path = tmp_path / "hopper.mp4"
    caption = video.render_episode(hopper, "Hopper-v4", path, fps=25, size=(160, 120), stride=5)
    assert len(_frames(path)) == 3  # steps 0, 5 and the last, 9
    assert "Played in real time." in caption


@pytest.mark.usefixtures("_opengl")
def test_other_mujoco_environments_are_shown_executed_only(tmp_path: Path) -> None:
    record = imagine(roll_out("Swimmer-v4", num_steps=3))
    path = tmp_path / "swimmer.mp4"
    caption = video.render_episode(record, "Swimmer-v4", path, size=(160, 120))
    assert caption.startswith("The executed episode only (Swimmer-v4's observations are no states)")
    assert _frames(path).shape == (4, 120 + 2 * 36, 160, 3)


@pytest.mark.usefixtures("_opengl")
def test_without_plans_the_episode_is_alone(hopper: EpisodeRecord, tmp_path: Path) -> None:
    record = roll_out("Hopper-v4", num_steps=2)
    caption = video.render_episode(record, "Hopper-v4", tmp_path / "a.mp4", size=(160, 120))
    assert caption.startswith("The executed episode only (no plans were recorded)")


@pytest.mark.usefixtures("_opengl")
def test_a_ghost_changes_the_picture_and_the_camera_follows(hopper: EpisodeRecord) -> None:
    model = gymnasium.make("Hopper-v5").unwrapped.model
    stage = video._Stage(model, (160, 120))
    qpos = np.array(model.qpos0)
    alone = stage.draw(qpos)
    bent = qpos + np.array([0.3, 0, 0.2, 0, 0, 0])
    with_ghost = stage.draw(qpos, ghost=bent)
    np.testing.assert_array_equal(stage.draw(qpos), alone)  # the ghost left nothing behind
    stage.close()
    assert np.abs(alone.astype(int) - with_ghost).max() > 50
    # where the ghost is not, the picture is as before
    assert (alone == with_ghost).mean() > 0.8


class _Disc(gymnasium.Env):  # type: ignore[misc]
    """Not MuJoCo: its picture is as bright as the sum of the actions; seeds set the start."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    observation_space = gymnasium.spaces.Box(-9.0, 9.0, (4,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, render_mode: str | None = None, broken: bool = False) -> None:
        self.render_mode, self.broken, self.light = render_mode, broken, 0.0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.light = float(seed or 0)
        return np.zeros(4, np.float32), {}

    def step(self, action: Any) -> Any:
        self.light += float(np.sum(action))
        return np.zeros(4, np.float32), 1.0, False, False, {}

    def render(self) -> Any:
        if self.broken:
            raise AttributeError("no display")
        return np.full((99, 121, 3), 100.0 + 10.0 * self.light).clip(0, 255).astype(np.uint8)


@pytest.fixture
def _discs() -> Iterator[None]:
    gymnasium.register("Disc-v0", _Disc)
    gymnasium.register("DarkDisc-v0", _Disc, kwargs={"broken": True})
    yield
    del gymnasium.registry["Disc-v0"], gymnasium.registry["DarkDisc-v0"]


@pytest.mark.usefixtures("_discs")
def test_other_engines_are_replayed_from_the_seed(tmp_path: Path) -> None:
    record = random_record(num_steps=5)
    caption = video.render_episode(record, "Disc-v0", tmp_path / "disc.mp4", seed=3)
    assert caption.startswith("The executed episode only")
    frames = _frames(tmp_path / "disc.mp4")
    assert frames.shape == (6, 98 + 2 * 36, 120, 3)  # cropped to even sides
    light = 3.0 + np.concatenate([[0.0], record.actions.sum(axis=1).cumsum()])
    shown = frames[:, 46:-46, 10:-10].mean(axis=(1, 2, 3))
    np.testing.assert_allclose(shown, 100.0 + 10.0 * light, atol=4.0)  # the encoder rounds


@pytest.mark.usefixtures("_discs")
def test_another_engine_that_cannot_draw_says_so(tmp_path: Path) -> None:
    with pytest.raises(video.RenderError, match=r"DarkDisc-v0 cannot be drawn .*: no display"):
        video.render_episode(random_record(), "DarkDisc-v0", tmp_path / "a.mp4", seed=0)


def test_no_opengl_is_an_error_that_callers_can_catch(
    hopper: EpisodeRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(width: int, height: int) -> None:
        raise AttributeError("'NoneType' object has no attribute 'eglQueryString'")

    monkeypatch.setenv("MUJOCO_GL", "other")
    monkeypatch.setattr(mujoco, "GLContext", fail, raising=False)
    message = r"no OpenGL on this machine \(MUJOCO_GL=other\): 'NoneType' object"
    with pytest.raises(video.RenderError, match=message):
        video.render_episode(hopper, "Hopper-v4", tmp_path / "a.mp4")
    assert list(tmp_path.iterdir()) == []


def test_a_context_that_does_not_draw_is_no_opengl_either(
    hopper: EpisodeRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Windowless:
        def __init__(self, width: int, height: int) -> None:
            pass

        def make_current(self) -> None:
            pass

    def fail(model: Any, font: Any) -> None:
        raise mujoco.FatalError("an OpenGL platform library has not been loaded")

    monkeypatch.setenv("MUJOCO_GL", "other")
    monkeypatch.setattr(mujoco, "GLContext", Windowless, raising=False)
    monkeypatch.setattr(mujoco, "MjrContext", fail)
    with pytest.raises(video.RenderError, match=r"no OpenGL .* platform library has not"):
        video.render_episode(hopper, "Hopper-v4", tmp_path / "a.mp4")


@pytest.mark.usefixtures("_discs")
def test_a_missing_encoder_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(ImportError, match=r'pip install "tt_fast\[mujoco\]"'):
        video.render_episode(random_record(), "Disc-v0", tmp_path / "a.mp4", seed=0)


@pytest.mark.usefixtures("_discs")
def test_a_machine_without_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import imageio_ffmpeg

    def fail() -> str:
        raise RuntimeError("No ffmpeg exe could be found")

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", fail)
    with pytest.raises(video.RenderError, match="no ffmpeg on this machine: No ffmpeg exe"):
        video.render_episode(random_record(), "Disc-v0", tmp_path / "a.mp4", seed=0)


@pytest.mark.usefixtures("_discs")
def test_a_broken_encoder_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import imageio.v2

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("Broken pipe")

    monkeypatch.setattr(imageio.v2, "get_writer", fail)
    with pytest.raises(video.RenderError, match=r"ffmpeg cannot encode .*: Broken pipe"):
        video.render_episode(random_record(), "Disc-v0", tmp_path / "a.mp4", seed=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "a.gif"}, "path: expected a name that ends in .mp4, got 'a.gif'"),
        ({"stride": 0}, "stride: expected an integer >= 1"),
        ({"fps": 0.5}, "fps: expected a number"),
        ({"size": (481, 360)}, "size: expected even numbers of pixels"),
        ({"seed": None}, "seed: expected an integer, to replay Disc-v0, got None"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    values = {"path": "a.mp4", "seed": 0, **arguments}
    with pytest.raises(ValueError, match=message):
        video.render_episode(random_record(), "Disc-v0", **values)


def test_a_plan_plays_to_its_end_then_the_newest_takes_over() -> None:
    every = imagine(random_record(num_steps=7), horizon=3)
    starts = [0, 0, 0, 3, 3, 3, 6, 6]
    assert video.imagined_rows(every) == [(s, i - s) for i, s in enumerate(starts)]
    held = imagine(random_record(num_steps=7), horizon=3, plan_freq=2)
    starts = [0, 0, 0, 2, 2, 4, 4, 6]
    assert video.imagined_rows(held) == [(s, i - s) for i, s in enumerate(starts)]


def test_positions_of_a_plan_integrate_the_root() -> None:
    # nq = 3: observations are z, pitch, then velocities of x, z, pitch
    observations = np.array([[1.0, 0.1, 2.0, 0, 0], [1.1, 0.2, 2.0, 0, 0], [1.2, 0.3, 4.0, 0, 0]])
    empty = np.zeros((3, 0))
    plan = ImaginedPlan(observations, empty, empty, empty, 0.0, np.zeros((3, 0), np.int64), 1)
    expected = [[5.0, 1.0, 0.1], [5.2, 1.1, 0.2], [5.5, 1.2, 0.3]]
    np.testing.assert_allclose(video.imagined_qpos(plan, 5.0, 0.1), expected)


def test_imagined_positions_of_what_happened_are_what_happened(hopper: EpisodeRecord) -> None:
    plan = hopper.plans[0]
    assert hopper.qpos is not None
    qpos = video.imagined_qpos(plan, hopper.qpos[0, 0], 0.008)
    bins = np.ptp(hopper.observations[:, :5], axis=0) / 10.0
    assert (np.abs(qpos[:, 1:] - hopper.qpos[:4, 1:]) <= bins / 2 + 1e-9).all()
    np.testing.assert_allclose(qpos[:, 0], hopper.qpos[:4, 0], atol=0.002)


def test_observation_names_come_with_units() -> None:
    names = video.observation_names("Hopper-v4")
    assert names is not None
    assert names[:3] == ["height (m)", "pitch (rad)", "thigh (rad)"]
    assert names[5:7] == ["x velocity (m/s)", "height velocity (m/s)"]
    assert len(names) == 11
    assert video.observation_names("Swimmer-v4") is None


def _frames(path: Path) -> np.ndarray[Any, Any]:
    """(num_frames, height, width, 3) of an MP4."""
    import imageio_ffmpeg

    with tempfile.TemporaryDirectory() as folder:
        ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path)]
        subprocess.run([*ffmpeg, "-fps_mode", "passthrough", f"{folder}/%04d.png"], check=True)
        pictures = [Image.open(frame) for frame in sorted(Path(folder).iterdir())]
        return np.stack([np.asarray(picture, dtype=float) for picture in pictures])
