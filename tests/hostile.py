"""Files that try to run something, to fill the memory or to read what is not theirs."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tt_fast.formats.pickle_writer import Built, Call, Global, New, PersistentId, write_pickle

CONFIG = Global("trajectory.utils.config", "Config")

_ORDERED = Call(Global("collections", "OrderedDict"), ())
_FLOATS = Global("torch", "FloatStorage")

# A tuple that holds the one before twice, sixty times over: small, but not to who goes through it.
_ENDLESS = b")q\x00" + b"".join(b"0h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60))


class Runs:
    """Pickles as a call, as an attacker's class does."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def touch(canary: Path) -> str:
    """A shell command."""
    return f"echo run > '{canary}'"


def calls(canary: Path) -> dict[str, bytes]:
    """Pickles that run something when they are loaded as pickles are meant to be."""
    code = f"open({str(canary)!r}, 'w').close()"
    system = Call(Global("os", "system"), (touch(canary),))
    getter = Call(Global("builtins", "getattr"), (Global("os", "path"), "os"))
    return {
        "os.system": pickle.dumps(Runs(os.system, touch(canary))),
        "os.system, protocol 0": b"cos\nsystem\n(V" + touch(canary).encode() + b"\ntR.",
        "os.system, INST": b"(V" + touch(canary).encode() + b"\nios\nsystem\n.",
        "builtins.eval": pickle.dumps(Runs(eval, code)),
        "builtins.exec": pickle.dumps(Runs(exec, code), protocol=2),
        "posix.system, by name on the stack": (
            b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c" + _short(touch(canary)) + b"\x85R."
        ),
        "getattr, then system": write_pickle(
            Call(Call(Global("builtins", "getattr"), (getter, "system")), (touch(canary),))  # type: ignore[arg-type]
        ),
        "in a config's dict": write_pickle(_config({"vocab_size": system})),
        "as a config's state": write_pickle(Built(New(CONFIG), system)),
        "as an array's bytes": write_pickle(_config({"N": _array_of(system)})),
        "twice nested": write_pickle(_config({"a": [{"b": (system,)}]})),
    }


def traps() -> dict[str, bytes]:
    """Pickles that run nothing, but fill the memory, use a registry or bend what they are given."""
    return {
        "a registry's entry": b"\x80\x02\x82\x01.",
        "a memo slot of gigabytes": b"\x80\x04Nr\xff\xff\xff\x7f.",
        "a string of gigabytes": b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"abc.",
        "an array of terabytes": write_pickle(_array_of(b"12345678", shape=(2**40,))),
        "an array of objects": write_pickle(_array_of(b"12345678", code="O8", shape=(1,))),
        "a negative shape": write_pickle(_array_of(b"", shape=(-1, 0))),
        "an array's scalar of objects": write_pickle(
            Call(Global("numpy.core.multiarray", "scalar"), (_dtype("O8"), b"12345678"))
        ),
        "a state for a function": write_pickle(
            Built(New(CONFIG), Built(Global("_codecs", "encode"), {"x": 1}))  # type: ignore[arg-type]
        ),
        "another codec": write_pickle(Call(Global("_codecs", "encode"), ("x", "rot13"))),
        "a class with arguments": write_pickle(Call(CONFIG, ({"x": 1},))),
        "a function as the class of an array": write_pickle(
            Call(Global("numpy.core.multiarray", "_reconstruct"), (Global("os", "system"), (), b""))
        ),
        "a class's method by a dotted name": (
            b"\x80\x04\x8c\x17trajectory.utils.config\x8c\x0fConfig.__init__\x93."
        ),
        "nothing": b"",
        "no end": b"\x80\x04N",
        "text": b"hello, world",
        "an endless number": b"\x80\x02I" + b"9" * 100_000 + b"\n.",
        "a number of many bytes": b"\x80\x02\x8b" + struct.pack("<i", 1000) + bytes(1000) + b".",
        "a copy of the newest": b"\x80\x02N2\x86.",
        "a key that is deeply nested": b"\x80\x02}" + b")" + b"\x85" * 300_000 + b"Ns.",
        "a key that is endless": b"\x80\x02}" + _ENDLESS + b"Ns.",
        "a key that is endless, by DICT": b"\x80\x02(" + _ENDLESS + b"Nd.",
        "keys that are endless": _with_endless({"x": {"endless": None}}),
        "an endless shape": _with_endless(_array_of(b"", shape="endless")),
        "an endless type": _with_endless(_array_of(b"12345678", code="endless")),
        "an endless storage": _with_endless(_storage("endless")),
        "an endless name of a storage": _with_endless(
            _storage("0", Built(_ORDERED, {"__name__": "endless"}))
        ),
        "methods of a dict": write_pickle(Built(New(CONFIG), Built(_ORDERED, {"get": None}))),
        "an array without a state": write_pickle(
            Built(
                New(Global("trajectory.utils.discretization", "QuantileDiscretizer")),
                {"thresholds": New(Global("numpy", "ndarray"))},
            )
        ),
    }


def torch_traps(good: Path) -> dict[str, Callable[[Path], None]]:
    """Writers of torch files that are not what they seem; `good` is a whole one of tensors."""
    with zipfile.ZipFile(good) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    root = next(iter(parts)).split("/")[0]
    storage = {f"{root}/data/0": bytes(64), f"{root}/version": b"3\n"}

    def crafted(count: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Any:
        pid = PersistentId(("storage", _FLOATS, "0", "cpu", count))
        rebuild = Global("torch._utils", "_rebuild_tensor_v2")
        tensor = Call(rebuild, (pid, offset, size, stride, False, _ORDERED))
        content = {f"{root}/data.pkl": write_pickle({"pos_emb": tensor})} | storage
        return lambda path: write_zip(path, content)

    name = next(name for name in parts if "/data/" in name)
    return {
        "a storage beyond the file's end": crafted(2**20, 0, (4, 4), (4, 1)),
        "a tensor beyond its storage": crafted(16, 0, (2**40,), (1,)),
        "an offset beyond its storage": crafted(16, 2**40, (4, 4), (4, 1)),
        "one number for terabytes": crafted(16, 0, (2**20, 2**20), (0, 0)),
        "negative sizes": crafted(16, 0, (-4, 4), (4, 1)),
        "negative strides": crafted(16, 8, (2, 2), (-1, 1)),
        "compressed parts": lambda path: write_zip(
            path, parts | {name: bytes(2**26)}, zipfile.ZIP_DEFLATED
        ),
        "parts that overlap": lambda path: _write_overlapping(path, parts),
        "a path out of the archive": lambda path: write_zip(path, parts | {"../../evil": b"x"}),
        "an absolute path": lambda path: write_zip(path, parts | {"/tmp/evil": b"x"}),
        "two pickles": lambda path: write_zip(path, parts | {"b/data.pkl": b"N."}),
        "no pickle": lambda path: write_zip(path, storage),
        "half a file": lambda path: _write_half(path, good),
        "a pickle without archive": lambda path: _write(path, pickle.dumps({"pos_emb": 1})),
        "nothing": lambda path: _write(path, b""),
    }


def write_zip(path: Path, parts: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> None:
    """A zip of these parts."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


def torch_file_of(content: bytes, path: Path) -> None:
    """A torch file whose pickle is `content`."""
    write_zip(path, {"archive/data.pkl": content, "archive/version": b"3\n"})


def _write_overlapping(path: Path, parts: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
        first = max(archive.infolist(), key=lambda member: member.file_size)
        for i in range(200):  # the directory names the same bytes again and again
            copy = zipfile.ZipInfo(f"{first.filename}_{i}")
            for field in ("header_offset", "file_size", "compress_size", "CRC"):
                setattr(copy, field, getattr(first, field))
            archive.filelist.append(copy)


def _write_half(path: Path, good: Path) -> None:
    content = good.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _config(values: dict[str, Any]) -> Built:
    cls = Global("trajectory.models.transformers", "GPT")
    return Built(New(CONFIG), {"_class": cls, "_dict": values})


def _dtype(code: str) -> Built:
    made = Call(Global("numpy", "dtype"), (code, False, True))
    return Built(made, (3, "<", None, None, None, -1, -1, 0))


def _with_endless(value: Any) -> bytes:
    """A pickle in which "endless" stands for a tuple that is."""
    return write_pickle(value).replace(b"X\x07\x00\x00\x00endless", _ENDLESS)


def _storage(name: str, kind: Any = _FLOATS) -> PersistentId:
    return PersistentId(("storage", kind, name, "cpu", 1))


def _array_of(raw: Any, *, code: str = "f8", shape: Any = (1,)) -> Built:
    args = (Global("numpy", "ndarray"), (0,), b"b")
    made = Call(Global("numpy.core.multiarray", "_reconstruct"), args)
    return Built(made, (1, shape, _dtype(code), False, raw))


def _short(text: str) -> bytes:
    return bytes([len(text)]) + text.encode()
