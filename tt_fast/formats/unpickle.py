"""Read pickles of strangers without running them.

A pickle is a program: unpickling calls whatever it names. Here it may name only the few classes and
functions that checkpoints of the Trajectory Transformer hold, and each name stands for something
inert of our own: an object that keeps its state, an array whose bytes are checked. Nothing of what
the file names is ever imported.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Largest pickle that is read, in bytes: a discretizer holds its thresholds, perhaps its data.
MAX_BYTES = 2**28

#: Bytes of a number in torch's storages.
STORAGE_BYTES = {
    "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2,
    "LongStorage": 8, "IntStorage": 4, "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1,
    "BoolStorage": 1,
}  # fmt: skip

_MAX_MEMO = 2**20  # slots; a checkpoint needs some hundreds

# What protocols 2 to 4 need for objects, arrays and plain values. Left out: EXT* (a registry that
# is not ours), INST and OBJ (protocol 0), NEXT_BUFFER and the like, LONG4 (numbers of more than 255
# bytes), DUP (no pickler writes it).
# fmt: off
_OPCODES = frozenset({
    # plain values
    "NONE", "NEWTRUE", "NEWFALSE", "INT", "LONG", "BININT", "BININT1", "BININT2", "LONG1", "FLOAT",
    "BINFLOAT", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING",
    "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
    # containers
    "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "LIST", "APPEND", "APPENDS",
    "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS",
    # objects
    "GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID",
    # the machine itself
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "PUT", "BINPUT", "LONG_BINPUT",
    "GET", "BINGET", "LONG_BINGET", "MEMOIZE",
})
# fmt: on


class PickledObject:
    """An object of a class that was not imported: its name and what it held."""

    origin = ""
    """module.Class"""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def __new__(cls) -> PickledObject:
        self = super().__new__(cls)
        self.state = {}
        return self

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise ValueError(f"{self.origin}: expected a dict as its state")
        self.state = state


class PickledDict(dict[Any, Any]):
    """An OrderedDict, its attributes dropped: torch puts some there, a stranger could any."""

    def __setstate__(self, state: Any) -> None:
        pass


class PickledArray:
    """A numpy array: shape, type and bytes are checked before it is made."""

    value: NDArray[Any] = np.empty(0)
    """Until its state is known"""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, raw = state
        kind = dtype.numpy() if isinstance(dtype, PickledDType) else None
        if not _is_shape(shape) or kind is None or not isinstance(raw, bytes):
            raise ValueError("expected an array of numbers: its shape, type and bytes")
        num_bytes = kind.itemsize
        for n in shape:
            num_bytes *= n
        if num_bytes != len(raw):
            raise ValueError(f"expected {num_bytes} bytes for shape {shape}, got {len(raw)}")
        order: Any = "F" if is_fortran else "C"
        self.value = np.frombuffer(raw, kind).reshape(shape, order=order)


class PickledDType:
    """The type of an array's numbers."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]

    def numpy(self) -> np.dtype[Any]:
        """The dtype, if it is one of numbers of a fixed width."""
        codes = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")
        if self.code not in codes or self.order not in ("<", ">", "=", "|"):
            got = self.code if isinstance(self.code, str) else type(self.code)  # never endless
            raise ValueError(f"expected an array of numbers, got dtype {got!r}")
        dtype: np.dtype[Any] = np.dtype(self.order + self.code)
        return dtype


def _is_shape(sizes: Any) -> bool:
    if not isinstance(sizes, tuple) or len(sizes) > 8:
        return False
    return all(type(n) is int and n >= 0 for n in sizes)


class _Inert:
    """A function that a pickle may call: ours, in place of the one it names."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setstate__(self, state: Any) -> None:
        raise ValueError("expected an object, got a function with a state")


def _scalar(dtype: Any, raw: Any) -> Any:
    array = PickledArray()
    array.__setstate__((1, (), dtype, False, raw))
    return array.value.item()


def _object_class(module: str, name: str) -> type[PickledObject]:
    return type(name, (PickledObject,), {"origin": f"{module}.{name}", "__doc__": "Inert."})


_CLASSES = (
    ("trajectory.utils.config", "Config"),
    ("trajectory.models.transformers", "GPT"),
    ("trajectory.models.transformers", "ConditionalGPT"),
    ("trajectory.datasets.sequence", "SequenceDataset"),
    ("trajectory.datasets.sequence", "DiscretizedDataset"),
    ("trajectory.datasets.sequence", "GoalDataset"),
    ("trajectory.utils.training", "Trainer"),
    ("trajectory.utils.discretization", "QuantileDiscretizer"),
    ("trajectory.utils.discretization", "KBinsDiscretizer"),
)


def _known_names() -> dict[tuple[str, str], Any]:
    known: dict[tuple[str, str], Any] = {pair: _object_class(*pair) for pair in _CLASSES}
    for core in ("numpy.core", "numpy._core"):  # numpy 1 and 2
        known[f"{core}.multiarray", "_reconstruct"] = _Inert(lambda *_: PickledArray())
        known[f"{core}.multiarray", "scalar"] = _Inert(_scalar)
    known["numpy", "ndarray"] = PickledArray
    known["numpy", "dtype"] = PickledDType
    known["collections", "OrderedDict"] = _Inert(lambda: PickledDict())
    # tensors are not made here: torch does that, once all of the file has been looked at
    for rebuild in ("_rebuild_tensor_v2", "_rebuild_parameter"):
        known["torch._utils", rebuild] = _Inert(lambda *_: None)
    known |= {("torch", name): _object_class("torch", name) for name in STORAGE_BYTES}
    return known


_KNOWN = _known_names()


def _checking_keys(opcode: bytes, keys: slice) -> Callable[[Any], None]:
    """What an opcode does to a dict, once the keys among the newest items were looked at."""
    apply: Callable[[Any], None] = pickle._Unpickler.dispatch[opcode[0]]

    def check_and_apply(machine: Any) -> None:
        for key in machine.stack[keys]:
            if not isinstance(key, (str, int)):
                raise pickle.UnpicklingError(f"a {type(key).__name__} as a key")
        apply(machine)

    return check_and_apply


class _Unpickler(pickle._Unpickler):
    """Python's own instead of C's: it lets keys be looked at before they are hashed.

    To hash or to show tuples of tuples may take forever, or more stack than there is.
    """

    dispatch = pickle._Unpickler.dispatch | {
        pickle.SETITEM[0]: _checking_keys(pickle.SETITEM, slice(-2, -1)),
        pickle.SETITEMS[0]: _checking_keys(pickle.SETITEMS, slice(None, None, 2)),
        pickle.DICT[0]: _checking_keys(pickle.DICT, slice(None, None, 2)),
    }

    def __init__(self, content: bytes, persistent_ids: list[Any]) -> None:
        super().__init__(io.BytesIO(content))
        self._persistent_ids = persistent_ids
        self._bytes_left = len(content)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return _Inert(self._latin1)
        try:
            return _KNOWN[module, name]
        except KeyError:
            message = f"it names {module}.{name}, which no checkpoint holds; nothing was run"
            raise pickle.UnpicklingError(message) from None

    def persistent_load(self, pid: Any) -> None:
        self._persistent_ids.append(pid)

    def _latin1(self, text: Any, encoding: Any) -> bytes:
        """Bytes that protocol 2 holds as text, each once: one text again and again is a bomb."""
        if not isinstance(text, str) or encoding != "latin1":
            raise ValueError("expected bytes as latin1 text")
        self._bytes_left -= len(text)
        if self._bytes_left < 0:
            raise ValueError("expected no more bytes than the file has")
        return text.encode("latin1")


def read_pickle(content: bytes, name: str, persistent_ids: list[Any] | None = None) -> Any:
    """What a pickle holds, with inert stand-ins for its objects and None for tensors.

    Args:
        content: the pickle.
        name: what the error calls it, a file.
        persistent_ids: a list to append those to that the pickle asks for (torch's storages).

    Raises:
        ValueError: too large, damaged, or it names anything but the classes of checkpoints; nothing
            that it names was imported or called.
    """
    try:
        _check_opcodes(content)
        return _Unpickler(content, [] if persistent_ids is None else persistent_ids).load()
    except Exception as error:  # a hostile program can fail in any way
        raise ValueError(f"{name}: expected a checkpoint's pickle, got: {error}") from error


def read_pickle_file(path: Path) -> Any:
    """`read_pickle` of a file.

    Raises:
        ValueError: see `read_pickle`.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{path}: expected a pickle of at most {MAX_BYTES} bytes, got {size}")
    return read_pickle(path.read_bytes(), str(path))


def _check_opcodes(content: bytes) -> None:
    """Refuse opcodes that checkpoints do not need, and memo slots that would fill the memory."""
    if len(content) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES} bytes")
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name not in _OPCODES:
            raise ValueError(f"opcode {opcode.name}")
        if (
            opcode.name in ("PUT", "BINPUT", "LONG_BINPUT")
            and not 0 <= int(str(argument)) < _MAX_MEMO
        ):
            raise ValueError(f"memo slot {argument}")
