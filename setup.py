"""Builds the C++ planner, csrc/, through CMake; everything else is declared in pyproject.toml.

Without a compiler the package installs all the same, and plans with PyTorch.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Configures and builds the CMake target of the one extension there is."""

    def build_extension(self, ext: Extension) -> None:
        out = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / "ninja"
        configure: list[str | Path] = [
            "cmake", "-S", ROOT, "-B", build, "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={_pybind11_dir()}",
        ]  # fmt: skip
        if ninja := shutil.which("ninja"):  # a build requirement: no need for make
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        self._run(configure)
        self._run(["cmake", "--build", build, "--parallel", str(os.cpu_count() or 1)])
        self._run(["cmake", "--install", build, "--prefix", out])

    def _run(self, command: list[str | Path]) -> None:
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            # the extension is optional: setuptools warns and goes on
            raise CompileError(f"the C++ planner was not built: {error}") from error


def _pybind11_dir() -> str:
    try:
        import pybind11
    except ImportError as error:
        raise CompileError(f"the C++ planner was not built: {error}") from error
    return pybind11.get_cmake_dir()


setup(
    ext_modules=[Extension("tt_fast._core", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
