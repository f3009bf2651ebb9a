"""Checkpoints from strangers: nothing in them is run, nothing is allocated on their word."""

from __future__ import annotations

import contextlib
import json
import pickle
import random
import resource
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hostile import calls, torch_file_of, torch_traps, traps, write_zip
from tiny import tiny_checkpoint

from tt_fast import Checkpoint
from tt_fast.formats import FORMATS
from tt_fast.formats.torch_file import read_archive_pickle
from tt_fast.formats.unpickle import read_pickle

CALLS = sorted(calls(Path("canary")))
TRAPS = sorted(traps())

# where a pickle can lie: (format, file, whether it is a torch archive)
PLACES = [
    ("jannerm", "model_config.pkl", False),
    ("jannerm", "data_config.pkl", False),
    ("jannerm", "state_0.pt", True),
    ("faster_tt", "discretizer.pt", True),
    ("faster_tt", "model_last.pt", True),
    ("huggingface", "pytorch_model.bin", True),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A good folder of every format, pickled weights also for Hugging Face's."""
    root = tmp_path_factory.mktemp("formats")
    found = {name: tiny_checkpoint().save_foreign(root / name, name) for name in FORMATS}
    for folder in found.values():
        (folder / "discretizer.npz").unlink()
    state = Checkpoint.load(found["huggingface"]).model.state_dict()
    renamed = {k.replace("mlp.0", "l1").replace("mlp.2", "l2"): v for k, v in state.items()}
    torch.save(renamed, found["huggingface"] / "pytorch_model.bin")
    (found["huggingface"] / "model.safetensors").unlink()
    return found


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A folder of a format to spoil."""

    def make(name: str) -> Path:
        return shutil.copytree(folders[name], tmp_path / name)

    return make


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Ten gigabytes more than now: what would fill the memory fails at once."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 10 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("name", FORMATS)
def test_the_good_folders_load(copy: Callable[[str], Path], name: str) -> None:
    assert Checkpoint.load(copy(name)).model.config.observation_dim == 3


@pytest.mark.parametrize("attack", CALLS)
def test_the_canary_sings(tmp_path: Path, attack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The attacks work where pickles are run, so their silence below means something."""
    for name in ("trajectory", "trajectory.utils", "trajectory.models"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name, cls in (("utils.config", "Config"), ("models.transformers", "GPT")):
        module = types.ModuleType(f"trajectory.{name}")
        setattr(module, cls, type(cls, (), {}))
        monkeypatch.setitem(sys.modules, f"trajectory.{name}", module)
    canary = tmp_path / "canary"
    # after the call some end in an error, as what it returned is no array or no state
    with contextlib.suppress(TypeError, AttributeError, pickle.UnpicklingError):
        pickle.loads(calls(canary)[attack])
    assert canary.exists()


@pytest.mark.parametrize(("name", "file", "is_archive"), PLACES)
@pytest.mark.parametrize("attack", CALLS)
def test_nothing_is_run(
    copy: Callable[[str], Path], tmp_path: Path, name: str, file: str, is_archive: bool, attack: str
) -> None:
    canary, folder = tmp_path / "canary", copy(name)
    content = calls(canary)[attack]
    if is_archive:
        torch_file_of(content, folder / file)
    else:
        (folder / file).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{file}: expected a checkpoint's pickle, got: "):
        Checkpoint.load(folder)
    assert not canary.exists()


def test_the_message_names_what_was_refused(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("jannerm")
    (folder / "model_config.pkl").write_bytes(calls(tmp_path / "canary")["builtins.eval"])
    wanted = r"model_config.pkl: .* it names builtins.eval, which no checkpoint holds; nothing was"
    with pytest.raises(ValueError, match=wanted):
        Checkpoint.load(folder)


@pytest.mark.parametrize(("name", "file", "is_archive"), PLACES)
@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.usefixtures("little_memory")
def test_traps_are_refused(
    copy: Callable[[str], Path], name: str, file: str, is_archive: bool, trap: str
) -> None:
    folder, content = copy(name), traps()[trap]
    if is_archive:
        torch_file_of(content, folder / file)
    else:
        (folder / file).write_bytes(content)
    with pytest.raises(ValueError, match=file):
        Checkpoint.load(folder)


@pytest.mark.parametrize("name", ["jannerm", "faster_tt", "huggingface"])
@pytest.mark.usefixtures("little_memory")
def test_torch_files_are_what_they_seem(copy: Callable[[str], Path], name: str) -> None:
    folder = copy(name)
    path = next(p for p in folder.iterdir() if p.suffix in (".pt", ".bin") and "disc" not in p.name)
    good = path.rename(path.with_suffix(".good"))
    for trap, write in torch_traps(good).items():
        path.unlink(missing_ok=True)
        write(path)
        with pytest.raises(ValueError, match=path.name):
            pytest.fail(f"{trap}: {Checkpoint.load(folder)}")
    assert not Path("/tmp/evil").exists()


def test_a_tampered_tensor_is_refused(copy: Callable[[str], Path]) -> None:
    folder = copy("jannerm")
    path = folder / "state_0.pt"
    good = torch.load(path, weights_only=True)
    changes = {
        "a sparse tensor": {"pos_emb": torch.zeros(1, 27, 16).to_sparse()},
        "complex numbers": {"pos_emb": torch.zeros(1, 27, 16, dtype=torch.complex64)},
        "no tensor": {"pos_emb": "text"},
        "NaN": {"pos_emb": torch.full((1, 27, 16), torch.nan)},
        "another mask": {"blocks.0.attn.mask": torch.ones(1, 1, 27, 27)},
        "a transposed view": {"pos_emb": torch.zeros(1, 16, 27).mT},
        "one more": {"more": torch.zeros(2)},
    }
    for change, tensors in changes.items():
        torch.save(good | tensors, path)
        with pytest.raises(ValueError, match=r"state_0.pt"):
            pytest.fail(f"{change}: {Checkpoint.load(folder)}")


LETTERS = "abcdefghijklmnopqrstuvwxyz"
LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{letter}: &{letter} [*{before}, *{before}]\n" for before, letter in pairwise(LETTERS)
)
LAUGHS += "model: {{observation_dim: *z}}\ndataset: {{}}\n"

YAMLS = {
    "a call": "model: !!python/object/apply:os.system ['{command}']\ndataset: {{}}\n",
    "an object": "model: !!python/object/new:os.system ['{command}']\ndataset: {{}}\n",
    "a module": "model: !!python/module:os\ndataset: {{}}\n",
    "a name": "model: !!python/name:os.system\ndataset: {{}}\n",
    "nesting": "model: " + "[" * 100_000 + "\n",
    "a million laughs": LAUGHS,
    "a list": "[1, 2]",
    "no sections": "model: 3\ndataset: 4\n",
    "absurd sizes": "model: {{observation_dim: 1000000000000, action_dim: 1, "
    "transition_dim: 1000000000003, vocab_size: 8, seq_len: 1000000000002}}\ndataset: {{}}\n",
}  # fmt: skip


@pytest.mark.parametrize("attack", sorted(YAMLS))
@pytest.mark.usefixtures("little_memory")
def test_yaml_is_data(copy: Callable[[str], Path], tmp_path: Path, attack: str) -> None:
    canary, folder = tmp_path / "canary", copy("faster_tt")
    text = YAMLS[attack].format(command=f"touch {canary}")
    (folder / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config.yaml"):
        Checkpoint.load(folder)
    assert not canary.exists()


@pytest.mark.parametrize("change", [
    {"n_layer": 10**9}, {"n_embd": 10**12}, {"vocab_size": 10**12}, {"block_size": 7 * 10**15 - 1},
    {"n_head": 0}, {"observation_dim": -3}, {"transition_dim": 8}, {"vocab_size": "8"},
    {"n_layer": True}, {"block_size": 28}, {"embd_pdrop": [1]}, {"action_weight": "5"},
    {"model_type": "bert"}, {"n_embd": {"a": 1}}, {"resid_pdrop": 2.0},
])  # fmt: skip
@pytest.mark.usefixtures("little_memory")
def test_absurd_configs(copy: Callable[[str], Path], change: dict[str, object]) -> None:
    folder = copy("huggingface")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(ValueError, match=r"config.json|pytorch_model.bin"):
        Checkpoint.load(folder)


def is_refused(read: Callable[[], object], start: str) -> bool:
    """Whether `read` raised a ValueError whose message starts so; any other error escapes."""
    try:
        read()
    except ValueError as error:
        return str(error).startswith(start)
    return False


def test_damage_of_any_kind_is_a_value_error(folders: dict[str, Path]) -> None:
    """Bytes changed at random: whatever comes out is inert, or a ValueError."""
    rng = random.Random(0)
    sources = [
        (folders["jannerm"] / f"{name}_config.pkl").read_bytes() for name in ("model", "data")
    ]
    refused = 0
    for _ in range(2000):
        content = bytearray(rng.choice(sources))
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        refused += is_refused(lambda: read_pickle(bytes(content), "damaged"), "damaged: ")  # noqa: B023
    assert refused > 500


def test_damaged_archives_are_a_value_error(folders: dict[str, Path], tmp_path: Path) -> None:
    rng = random.Random(1)
    source = (folders["faster_tt"] / "discretizer.pt").read_bytes()
    path, refused = tmp_path / "discretizer.pt", 0
    for _ in range(500):
        content = bytearray(source)
        for _ in range(rng.randint(1, 6)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content)
        refused += is_refused(lambda: read_archive_pickle(path), f"{path}: ")
    assert refused > 250


def test_a_text_is_made_bytes_once() -> None:
    """Again and again, a few bytes of program would make as many as the text has each time."""
    encode, text = b"c_codecs\nencode\nq\x00", b"X\x00\x10\x00\x00" + b"x" * 2**12
    once = b"\x80\x02" + encode + text + b"X\x06\x00\x00\x00latin1\x86q\x01R"
    assert read_pickle(once + b".", "once") == b"x" * 2**12
    with pytest.raises(ValueError, match=r"again: .* no more bytes than the file has"):
        read_pickle(once + b"h\x00h\x01R.", "again")


def test_a_huge_pickle_is_not_read(tmp_path: Path, copy: Callable[[str], Path]) -> None:
    folder = copy("jannerm")
    with (folder / "model_config.pkl").open("wb") as file:
        file.truncate(2**33)  # a hole: it takes no room on the disk
    with pytest.raises(ValueError, match=r"expected a pickle of at most \d+ bytes, got 8589934592"):
        Checkpoint.load(folder)
    path = tmp_path / "x.pt"
    write_zip(path, {"a/data.pkl": b"\x80\x02N.", "a/version": b"3"})
    assert read_archive_pickle(path) is None
