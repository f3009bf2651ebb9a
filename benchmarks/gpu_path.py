"""Make tt_fast importable from a checkout that nobody installed; prints a PYTHONPATH.

`python benchmarks/gpu_path.py FOLDER` fills FOLDER with a package of links to the checkout, kernels
included, and with stand-ins for modules that `import tt_fast` asks for and this machine lacks.
Needs nothing but Python.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: What `import tt_fast` and benchmarks/common.py import and no benchmark uses.
UNUSED = {
    "h5py": ("",),
    "safetensors": ("", "torch"),
    "tensorboardX": ("",),
    "tqdm": ("", "auto"),
    "yaml": ("",),
}

_STAND_IN = '''"""Stands in for a module that is not installed; whoever uses it is told so."""


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def refuse(self, *args, **kwargs):
        raise ImportError(f"{__name__}.{name}: expected an installed {__name__}, got none")

    return type(name, (Exception,), {"__init__": refuse})
'''


def is_importable(package: str) -> bool:
    """Whether a top-level module is there."""
    return importlib.util.find_spec(package) is not None


def link_package(folder: Path) -> None:
    """A folder tt_fast with links to the checkout's files, and its kernels among them."""
    package = folder / "tt_fast"
    package.mkdir(parents=True)
    for path in (ROOT / "tt_fast").iterdir():
        if path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    (package / "kernels").symlink_to(ROOT / "kernels")


def stand_in(folder: Path, package: str) -> None:
    """A package whose every name is an exception class that refuses to be made."""
    for module in UNUSED[package]:
        path = folder / package / module / "__init__.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_STAND_IN, encoding="utf-8")


def build(folder: Path) -> dict[str, object]:
    """Fill a folder; returns what was missing."""
    link_package(folder)
    missing = [package for package in UNUSED if not is_importable(package)]
    for package in missing:
        stand_in(folder, package)
    tests = [package for package in ("pytest", "hypothesis") if not is_importable(package)]
    found: dict[str, object] = {"stand_ins": missing, "missing_for_tests": tests}
    (folder / "missing.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    return found


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    found = build(folder)
    for name, packages in found.items():
        if packages:
            print(f"note: {name} {', '.join(packages)}", file=sys.stderr)  # type: ignore[arg-type]
    parts = [str(folder), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    print(os.pathsep.join(part for part in parts if part))


if __name__ == "__main__":
    main()
