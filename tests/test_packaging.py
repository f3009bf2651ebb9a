"""What a wheel holds: the package, its types, data and C++ planner, and nothing beside it."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Mapping
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "CMakeLists.txt", "README.md", "LICENSE")
FOLDERS = ("tt_fast", "kernels", "csrc", "tests")
NOT_COPIED = shutil.ignore_patterns("__pycache__", "*.so", "golden")
NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false"}


def build_wheel(folder: Path, environment: Mapping[str, str]) -> Path:
    """A wheel built from a copy in `folder`, so that no build folder is left in the repository."""
    pytest.importorskip("setuptools", minversion="77")
    copy, built = folder / "source", folder / "wheels"
    copy.mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=NOT_COPIED)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w"]
    # cmake is where pip put it, whether or not the virtual environment is active
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    process = subprocess.run(
        [*command, str(built), str(copy)],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": path} | environment,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    (wheel,) = built.iterdir()
    return wheel


def run_unpacked(wheel: Path, folder: Path, code: str) -> str:
    """Output of Python with the wheel's package, whatever else is installed here."""
    zipfile.ZipFile(wheel).extractall(folder)
    # without `site` an editable installation has no say
    paths = [str(folder), str(ROOT / "tests"), *(path for path in sys.path if path)]
    process = subprocess.run(
        [sys.executable, "-S", "-c", code],
        check=False,
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def wheel_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"), {})


@pytest.fixture(scope="module")
def wheel(wheel_path: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(wheel_path)


def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return email.message_from_bytes(wheel.read(name))


def test_nothing_but_the_package_is_at_the_top(wheel: zipfile.ZipFile) -> None:
    version = metadata(wheel)["Version"]
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"tt_fast", f"tt_fast-{version}.dist-info"}


def test_every_module_and_data_file_is_inside(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tt_fast").rglob("*.py")}
    kernels = {f"tt_fast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert "tt_fast/kernels/segment.py" in kernels
    files = (path for path in (ROOT / "tt_fast/assets").rglob("*") if path.is_file())
    assets = {path.relative_to(ROOT).as_posix() for path in files}
    assert any(asset.endswith(".hdf5") for asset in assets)
    assert modules | kernels | assets | {"tt_fast/py.typed"} <= names


def test_the_command_is_installed(wheel: zipfile.ZipFile) -> None:
    (name,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "tt-fast = tt_fast.cli:main" in wheel.read(name).decode()


def test_metadata(wheel: zipfile.ZipFile) -> None:
    fields = metadata(wheel)
    assert fields["Name"] == "tt_fast"
    assert fields["License-Expression"] == "MIT"
    assert {"mujoco", "minari", "test", "dev"} <= set(fields.get_all("Provides-Extra", []))
    assert "The Trajectory Transformer" in str(fields["Summary"])


def test_the_cpp_planner_is_inside(wheel_path: Path, tmp_path: Path) -> None:
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("no C++ compiler")
    names = zipfile.ZipFile(wheel_path).namelist()
    assert f"tt_fast/_core{sysconfig.get_config_var('EXT_SUFFIX')}" in names
    assert not [name for name in names if Path(name).suffix in {".cc", ".cpp", ".h"}]
    code = "from tt_fast.planning import cpu; print(cpu.__file__, cpu.available_isas())"
    output = run_unpacked(wheel_path, tmp_path, code)
    assert output.startswith(str(tmp_path))
    assert "scalar" in output


PLAN_WITHOUT_CORE = """
import pytest
import tt_fast
from tiny import tiny_discretizer, tiny_model
from tt_fast.planning import cpu
from tt_fast.planning.search import make_backend

model, discretizer = tiny_model(), tiny_discretizer()
assert not cpu.is_available()
assert cpu.available_isas() == []
with pytest.raises(ImportError, match="reinstall with one"):
    make_backend("cpu", model, discretizer)
with pytest.warns(RuntimeWarning, match="without its C"):
    assert make_backend("auto", model, discretizer).name == "torch"
with pytest.warns(RuntimeWarning, match="without its C"):
    plan = tt_fast.beam_plan(model, discretizer, [[1, 2, 3]], tt_fast.PlanConfig(horizon=1))
print(cpu.__file__, plan.tokens.shape)
"""


def test_without_a_compiler_it_plans_with_torch(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path, NO_COMPILER)
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    output = run_unpacked(wheel, tmp_path / "unpacked", PLAN_WITHOUT_CORE)
    assert output.startswith(str(tmp_path))
    assert "(1, 1, 7)" in output
