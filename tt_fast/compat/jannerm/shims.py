"""Stand-ins for what the original imports and nobody can install any more.

Nothing happens when this module is imported; `install` changes this process for good.
"""

from __future__ import annotations

import collections
import collections.abc
import contextlib
import fnmatch
import functools
import glob
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from tt_fast.compat.jannerm.tap_stand_in import Tap
from tt_fast.compat.offscreen import OffscreenContext
from tt_fast.envs import MUJOCO_EXTRA
from tt_fast.files import atomic_write
from tt_fast.validate import require, require_number

_SIMULATORS = ("gym", "d4rl", "mujoco_py")
_OLD_NUMPY = {kind.__name__: kind for kind in (bool, int, float, complex, object, str)}


def install(make: Callable[..., Any], *, device: str, replace_simulators: bool) -> list[str]:
    """Put stand-ins where the real modules are missing.

    Args:
        make: what `gym.make` becomes.
        device: of the model; if it is no GPU, `torch.load` takes what was saved on one.
        replace_simulators: do so even if real gym, d4rl and mujoco_py import.

    Returns:
        Names of the modules that are stand-ins now.

    Raises:
        ImportError: Gymnasium is missing.
    """
    _restore_old_names()
    if not device.startswith("cuda"):
        _load_without_gpu()
    replaced: list[str] = []
    if replace_simulators or not _all_import(_SIMULATORS):
        _install_simulators(make)
        replaced += _SIMULATORS
    for name, is_usable, build in (
        ("tap", _is_usable_tap, _tap),
        ("git", lambda _: True, _git),
        ("skvideo.io", lambda _: True, _skvideo_io),
    ):
        module = _import(name)
        if module is None or not is_usable(module):
            _forget(name.split(".")[0])
            build()
            replaced.append(name)
    return replaced


def vwrite(
    fname: str,
    videodata: Any,
    inputdict: Mapping[str, str] | None = None,
    outputdict: Mapping[str, str] | None = None,
    **_: Any,
) -> None:
    """Write a video, H.264 in yuv420p, as scikit-video's `skvideo.io.vwrite` does.

    Args:
        fname: path of the file; its suffix chooses the container.
        videodata: (frames, height, width, 3), or (frames, height, width) in grey; 0 to 255.
        inputdict, outputdict: ffmpeg's options; only "-r", frames per second, is used (25).

    Raises:
        ImportError: imageio or its ffmpeg is missing.
        ValueError: another shape, or a rate that is no positive number.
    """
    rate = (inputdict or {}).get("-r") or (outputdict or {}).get("-r") or "25"
    try:
        fps = float(rate)
    except ValueError:
        fps = float("nan")
    require_number("-r", fps, 0.0, 1000.0, open_low=True)
    frames = _frames(videodata)
    problem = video_problem()
    if problem is not None:
        raise ImportError(problem)
    import imageio.v2 as imageio

    with (
        atomic_write(fname) as temporary,
        imageio.get_writer(
            temporary, format="FFMPEG", mode="I", fps=fps, quality=7, macro_block_size=2
        ) as opened,
    ):
        writer: Any = opened
        for frame in frames:
            writer.append_data(np.ascontiguousarray(frame))


def _frames(videodata: Any) -> NDArray[np.uint8]:
    """(frames, height, width, 3), grey ones in three equal colours."""
    frames = np.asarray(videodata).astype(np.uint8)
    if frames.ndim == 3:
        frames = frames[..., None]
    expected = "(frames, height, width, 3), at least one frame"
    good = frames.ndim == 4 and len(frames) > 0 and frames.shape[-1] in (1, 3)
    require(good, "videodata", expected, frames.shape)
    return np.broadcast_to(frames, (*frames.shape[:-1], 3))


def video_problem() -> str | None:
    """Why the stand-in of scikit-video cannot write here; None if it can."""
    missing = [
        name for name in ("imageio", "imageio_ffmpeg") if importlib.util.find_spec(name) is None
    ]
    return f"videos need {' and '.join(missing)}: {MUJOCO_EXTRA}" if missing else None


class Repo:
    """No repository: GitPython is not installed, or there is no git."""

    def __init__(self, *_: Any, **__: Any) -> NoReturn:
        raise ImportError("git.Repo: expected GitPython and git on this machine, got neither")


def _restore_old_names() -> None:
    """Names that were moved or removed: np.bool, collections.Mapping, glob.glob1."""
    for name, kind in _OLD_NUMPY.items():
        if name not in vars(np):  # numpy 2 has a bool of its own
            setattr(np, name, kind)
    for name in collections.abc.__all__:
        if not hasattr(collections, name):
            setattr(collections, name, getattr(collections.abc, name))
    if not hasattr(glob, "glob1"):
        vars(glob)["glob1"] = _glob1


def _glob1(dirname: str, pattern: str) -> list[str]:
    """Names in a folder that match; hidden ones only if the pattern says so."""
    names = [path.name for path in Path(dirname).iterdir()] if Path(dirname).is_dir() else []
    hidden = pattern.startswith(".")
    return fnmatch.filter([n for n in names if hidden or not n.startswith(".")], pattern)


def _load_without_gpu() -> None:
    # trajectory/utils/serialization.py:45 loads without `map_location`, which fails without a GPU
    # for the original's published models; the model then takes its own copy
    torch.load = functools.partial(torch.load, map_location="cpu")


def _install_simulators(make: Callable[..., Any]) -> None:
    try:
        import gymnasium
    except ImportError as error:
        raise ImportError(f"environments need gymnasium: {MUJOCO_EXTRA}") from error
    for name in _SIMULATORS:
        _forget(name)
    spaces = gymnasium.spaces
    _add_module("gym", make=make, spaces=spaces, Env=gymnasium.Env, __version__="0.18.3")
    sys.modules["gym.spaces"] = spaces
    _add_module("d4rl")
    _add_module("mujoco_py", MjRenderContextOffscreen=OffscreenContext)


def _tap() -> None:
    _add_module("tap", Tap=Tap)


def _git() -> None:
    _add_module("git", Repo=Repo)


def _skvideo_io() -> None:
    package = _add_module("skvideo", __path__=[])
    package.__dict__["io"] = _add_module("skvideo.io", vwrite=vwrite)


def _is_usable_tap(module: ModuleType) -> bool:
    """It is typed-argument-parser, and has what trajectory/utils/setup.py:36-41 uses."""
    try:
        wanted = {"parse_args": "known_only", "save": "skip_unpicklable"}
        return all(
            parameter in inspect.signature(getattr(module.Tap, method)).parameters
            for method, parameter in wanted.items()
        )
    except AttributeError:  # another package of this name
        return False


def _all_import(names: tuple[str, ...]) -> bool:
    """All are installed and import; looked for first, as an import may print and take long."""
    try:
        found = all(importlib.util.find_spec(name) is not None for name in names)
    except ValueError:  # a module without a spec
        found = False
    return found and all(_import(name) is not None for name in names)


def _import(name: str) -> ModuleType | None:
    """The real module; None if it is not installed or fails, in whatever way old modules do."""
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # noqa: PTH123
            return importlib.import_module(name)
    except Exception:
        return None


def _forget(package: str) -> None:
    """Remove what a failed import left behind."""
    for name in list(sys.modules):
        if name == package or name.startswith(f"{package}."):
            del sys.modules[name]


def _add_module(name: str, **attributes: Any) -> ModuleType:
    module = ModuleType(name, "A stand-in of tt_fast's for a module that is not installed.")
    vars(module).update(attributes)
    sys.modules[name] = module
    return module
