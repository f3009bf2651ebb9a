"""The shape of the code: which module may import which, and what importing costs."""

from __future__ import annotations

import ast
import graphlib
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tt_fast"

# A module imports from the layers above its own, and within it without a circle.
LAYERS = (
    {"config", "files", "limits", "presets", "validate"},
    {"data", "discretizer", "encoding"},
    {"kernels", "model"},
    {"formats"},
    {"checkpoint", "train", "training"},
    {"planning"},
    {"collect", "envs", "evaluate", "plots", "results", "selection", "video"},
    {"bench", "compat", "demo", "markup", "measure", "report", "sweep", "tables", "tradeoff"},
    {"cli", "commands"},
)
LAYER_OF = {unit: i for i, layer in enumerate(LAYERS) for unit in layer}

# Only some functions need these; `import tt_fast` must work and stay quick without them.
NOT_AT_IMPORT = (
    "gymnasium",
    "imageio",
    "matplotlib",
    "minari",
    "mujoco",
    "ray",
    "stable_baselines3",
    "tyro",
)
EXTRAS = (
    *("gymnasium", "gymnasium_robotics", "imageio", "minari", "mujoco", "ray"),
    *("stable_baselines3", "wandb"),
)

KERNELS = ROOT / "kernels"  # installed as tt_fast.kernels
MODULES = sorted([*PACKAGE.rglob("*.py"), *KERNELS.glob("*.py")])


def inner_path(path: Path) -> Path:
    """Inside the package, as it is installed: kernels/mlp.py -> kernels/mlp."""
    base = PACKAGE if path.is_relative_to(PACKAGE) else ROOT
    return path.relative_to(base).with_suffix("")


def module_name(path: Path) -> str:
    """tt_fast/data/load.py -> tt_fast.data.load; a package's __init__.py -> the package."""
    parts = ("tt_fast", *inner_path(path).parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit(module: str) -> str:
    """The part of the package that a module belongs to: tt_fast.data.load -> data."""
    return module.split(".")[1]


def imports_of(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere, inside functions too."""
    names = {module_name(other) for other in MODULES}
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: expected absolute imports, line {node.lineno}"
            full = {f"{node.module}.{alias.name}" for alias in node.names} & names
            found |= full or {str(node.module)}
    return found & names


GRAPH = {module_name(path): imports_of(path) for path in MODULES}
INNER = sorted(GRAPH.keys() - {"tt_fast", "tt_fast.__main__"})


def test_every_module_has_a_layer() -> None:
    assert {unit(module) for module in INNER} == set(LAYER_OF)


@pytest.mark.parametrize("module", INNER)
def test_imports_go_one_way(module: str) -> None:
    own = LAYER_OF[unit(module)]
    assert not {name for name in GRAPH[module] if layer_of(name) > own}


def layer_of(module: str) -> int:
    """Index in LAYERS; tt_fast itself gathers all but the last two."""
    return len(LAYERS) - 2 if module == "tt_fast" else LAYER_OF[unit(module)]


def test_imports_make_no_circle() -> None:
    order = list(graphlib.TopologicalSorter(GRAPH).static_order())
    assert set(order) == set(GRAPH)


def test_the_architecture_page_lists_these_layers() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    block = re.search(r"^```text\n(config\b.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert block, "expected a ```text block that starts with the layer of config"
    listed = [set(re.findall(r"\w+", line)) for line in block[1].splitlines() if line.strip()]
    assert listed == list(LAYERS)


def test_the_architecture_page_names_every_module() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    # first cells of the table, `data/load` and the like; the subcommands share a row
    cells = re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)
    named = {name for cell in cells for name in re.findall(r"`([\w/]+)`", cell)}
    paths = {inner_path(path).as_posix() for path in MODULES}
    wanted = {path for path in paths if not re.search(r"__(init|main)__$|^commands/", path)}
    assert wanted | {"commands"} == named


def run_python(code: str) -> str:
    """Standard output of a fresh interpreter."""
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def test_importing_the_package_leaves_heavy_modules_out() -> None:
    code = f"import sys, tt_fast; print([m for m in {NOT_AT_IMPORT} if m in sys.modules])"
    assert run_python(code) == "[]"


def test_every_module_imports_without_the_extras() -> None:
    hide = f"import sys; sys.modules.update(dict.fromkeys({EXTRAS}))"
    imports = "; ".join(f"import {module}" for module in sorted(GRAPH) if "__main__" not in module)
    assert run_python(f"{hide}; {imports}; print('imported')") == "imported"


def public_definitions(module: ModuleType) -> Iterator[tuple[str, object]]:
    """Public functions and classes that a module defines, and their public methods."""
    for name, thing in vars(module).items():
        own = getattr(thing, "__module__", None) == module.__name__ and not name.startswith("_")
        if own and inspect.isfunction(thing):
            yield name, thing
        elif own and inspect.isclass(thing):
            yield name, thing
            methods = inspect.getmembers(thing, inspect.isfunction)
            yield from (
                (f"{name}.{key}", method)
                for key, method in methods
                if key in vars(thing) and not key.startswith("_")
            )


@pytest.mark.parametrize("module", INNER)
def test_modules_and_public_functions_have_docstrings(module: str) -> None:
    imported = importlib.import_module(module)
    assert imported.__doc__
    # a method may inherit what its base class says
    assert not [name for name, thing in public_definitions(imported) if not inspect.getdoc(thing)]


def test_all_public_names_exist_and_are_documented() -> None:
    code = (
        "import tt_fast; print([name for name in tt_fast.__all__ if name != '__version__' "
        "and not getattr(tt_fast, name).__doc__])"
    )
    assert run_python(code) == "[]"


def test_types_ship_with_the_package() -> None:
    assert (PACKAGE / "py.typed").exists()
