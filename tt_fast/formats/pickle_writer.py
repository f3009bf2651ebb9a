"""Write pickles of classes that are not installed here, by their names."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Global:
    """A class or function, named."""

    module: str
    name: str


@dataclass(frozen=True)
class New:
    """An object made by a class without arguments."""

    cls: Global


@dataclass(frozen=True)
class Call:
    """What a function returns."""

    function: Global
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Built:
    """An object that was made, then given its state."""

    made: New | Call
    state: Any


@dataclass(frozen=True)
class PersistentId:
    """What the reader's `persistent_load` is asked for: in torch's files a tensor's storage."""

    pid: tuple[Any, ...]


def write_pickle(value: Any) -> bytes:
    """A pickle, protocol 3, of plain values, arrays of numbers and the classes above.

    Raises:
        TypeError: something else.
    """
    return pickle.PROTO + b"\x03" + _dump(value) + pickle.STOP


def _dump(value: Any) -> bytes:
    if isinstance(value, np.ndarray):
        return _dump(_array(value))
    if isinstance(value, Mapping):
        items = b"".join(_dump(key) + _dump(item) for key, item in value.items())
        return pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS
    if isinstance(value, (tuple, list)):
        items = b"".join(_dump(item) for item in value)
        return pickle.MARK + items + (pickle.TUPLE if isinstance(value, tuple) else pickle.LIST)
    if isinstance(value, (Global, New, Call, Built, PersistentId)):
        return _dump_object(value)
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return _dump_plain(value)
    raise TypeError(f"value: expected something plain to pickle, got {type(value).__name__}")


def _dump_plain(value: bool | int | float | str | bytes | None) -> bytes:
    if value is None:
        return pickle.NONE
    if isinstance(value, bool):
        return pickle.NEWTRUE if value else pickle.NEWFALSE
    if isinstance(value, int):
        return pickle.INT + f"{value}\n".encode()
    if isinstance(value, float):
        return pickle.BINFLOAT + struct.pack(">d", value)
    if isinstance(value, str):
        text = value.encode()
        return pickle.BINUNICODE + struct.pack("<I", len(text)) + text
    return pickle.BINBYTES + struct.pack("<I", len(value)) + value


def _dump_object(value: Global | New | Call | Built | PersistentId) -> bytes:
    if isinstance(value, Global):
        return pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode()
    if isinstance(value, New):
        return _dump(value.cls) + pickle.EMPTY_TUPLE + pickle.NEWOBJ
    if isinstance(value, Call):
        return _dump(value.function) + _dump(value.args) + pickle.REDUCE
    if isinstance(value, Built):
        return _dump(value.made) + _dump(value.state) + pickle.BUILD
    return _dump(value.pid) + pickle.BINPERSID


def _array(values: NDArray[Any]) -> Built:
    """The calls that numpy 1 and 2 both make an array from."""
    little = values.dtype.newbyteorder("<")
    code = little.str.lstrip("<|")
    order = "|" if little.itemsize == 1 else "<"
    dtype = Built(
        Call(Global("numpy", "dtype"), (code, False, True)),
        (3, order, None, None, None, -1, -1, 0),
    )
    made = Call(
        Global("numpy.core.multiarray", "_reconstruct"),
        (Global("numpy", "ndarray"), (0,), b"b"),
    )
    raw = np.ascontiguousarray(values, little).tobytes()
    return Built(made, (1, values.shape, dtype, False, raw))
