"""Run a script of the original code (jannerm/trajectory-transformer at 8834a6e) as it is.

Everything is checked before the script starts; then this process belongs to it.
"""

from __future__ import annotations

import functools
import importlib
import runpy
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from tt_fast.compat.jannerm import shims
from tt_fast.compat.legacy_gym import make_legacy
from tt_fast.compat.offscreen import opengl_problem
from tt_fast.data.hdf5 import check_hdf5
from tt_fast.validate import require, require_int

_ARRAYS = Path("trajectory") / "utils" / "arrays.py"
_SEARCH = ("beam_plan", "beam_search", "make_prefix", "extract_actions", "update_context")
_SEARCH_MODULES = ("trajectory.search", "trajectory.search.core", "trajectory.search.utils")


@dataclass(frozen=True)
class Run:
    """One script and how to run it.

    Raises:
        FileNotFoundError: no such script or dataset file.
        ValueError: the script is in no checkout of the original, the file is no HDF5, or
            `max_episode_steps` is no positive integer.
    """

    script: Path
    """scripts/plan.py or scripts/train.py of a checkout."""
    options: tuple[str, ...] = ()
    """The script's own."""
    keep_search: bool = False
    """Leave the original's own planner in place."""
    dataset_file: Path | None = None
    """What `env.get_dataset()` reads, in place of the file of the dataset's name."""
    max_episode_steps: int | None = None
    """The environment's time limit, in steps, in place of its own."""

    def __post_init__(self) -> None:
        if not self.script.is_file():
            raise FileNotFoundError(f"SCRIPT: expected an existing script, got {self.script}")
        find_root(self.script)
        if self.dataset_file is not None:
            check_hdf5(self.dataset_file)
        if self.max_episode_steps is not None:
            require_int("--max-episode-steps", self.max_episode_steps, 1)


def run_script(run: Run) -> None:
    """Run it as `python SCRIPT OPTIONS` would, with stand-ins for what is missing.

    Raises:
        ImportError: Gymnasium is missing, or something of the script's that has no stand-in.
        ValueError: another package of the name `trajectory` is loaded.
    """
    device = _find_option(run.options, "--device")
    options = list(run.options)
    if device is None and not torch.cuda.is_available():
        device = "cpu"
        options += ["--device", device]
        _say("torch has no CUDA device here: added --device cpu")
    options += _renderer_options(run)
    prepare(run, device or "cuda")
    sys.path.insert(0, str(run.script.resolve().parent))
    sys.argv = [str(run.script), *options]
    runpy.run_path(str(run.script), run_name="__main__")


def prepare(run: Run, device: str) -> None:
    """Make the original importable in this process, its mistakes around devices corrected.

    Args:
        run: whose script tells the checkout.
        device: of the model and of every tensor that the original makes.

    Raises:
        ImportError, ValueError: see `run_script`.
    """
    root = find_root(run.script)
    make = functools.partial(
        make_legacy, max_episode_steps=run.max_episode_steps, dataset_file=run.dataset_file
    )
    own = run.max_episode_steps is not None or run.dataset_file is not None
    replaced = shims.install(make, device=device, replace_simulators=own)
    _say(f"stand-ins for {', '.join(replaced) or 'nothing'}")
    sys.path.insert(0, str(root))
    # `set_device` sets a local name (trajectory/utils/arrays.py:34-37), DEVICE stays "cuda:0"
    _import_from(root, "trajectory.utils.arrays").__dict__["DEVICE"] = device
    if not run.keep_search:
        functions = planner_functions(device)
        for name in _SEARCH_MODULES:
            replace_search(_import_from(root, name), functions)
        _say("the planner is tt_fast's; --keep-search leaves the original's in place")


def planner_functions(device: str) -> dict[str, Callable[..., Any]]:
    """The five of trajectory.search by name, ours, their tensors on `device`."""
    from tt_fast.compat.jannerm import search

    functions: dict[str, Callable[..., Any]] = {name: getattr(search, name) for name in _SEARCH}
    for name in ("make_prefix", "update_context"):
        functions[name] = functools.partial(functions[name], device=device)
    return functions


def replace_search(module: ModuleType, functions: Mapping[str, Callable[..., Any]]) -> None:
    """Put `functions` in place of those of their names that `module` has."""
    for name, function in functions.items():
        if hasattr(module, name):
            setattr(module, name, function)


def find_root(script: Path) -> Path:
    """The checkout that a script belongs to.

    Raises:
        ValueError: it belongs to none.
    """
    roots = [folder for folder in script.resolve().parents if (folder / _ARRAYS).is_file()]
    expected = f"a script in a checkout of jannerm/trajectory-transformer, with its {_ARRAYS}"
    require(len(roots) > 0, "SCRIPT", expected, str(script))
    return roots[0]


def _import_from(root: Path, name: str) -> ModuleType:
    """Import a module of the checkout, and of no other package of this name."""
    loaded = sys.modules.get("trajectory")
    module = importlib.import_module(name) if loaded is None or _is_below(loaded, root) else loaded
    require(_is_below(module, root), name, f"the one of {root}", getattr(module, "__file__", None))
    return module


def _is_below(module: ModuleType, root: Path) -> bool:
    file = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", [])), None)
    return file is not None and Path(file).resolve().is_relative_to(root)


def _find_option(options: tuple[str, ...], name: str) -> str | None:
    """The last value of an option, which is the one that counts; None without it."""
    values = [value for word, value in pairwise(options) if word == name]
    return values[-1] if values else None


def _renderer_options(run: Run) -> list[str]:
    """The script's option that draws nothing, where its default cannot draw."""
    draws = "make_renderer" in run.script.read_text(encoding="utf-8")
    if not draws or "--renderer" in run.options:
        return []
    problem = shims.video_problem() or opengl_problem()
    if problem is None:
        return []
    _say(f"no videos: added --renderer DebugRenderer, because {problem}")
    return ["--renderer", "DebugRenderer"]


def _say(text: str) -> None:
    print(f"tt_fast: {text}", file=sys.stderr, flush=True)
