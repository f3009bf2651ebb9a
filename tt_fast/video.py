"""MP4 of an episode: what was executed, and beside it what the planner had imagined.

MuJoCo draws without a display. The right picture plays a plan step for step against the episode,
with the executed body as a grey ghost, and takes the newest plan when the old one is used up.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from tt_fast.discretizer import Floats
from tt_fast.envs import MUJOCO_EXTRA, ControlEnv, make_env
from tt_fast.files import atomic_write
from tt_fast.plots import plan_start
from tt_fast.validate import require, require_int, require_number

if TYPE_CHECKING:
    from tt_fast.planning.base import ImaginedPlan
    from tt_fast.results import EpisodeRecord

Picture = NDArray[np.uint8]

#: Environments whose observation is qpos[1:], then qvel, so that a plan can be drawn.
LOCOMOTION = ("Hopper", "HalfCheetah", "Walker2d")

_ROOT_NAMES = {"rootx": "x", "rootz": "height", "rooty": "pitch"}
_BACKGROUND, _TEXT, _FAINT, _ACCENT = "#12161c", "#f0f3f6", "#9aa4af", "#ff9a4d"
_GHOST_RGBA = (0.80, 0.84, 0.90, 0.45)
_GAP, _BAR = 8, 36  # pixels between the pictures, and of the text above and below them


class RenderError(OSError):
    """Pictures cannot be drawn or encoded on this machine; everything else still works."""


class Scene(NamedTuple):
    """One environment step, drawn."""

    step: int
    num_steps: int
    return_so_far: float
    executed: Picture
    """(height, width, 3)"""
    imagined: Picture | None = None
    """(height, width, 3)"""
    plan_start: int = 0
    """Step at which the plan on the right was made"""


def render_episode(
    record: EpisodeRecord,
    env_id: str,
    path: str | Path,
    *,
    fps: float | None = None,
    size: tuple[int, int] = (480, 360),
    stride: int = 1,
    seed: int | None = None,
) -> str:
    """Write an MP4 of an episode; hopper, halfcheetah and walker2d get the imagined plan beside it.

    Args:
        record: the episode.
        env_id: its Gymnasium id.
        path: ends in .mp4; written whole or not at all.
        fps: frames per second; None: as in real time, but at most 50.
        size: width and height of one picture in pixels, even.
        stride: environment steps between two frames.
        seed: the episode's environment seed, to replay it where the engine is not MuJoCo.

    Returns:
        What the video shows, one line.

    Raises:
        RenderError: no OpenGL or no encoder on this machine.
        ImportError: gymnasium, MuJoCo or imageio is missing.
        ValueError: arguments out of range, or an episode that cannot be drawn without `seed`.
    """
    require(Path(path).suffix == ".mp4", "path", "a name that ends in .mp4", str(path))
    require_int("stride", stride, 1)
    if fps is not None:
        require_number("fps", fps, 1.0, 240.0)
    even = all(pixels % 2 == 0 and 64 <= pixels <= 4096 for pixels in size)
    require(even, "size", "even numbers of pixels from 64 to 4096", size)
    replayed = record.qpos is None
    require(not replayed or seed is not None, "seed", f"an integer, to replay {env_id}", seed)
    env = make_env(env_id, render=replayed)
    try:
        frames_per_second = _steps_per_second(env) / stride
        fps = min(50.0, frames_per_second) if fps is None else fps
        speed = fps / frames_per_second
        steps = [*range(0, len(record.actions), stride), len(record.actions)]
        scenes = _replay(record, env, seed) if replayed else _redraw(record, env, size, steps)
        _encode((_compose(s, speed) for s in scenes if s.step in steps), Path(path), fps)
    finally:
        env.close()
    return _describe(record, env_id, speed)


def observation_names(env_id: str) -> list[str] | None:
    """Names and units of hopper's, halfcheetah's or walker2d's observation; None for others."""
    if not env_id.startswith(LOCOMOTION):
        return None
    env = make_env(env_id)
    try:
        model = env.env.unwrapped.model
        joints = [(model.joint(i).name, int(model.jnt_type[i])) for i in range(model.njnt)]
    finally:
        env.close()
    slide = 2  # mjJNT_SLIDE; the others are hinges
    units = ["m" if kind == slide else "rad" for _, kind in joints]
    names = [_ROOT_NAMES.get(name, name.removesuffix("_joint")) for name, _ in joints]
    positions = [f"{name} ({unit})" for name, unit in zip(names, units, strict=True)]
    velocities = [f"{name} velocity ({unit}/s)" for name, unit in zip(names, units, strict=True)]
    return positions[1:] + velocities


def imagined_rows(record: EpisodeRecord) -> list[tuple[int, int]]:
    """For each step 0..T the plan row shown there: (step at which the plan was made, row).

    A plan plays to its end, then the plan held at that step takes over.
    """
    rows, start = [], 0
    last = len(record.plans) - 1
    for step in range(len(record.plans) + 1):
        if step - start >= len(record.plans[start].observations):
            start = plan_start(record, min(step, last))
        row = min(step - start, len(record.plans[start].observations) - 1)
        rows.append((start, row))
    return rows


def imagined_qpos(plan: ImaginedPlan, root_x: float, seconds_per_step: float) -> Floats:
    """MuJoCo positions of a locomotion plan.

    Args:
        plan: its observations are qpos[1:], then qvel; the first velocity is the root's, in m/s.
        root_x: position of the root where the plan starts, m; observations leave it out.
        seconds_per_step: of one environment step.

    Returns:
        (horizon, nq): the root's velocity integrated by the trapezoid rule, then qpos[1:].
    """
    num_positions = (plan.observations.shape[1] - 1) // 2
    velocity = plan.observations[:, num_positions]
    moved = np.cumsum((velocity[:-1] + velocity[1:]) / 2.0) * seconds_per_step
    x = root_x + np.concatenate([[0.0], moved])
    return np.concatenate([x[:, None], plan.observations[:, :num_positions]], axis=1)


def _can_imagine(record: EpisodeRecord, env_id: str) -> bool:
    """The record has plans whose observations are a whole MuJoCo state but for the root's x."""
    if record.qpos is None or record.qvel is None or not record.plans:
        return False
    state_dim = record.qpos.shape[1] - 1 + record.qvel.shape[1]
    return env_id.startswith(LOCOMOTION) and record.observations.shape[1] == state_dim


def _redraw(
    record: EpisodeRecord, env: ControlEnv, size: tuple[int, int], steps: Iterable[int]
) -> Iterator[Scene]:
    """Draw the recorded states of a MuJoCo episode, and its plans where they are states too."""
    assert record.qpos is not None
    rows = imagined_rows(record) if _can_imagine(record, env.env_id) else None
    seconds = 1.0 / _steps_per_second(env)
    returns = np.concatenate([[0.0], np.cumsum(record.rewards)])
    stage = _Stage(env.env.unwrapped.model, size)
    try:
        for step in steps:
            executed = record.qpos[step]
            scene = Scene(step, len(record.actions), float(returns[step]), stage.draw(executed))
            if rows is not None:
                start, row = rows[step]
                qpos = imagined_qpos(record.plans[start], record.qpos[start, 0], seconds)[row]
                picture = stage.draw(qpos, ghost=executed)
                scene = scene._replace(imagined=picture, plan_start=start)
            yield scene
    finally:
        stage.close()


def _replay(record: EpisodeRecord, env: ControlEnv, seed: int | None) -> Iterator[Scene]:
    """Play the actions again in an environment that draws itself."""
    assert seed is not None
    env.reset(seed)
    num_steps, return_so_far = len(record.actions), 0.0
    yield Scene(0, num_steps, 0.0, _drawn(env))
    for step, action in enumerate(record.actions, start=1):
        return_so_far += env.step(action).reward
        yield Scene(step, num_steps, return_so_far, _drawn(env))


def _drawn(env: ControlEnv) -> Picture:
    """The environment's own picture, cropped to even sides for the encoder."""
    try:
        picture = env.render()
    except Exception as error:  # a renderer fails with any type
        raise RenderError(f"{env.env_id} cannot be drawn on this machine: {error}") from error
    height, width, _ = picture.shape
    return picture[: height // 2 * 2, : width // 2 * 2]


def _steps_per_second(env: ControlEnv) -> float:
    """Environment steps in a second of simulated time."""
    seconds = getattr(env.env.unwrapped, "dt", None)
    return 1.0 / float(seconds) if seconds else float(env.env.metadata.get("render_fps", 50))


class _Stage:
    """MuJoCo's renderer for one model.

    Args:
        model: an MjModel of our own; its picture quality is changed.
        size: width and height in pixels.

    Raises:
        RenderError: no OpenGL.
    """

    def __init__(self, model: Any, size: tuple[int, int]) -> None:
        import mujoco

        width, height = size
        model.vis.quality.shadowsize = 1024  # a quarter of the time of 4096, drawn in software
        model.vis.global_.offwidth = max(width, model.vis.global_.offwidth)
        model.vis.global_.offheight = max(height, model.vis.global_.offheight)
        self._mujoco, self._model = mujoco, model
        self._gl, self._context = open_gl(model, size)
        self._scene = mujoco.MjvScene(model, maxgeom=1000)
        self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        self._body, self._ghost = mujoco.MjData(model), mujoco.MjData(model)
        self._option, self._perturb = mujoco.MjvOption(), mujoco.MjvPerturb()
        self._camera = self._find_camera()
        self._rectangle = mujoco.MjrRect(0, 0, width, height)

    def draw(self, qpos: Floats, ghost: Floats | None = None) -> Picture:
        """Picture (height, width, 3) of a body at `qpos` (nq,), and of a ghost at another."""
        mujoco, scene = self._mujoco, self._scene
        self._place(self._body, qpos)
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(
            self._model, self._body, self._option, self._perturb, self._camera, everything, scene
        )
        if ghost is not None:
            self._add_ghost(ghost)
        mujoco.mjr_render(self._rectangle, scene, self._context)
        picture = np.empty((self._rectangle.height, self._rectangle.width, 3), dtype=np.uint8)
        mujoco.mjr_readPixels(picture, None, self._rectangle, self._context)
        return picture[::-1]  # OpenGL's first row is the lowest

    def close(self) -> None:
        """Free what OpenGL holds."""
        self._context.free()
        self._gl.free()

    def _place(self, data: Any, qpos: Floats) -> None:
        data.qpos[:] = qpos
        self._mujoco.mj_forward(self._model, data)

    def _add_ghost(self, qpos: Floats) -> None:
        scene, first = self._scene, self._scene.ngeom
        self._place(self._ghost, qpos)
        moving = self._mujoco.mjtCatBit.mjCAT_DYNAMIC
        self._mujoco.mjv_addGeoms(
            self._model, self._ghost, self._option, self._perturb, moving, scene
        )
        for geom in scene.geoms[first : scene.ngeom]:
            geom.matid = -1
            geom.rgba[:] = _GHOST_RGBA

    def _find_camera(self) -> Any:
        """The model's own tracking camera, or one that sees all of it."""
        mujoco = self._mujoco
        camera = mujoco.MjvCamera()
        track = mujoco.mj_name2id(self._model, mujoco.mjtObj.mjOBJ_CAMERA, "track")
        if track < 0:
            mujoco.mjv_defaultFreeCamera(self._model, camera)
        else:
            camera.type, camera.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, track
        return camera


def open_gl(model: Any, size: tuple[int, int]) -> tuple[Any, Any]:
    """An OpenGL context without a window, current in this thread, and MuJoCo's renderer in it.

    MUJOCO_GL chooses the platform, on Linux EGL if it is unset: that one needs no display. MuJoCo
    itself reads the variable only once, at its import, which lies behind us.

    Args:
        model: an `mujoco.MjModel`, whose off-screen buffer is drawn to.
        size: (width, height) in pixels.

    Raises:
        RenderError: no OpenGL here.
    """
    platform = os.environ.get("MUJOCO_GL") or ("egl" if sys.platform == "linux" else "")
    module = f"mujoco.{platform}" if platform in ("egl", "osmesa", "glfw") else "mujoco"
    try:
        gl = importlib.import_module(module).GLContext(*size)
        gl.make_current()
        return gl, offscreen_renderer(model)
    except Exception as error:  # OpenGL loaders fail with any type, AttributeError included
        named = platform or "unset"
        raise RenderError(f"no OpenGL on this machine (MUJOCO_GL={named}): {error}") from error


def offscreen_renderer(model: Any) -> Any:
    """MuJoCo's renderer in the current OpenGL context, with a buffer as large as `model` says."""
    import mujoco

    context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
    mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, context)
    return context


def _compose(scene: Scene, speed: float) -> Picture:
    """A frame: the pictures side by side, what they are above, step and return below."""
    height, width, _ = scene.executed.shape
    pictures = [scene.executed] if scene.imagined is None else [scene.executed, scene.imagined]
    total = len(pictures) * width + (len(pictures) - 1) * _GAP
    frame = Image.new("RGB", (total, height + 2 * _BAR), _BACKGROUND)
    for index, picture in enumerate(pictures):
        frame.paste(Image.fromarray(picture), (index * (width + _GAP), _BAR))
    draw = ImageDraw.Draw(frame)
    top, low = _BAR // 2, height + _BAR + _BAR // 2 + 2
    _write(draw, (12, top), "executed", _TEXT)
    if scene.imagined is not None:
        ahead = scene.step - scene.plan_start
        title = f"imagined at step {scene.plan_start}, t+{ahead}"
        _write(draw, (width + _GAP + 12, top), title, _ACCENT)
        _write(draw, (total - 12, top), "grey: executed", _FAINT, anchor="rm")
    progress = f"step {scene.step} of {scene.num_steps}     return {scene.return_so_far:.1f}"
    _write(draw, (12, low), progress, _TEXT)
    _write(draw, (total - 12, low), f"{speed:.2g}x real time", _FAINT, anchor="rm")
    done = total * scene.step // max(scene.num_steps, 1)
    draw.rectangle((0, height + _BAR, done, height + _BAR + 2), fill=_ACCENT)
    return np.asarray(frame)


def _write(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, color: str, anchor: str = "lm"
) -> None:
    font = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    draw.text(at, text, fill=color, font=ImageFont.truetype(str(font), 15), anchor=anchor)


def _encode(frames: Iterable[Picture], path: Path, fps: float) -> None:
    """Write frames (height, width, 3) as H.264."""
    try:
        import imageio.v2 as imageio

        importlib.import_module("imageio_ffmpeg").get_ffmpeg_exe()
    except ImportError as error:
        raise ImportError(f"videos need imageio with ffmpeg: {MUJOCO_EXTRA}") from error
    except RuntimeError as error:
        raise RenderError(f"there is no ffmpeg on this machine: {error}") from error
    with atomic_write(path) as temporary:
        try:
            writer = imageio.get_writer(
                temporary, format="FFMPEG", mode="I", fps=fps, quality=7, macro_block_size=2
            )
            with writer:
                for frame in frames:
                    writer.append_data(frame)
        except OSError as error:  # a broken pipe, or no such program
            raise RenderError(f"ffmpeg cannot encode on this machine: {error}") from error


def _describe(record: EpisodeRecord, env_id: str, speed: float) -> str:
    pace = "Played in real time"
    if not math.isclose(speed, 1.0):
        pace = f"Played at {speed:.2g} times real time"
    if _can_imagine(record, env_id):
        return (
            f"Left: the executed episode. Right: the plan it followed, as imagined, with the "
            f"executed body in grey. {pace}."
        )
    why = "no plans were recorded" if not record.plans else f"{env_id}'s observations are no states"
    return f"The executed episode only ({why}). {pace}."
