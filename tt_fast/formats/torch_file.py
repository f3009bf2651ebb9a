"""Read weights of strangers, torch's files and safetensors, after looking at all of the file."""

from __future__ import annotations

import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tt_fast.formats.unpickle import MAX_BYTES, STORAGE_BYTES, read_pickle

Shapes = Mapping[str, tuple[int, ...]]


def read_torch_file(
    path: Path, expected: Shapes, *, optional: Collection[str] = ()
) -> dict[str, Tensor]:
    """The tensors of a `torch.save` file, checked before anything of their size is allocated.

    Args:
        path: a zip archive, as `torch.save` has written since 1.6.
        expected: the names and shapes that it must hold, and no others.
        optional: names among `expected` that may be absent.

    Returns:
        float32 tensors of these names, on the CPU.

    Raises:
        ValueError: damaged or hostile, other names, other shapes, NaN or Inf; nothing was run.
    """
    read_archive_pickle(path)
    outline = _load(path, "meta")  # shapes alone: no storage is read
    found = {name: _shape(path, name, value) for name, value in outline.items()}
    check_shapes(path, expected, found, optional=optional)
    weights = {name: value.float() for name, value in _load(path, "cpu").items()}
    check_finite(path, weights)
    return weights


def read_safetensors(path: Path, expected: Shapes) -> dict[str, Tensor]:
    """The tensors of a safetensors file; see `read_torch_file`.

    Raises:
        ValueError: see `read_torch_file`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found = {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118
            check_shapes(path, expected, found)
            weights = {name: file.get_tensor(name).float() for name in found}
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged safetensors file: {error}") from error
    check_finite(path, weights)
    return weights


def read_archive_pickle(path: Path) -> Any:
    """The pickle in a `torch.save` file, tensors left out; see `unpickle.read_pickle`.

    Every storage that it asks for is in the file, with as many bytes as it says: torch itself would
    read beyond the end.

    Raises:
        ValueError: damaged or hostile; nothing was run.
    """
    sizes = check_archive(path)
    pickles = [name for name in sizes if PurePosixPath(name).name == "data.pkl"]
    if len(pickles) != 1 or len(PurePosixPath(pickles[0]).parts) != 2:
        raise ValueError(f"{path}: expected one data.pkl in a folder, got {pickles}")
    if sizes[pickles[0]] > MAX_BYTES:
        raise ValueError(f"{path}: expected data.pkl of at most {MAX_BYTES} bytes")
    try:
        with zipfile.ZipFile(path) as archive:
            content = archive.read(pickles[0])
    except Exception as error:  # flags of encryption, patches, other methods: all of it damage
        raise ValueError(f"{path}: damaged: {error}") from error
    persistent_ids: list[Any] = []
    held = read_pickle(content, str(path), persistent_ids)
    root = PurePosixPath(pickles[0]).parts[0]
    for pid in persistent_ids:
        _check_storage(path, root, pid, sizes)
    return held


def _check_storage(path: Path, root: str, pid: Any, sizes: Mapping[str, int]) -> None:
    shaped = isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage"
    kind = getattr(pid[1], "__name__", "") if shaped else ""
    key, count = (pid[2], pid[4]) if shaped else (None, None)
    if kind not in STORAGE_BYTES or not isinstance(key, str) or not isinstance(count, int):
        raise ValueError(f"{path}: expected storages of numbers by name, got {kind or 'others'}")
    name = f"{root}/data/{key}"
    wanted = count * STORAGE_BYTES[kind]
    if sizes.get(name) != wanted:
        raise ValueError(f"{path}: {name}: expected {wanted} bytes, got {sizes.get(name)}")


def check_archive(path: Path) -> dict[str, int]:
    """A zip that holds what it seems to: stored as it is, each part once, no larger than the file.

    `torch.save` never compresses, so nothing can swell; torch's reader takes parts by name, and
    none of them is ever written to disk.

    Returns:
        bytes of each part, by name.

    Raises:
        ValueError: it is not; says why.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except Exception as error:  # zipfile raises many kinds on damage
        raise ValueError(
            f"{path}: expected a zip archive as torch.save writes since 1.6, got {error}; an older "
            "file that you trust: load it, save it again"
        ) from error
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise ValueError(f"{path}: {member.filename}: expected a part stored as it is")
        parts = PurePosixPath(member.filename).parts
        if ".." in parts or member.filename.startswith("/") or "\\" in member.filename:
            raise ValueError(f"{path}: expected names inside it, got {member.filename!r}")
    names = [member.filename for member in members]
    if len(set(names)) != len(names):
        raise ValueError(f"{path}: expected each part once, got {sorted(names)}")
    total, size = sum(member.file_size for member in members), path.stat().st_size
    if total > size:
        raise ValueError(f"{path}: expected parts within its {size} bytes, got {total}")
    return {member.filename: member.file_size for member in members}


def check_shapes(
    path: Path | str,
    expected: Shapes,
    found: Shapes,
    *,
    optional: Collection[str] = (),
) -> None:
    """The file holds the expected tensors.

    Raises:
        ValueError: names the first tensor that is missing, unknown or of another shape.
    """
    for name in sorted(expected.keys() | found.keys()):
        want, got = expected.get(name), found.get(name)
        if want != got and not (got is None and name in optional):
            raise ValueError(f"{path}: {name}: expected shape {want} by its config, got {got}")


def check_finite(path: Path, weights: Mapping[str, Tensor]) -> None:
    """No weight is NaN or infinite.

    Raises:
        ValueError: names the tensor.
    """
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name}: expected finite weights, got NaN or Inf")


def _load(path: Path, device: str) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a hostile file can fail in any way
        # torch's own message advises to load without the check: not repeated
        reason = str(error).partition("WeightsUnpickler error:")[2] or str(error)
        line = reason.strip().splitlines()[0] if reason.strip() else type(error).__name__
        raise ValueError(
            f"{path}: expected a file of tensors by name, got: {line}; nothing was run"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{path}: expected tensors by name, got {type(state).__name__}")
    return state


def _shape(path: Path, name: str, value: Any) -> tuple[int, ...]:
    """The shape of a plain dense tensor of numbers that lies in memory in order."""
    plain = type(value) in (Tensor, torch.nn.Parameter) and value.layout == torch.strided
    if not plain or value.is_quantized or value.is_complex() or not value.is_contiguous():
        kind = type(value).__name__
        raise ValueError(f"{path}: {name}: expected a dense tensor of numbers, got {kind}")
    return tuple(value.shape)
