"""Checkpoints: round trips, and every kind of damage is refused with its reason."""

import io
import json
import shutil
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_checkpoint, tiny_dataset, tiny_train_config, weights_equal

from tt_fast import Checkpoint
from tt_fast.checkpoint import _sha256
from tt_fast.config import Strategy, config_to_dict
from tt_fast.data.windows import build_transitions
from tt_fast.discretizer import Discretizer


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return tiny_checkpoint().save(tmp_path / "checkpoint")


def _reseal(folder: Path, **changes: object) -> None:
    """Make config.json agree with the files again, as an author of such a folder could."""
    config = json.loads((folder / "config.json").read_text())
    config["model"] |= changes
    config["sha256"] = {name: _sha256(folder / name) for name in config["sha256"]}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("goal_conditioned", [False, True])
def test_round_trip(tmp_path: Path, goal_conditioned: bool) -> None:
    before = tiny_checkpoint(goal_conditioned=goal_conditioned)
    after = Checkpoint.load(before.save(tmp_path / "c"))
    assert weights_equal(before.model, after.model)
    assert after.model.config == before.model.config
    assert not after.model.training
    assert before.discretizer is not None
    assert after.discretizer is not None
    np.testing.assert_array_equal(after.discretizer.thresholds, before.discretizer.thresholds)
    assert after.metadata == before.metadata


def test_round_trip_without_discretizer(tmp_path: Path) -> None:
    bare = Checkpoint(tiny_checkpoint().model, None)
    assert Checkpoint.load(bare.save(tmp_path / "c")).discretizer is None


@pytest.mark.parametrize("strategy", ["quantile", "uniform"])
def test_a_discretizer_is_fitted_as_the_metadata_say(tmp_path: Path, strategy: Strategy) -> None:
    settings = config_to_dict(tiny_train_config(strategy=strategy, discount=0.9))
    metadata = {"discount": 0.9, "train_config": settings}
    before = Checkpoint(tiny_checkpoint().model, None, metadata)
    values = build_transitions(tiny_dataset(), discount=0.9, termination_penalty=-100.0)
    wanted = Discretizer.fit_columns(values.columns(), 8, strategy)
    before.save(tmp_path / "ours")
    before.save_foreign(tmp_path / "theirs", "huggingface")
    for name in ("ours", "theirs"):
        found = Checkpoint.load(tmp_path / name, dataset=tiny_dataset()).discretizer
        assert found is not None
        np.testing.assert_array_equal(found.thresholds, wanted.thresholds)


def test_run_folder_resolves_to_its_newest(tmp_path: Path) -> None:
    for step in (5, 10):
        tiny_checkpoint(seed=step).save(tmp_path / "checkpoints" / f"step_{step:08d}")
    assert weights_equal(Checkpoint.load(tmp_path).model, tiny_checkpoint(seed=10).model)


def test_save_refuses_a_folder_in_use(saved: Path) -> None:
    with pytest.raises(FileExistsError, match="expected a new or empty folder"):
        tiny_checkpoint(seed=1).save(saved)
    assert weights_equal(Checkpoint.load(saved).model, tiny_checkpoint().model)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a checkpoint"):
        Checkpoint.load(tmp_path)


@pytest.mark.parametrize("name", ["weights.safetensors", "discretizer.npz", "metadata.json"])
def test_flipped_bit(saved: Path, name: str) -> None:
    content = bytearray((saved / name).read_bytes())
    content[len(content) // 2] ^= 1
    (saved / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: damaged: its SHA-256"):
        Checkpoint.load(saved)


@pytest.mark.parametrize("name", ["weights.safetensors", "discretizer.npz", "metadata.json"])
def test_missing_file(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(ValueError, match=rf"{name}: expected a file that config.json lists"):
        Checkpoint.load(saved)


@pytest.mark.parametrize("name", ["weights.safetensors", "discretizer.npz", "metadata.json"])
def test_truncated_and_resealed(saved: Path, name: str) -> None:
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[: len(content) // 2])
    _reseal(saved)
    with pytest.raises(ValueError, match=f"{name}: (damaged|expected a JSON file)"):
        Checkpoint.load(saved)


def test_damaged_config(saved: Path) -> None:
    (saved / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: expected a JSON file"):
        Checkpoint.load(saved)
    (saved / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config.json: expected a JSON object, got list"):
        Checkpoint.load(saved)
    (saved / "config.json").write_text('{"format": 2}')
    with pytest.raises(ValueError, match=r"expected format 1, got 2"):
        Checkpoint.load(saved)
    (saved / "config.json").write_text('{"format": 1}')
    with pytest.raises(ValueError, match=r"expected keys model and sha256"):
        Checkpoint.load(saved)


def test_files_outside_the_folder_are_not_read(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    config["sha256"]["../secret"] = ""
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"expected known file names, got '../secret'"):
        Checkpoint.load(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ref_scores": "ab"}, r"ref_scores: expected \(min, max\), got 'ab'"),
        ({"ref_scores": [1]}, r"ref_scores: expected \(min, max\), got \[1\]"),
        ({"ref_scores": [1, 1]}, r"ref_scores: expected \(min, max\) with min < max"),
        ({"train_config": 5}, "train_config: expected an object, got 5"),
        ({"env_id": 5}, "env_id: expected text, got 5"),
        ({"dataset": ["a"]}, r"dataset: expected text, got \['a'\]"),
        ({"discount": 2}, r"discount: expected a number in \[0.0, 1.0\], got 2"),
    ],
)
def test_metadata_that_make_no_sense(saved: Path, changes: dict[str, Any], message: str) -> None:
    metadata = json.loads((saved / "metadata.json").read_text())
    (saved / "metadata.json").write_text(json.dumps(metadata | changes))
    _reseal(saved)
    with pytest.raises(ValueError, match=rf"metadata.json: {message}"):
        Checkpoint.load(saved)
    (saved / "metadata.json").write_text(json.dumps(metadata | dict.fromkeys(changes)))
    _reseal(saved)
    Checkpoint.load(saved)


def test_unknown_setting(saved: Path) -> None:
    _reseal(saved, colour="blue")
    with pytest.raises(ValueError, match=r"ModelConfig: expected keys among .*colour"):
        Checkpoint.load(saved)


def test_weights_of_another_model(saved: Path) -> None:
    _reseal(saved, num_layers=3)
    missing = r"blocks.2.attn.key.bias: expected shape \(16,\) by its config, got None"
    with pytest.raises(ValueError, match=missing):
        Checkpoint.load(saved)
    _reseal(saved, num_layers=2, action_dim=3)
    with pytest.raises(
        ValueError, match=r"expected shape \(8, 9, 16\) by its config, got \(7, 9, 16"
    ):
        Checkpoint.load(saved)


@pytest.mark.parametrize("name", ["embed_dim", "num_transitions", "vocab_size", "num_layers"])
def test_absurd_sizes_allocate_nothing(saved: Path, name: str) -> None:
    _reseal(saved, **{name: 1 << 40})
    with pytest.raises(ValueError, match=r"expected (shape|an integer)"):
        Checkpoint.load(saved)


def test_nan_weights(saved: Path) -> None:
    weights = load_file(saved / "weights.safetensors")
    weights["ln_f.bias"][0] = torch.nan
    save_file(weights, saved / "weights.safetensors")
    _reseal(saved)
    with pytest.raises(ValueError, match=r"ln_f.bias: expected finite weights, got NaN or Inf"):
        Checkpoint.load(saved)


def test_discretizer_of_another_model(saved: Path) -> None:
    np.savez(saved / "discretizer.npz", thresholds=np.zeros((5, 7)))
    _reseal(saved)
    message = r"expected thresholds float64 \(9, 7\), got float64 \(5, 7\)"
    with pytest.raises(ValueError, match=message):
        Checkpoint.load(saved)


def test_absurd_thresholds_allocate_nothing(saved: Path) -> None:
    header = {"descr": "<f8", "fortran_order": False, "shape": (10**12, 7)}
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, header)
    with zipfile.ZipFile(saved / "discretizer.npz", "w") as archive:
        archive.writestr("thresholds.npy", content.getvalue())
    _reseal(saved)
    with pytest.raises(ValueError, match=r"expected thresholds float64 \(9, 7\), got"):
        Checkpoint.load(saved)


def test_arrays_that_no_discretizer_has_are_not_read(saved: Path) -> None:
    before = np.load(saved / "discretizer.npz")["thresholds"]
    np.savez_compressed(saved / "discretizer.npz", thresholds=before, more=np.zeros(2**23))
    _reseal(saved)
    tracemalloc.start()
    found = Checkpoint.load(saved).discretizer
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found is not None
    np.testing.assert_array_equal(found.thresholds, before)
    assert peak < 2**25  # `more` has 2**26 bytes


def test_an_array_is_no_discretizer(saved: Path) -> None:
    np.save(saved / "discretizer", np.zeros((9, 7)))
    (saved / "discretizer.npy").rename(saved / "discretizer.npz")
    _reseal(saved)
    with pytest.raises(ValueError, match=r"discretizer.npz: damaged"):
        Checkpoint.load(saved)


def test_thresholds_by_columns(saved: Path, tmp_path: Path) -> None:
    thresholds = np.asfortranarray(np.arange(63.0).reshape(9, 7))
    before = Checkpoint(tiny_checkpoint().model, Discretizer(thresholds))
    found = Checkpoint.load(before.save(tmp_path / "c")).discretizer
    assert found is not None
    np.testing.assert_array_equal(found.thresholds, thresholds)


def test_pickled_thresholds_are_not_run(saved: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Malicious:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return (Path.touch, (canary,))

    np.savez(saved / "discretizer.npz", thresholds=np.array([Malicious()], dtype=object))
    _reseal(saved)
    with pytest.raises(ValueError, match=r"discretizer.npz: damaged"):
        Checkpoint.load(saved)
    assert not canary.exists()


def test_a_moved_folder_still_loads(saved: Path, tmp_path: Path) -> None:
    shutil.move(saved, tmp_path / "elsewhere")
    assert weights_equal(Checkpoint.load(tmp_path / "elsewhere").model, tiny_checkpoint().model)
