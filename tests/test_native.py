"""The C++ core's own tests, tests/native, built and run."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILERS = ("c++", "g++", "clang++")


def find_tool(name: str) -> str | None:
    """A program beside this Python, where pip puts cmake and ninja, or on the path."""
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    return shutil.which(name, path=os.pathsep.join(folders))


def run(*command: str | Path) -> str:
    """Output of a command that must succeed."""
    process = subprocess.run(
        command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.returncode == 0, process.stdout
    return process.stdout


def test_native(tmp_path: Path) -> None:
    cmake, ninja = find_tool("cmake"), find_tool("ninja")
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else COMPILERS
    if cmake is None:
        pytest.skip("cmake is not installed")
    if not any(shutil.which(compiler.split()[0]) for compiler in compilers):
        pytest.skip(f"no C++ compiler: {' or '.join(compilers)}")
    # a little optimisation: less takes longer to run, more takes longer to build
    options = ["-DTT_TESTS=ON", "-DTT_PYTHON=OFF", "-DCMAKE_BUILD_TYPE=None"]
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    run(cmake, "-S", ROOT, "-B", tmp_path, *options, "-DCMAKE_CXX_FLAGS=-O1", *generator)
    run(cmake, "--build", tmp_path, "--parallel", str(os.cpu_count() or 1))
    summary = run(tmp_path / "native_tests").splitlines()[-1]
    assert summary.endswith(" 0 failed")
    check_older_processors(tmp_path / "native_tests")


def check_older_processors(tests: Path) -> None:
    """Nothing of a newer instruction set runs on a processor that lacks it."""
    emulator = shutil.which("qemu-x86_64")
    if emulator is None or platform.machine() != "x86_64":
        return
    for processor in ("Nehalem", "Haswell"):  # without AVX; with AVX2 but not AVX-512
        for part in ("OpsByName", "LayerNormRows", "InputsAreMadeAtOnce", "AttendSharply"):
            output = run(emulator, "-cpu", processor, tests, part)
            assert output.splitlines()[-1] == "1 tests, 0 failed"


def test_tables_for_arm_compile() -> None:
    """Where there is a compiler for it; the machines of CI have other processors."""
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("no aarch64-linux-gnu-g++")
    run(compiler, "-std=c++20", "-Wall", "-fsyntax-only", ROOT / "csrc/ops_neon.cc")
