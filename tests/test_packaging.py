"""What a wheel holds: the package, its types and data, and nothing at the top level beside it."""

from __future__ import annotations

import email
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a copy, so that no build folder is left in the repository."""
    pytest.importorskip("setuptools", minversion="77")
    copy = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        shutil.copy(ROOT / name, copy)
    for name in ("tt_fast", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w"]
    built = copy / "wheels"
    process = subprocess.run(
        [*command, str(built), str(copy)], check=False, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stdout + process.stderr
    (path,) = built.iterdir()
    return zipfile.ZipFile(path)


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
    assets = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tt_fast/assets").iterdir()}
    assert any(asset.endswith(".hdf5") for asset in assets)
    assert modules | assets | {"tt_fast/py.typed"} <= names


def test_the_command_is_installed(wheel: zipfile.ZipFile) -> None:
    (name,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "tt-fast = tt_fast.cli:main" in wheel.read(name).decode()


def test_metadata(wheel: zipfile.ZipFile) -> None:
    fields = metadata(wheel)
    assert fields["Name"] == "tt_fast"
    assert fields["License-Expression"] == "MIT"
    assert {"mujoco", "minari", "test", "dev"} <= set(fields.get_all("Provides-Extra", []))
    assert "The Trajectory Transformer" in str(fields["Summary"])
