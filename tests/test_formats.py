"""Checkpoints of other implementations: read as they are, written so that they read them."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from foreign import ALL_FOLDERS, FOLDERS, assert_as_exact, assert_logits, golden_folder
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tiny import tiny_checkpoint, weights_equal

from tt_fast import Checkpoint, formats
from tt_fast.formats.base import Recipe
from tt_fast.formats.pickle_writer import Built, Global, New, write_pickle

FILES = {"jannerm": "model_config.pkl", "faster_tt": "config.yaml", "huggingface": "config.json"}


@pytest.fixture
def copied(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of a golden folder, to damage."""
    return Path(shutil.copytree(golden_folder(request.param)[0], tmp_path / "copy"))


def of(folder: str) -> Any:
    return pytest.mark.parametrize("copied", [folder], indirect=True)


def raw_dataset(check: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {name[4:]: array for name, array in check.items() if name.startswith("raw_")}


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_yaml(path: Path, **changes: Any) -> None:
    values = yaml.safe_load(path.read_text())
    values["model"] |= changes
    path.write_text(yaml.safe_dump(values))


def write_config(path: Path, cls: str, values: dict[str, Any]) -> None:
    """A pickled Config of the original's."""
    module, _, name = cls.rpartition(".")
    made = New(Global("trajectory.utils.config", "Config"))
    path.write_bytes(write_pickle(Built(made, {"_class": Global(module, name), "_dict": values})))


def change_pickle(
    path: Path, cls: str = "trajectory.models.transformers.GPT", **changes: Any
) -> None:
    write_config(path, cls, formats.jannerm._read_config(path)[1] | changes)


def change_state(path: Path, **changes: Any) -> None:
    """Replace tensors of a torch file; None removes one."""
    state = torch.load(path, weights_only=True) | changes
    torch.save({name: value for name, value in state.items() if value is not None}, path)


# ---- reading ----


@pytest.mark.parametrize(("name", "folder"), ALL_FOLDERS)
def test_logits_are_theirs(name: str, folder: str) -> None:
    path, check = golden_folder(folder)
    assert formats.find_format(path) == name
    checkpoint = Checkpoint.load(path)
    assert not checkpoint.model.training
    assert checkpoint.metadata["converted_from"]["format"] == name
    assert_logits(checkpoint.model, check)


@pytest.mark.parametrize("folder", FOLDERS["faster_tt"])
def test_a_token_that_they_lack_is_never_drawn(folder: str) -> None:
    path, check = golden_folder(folder)
    model = Checkpoint.load(path).model
    with torch.no_grad():
        probs = model(torch.from_numpy(check["tokens"][:, :-1])).softmax(dim=-1)
    assert (probs[..., -1] == 0).all()


@pytest.mark.parametrize("folder", FOLDERS["faster_tt"])
def test_discretizer_of_faster_tt(folder: str) -> None:
    path, check = golden_folder(folder)
    ours = Checkpoint.load(path).discretizer
    assert ours is not None
    np.testing.assert_array_equal(ours.thresholds, check["bin_edges"].T)
    np.testing.assert_array_equal(ours.encode(check["disc_X"]), check["disc_idx"])
    obs = slice(0, 3)
    np.testing.assert_array_equal(ours.encode(check["disc_X"][:, obs], obs), check["disc_obs_idx"])
    rounding = 1e-12 if check["bin_edges"].dtype == np.float64 else 1e-6
    np.testing.assert_allclose(
        ours.decode(check["disc_idx"]), check["disc_decode"], rtol=rounding, atol=rounding
    )
    for i, dim in enumerate((-2, -1)):
        found = ours.expectation(check["probs"][:, i], dim)
        np.testing.assert_allclose(found, check["expectation"][:, i], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("folder", FOLDERS["jannerm"])
def test_the_originals_recipe_fits_its_discretizer(folder: str) -> None:
    path, check = golden_folder(folder)
    assert Checkpoint.load(path).discretizer is None
    fitted = Checkpoint.load(path, dataset=raw_dataset(check)).discretizer
    assert fitted is not None
    np.testing.assert_allclose(fitted.thresholds, check["thresholds"], rtol=1e-12)


def test_the_originals_metadata() -> None:
    for folder, discount, penalty in (("gpt", 0.99, -100), ("conditional", 0.9, None)):
        imported = formats.read_foreign(golden_folder(f"jannerm/{folder}")[0], "jannerm")
        assert imported.recipe == Recipe(8, discount, penalty)
        assert imported.metadata["dataset"] == "small-random-v0"
        assert imported.metadata["discount"] == discount
        assert imported.metadata["converted_from"] == {"format": "jannerm", "epoch": 3}
        assert imported.config.goal_conditioned == (folder == "conditional")
        assert imported.config.action_weight == 5


def test_metadata_of_faster_tt() -> None:
    metadata = Checkpoint.load(golden_folder("faster_tt/sep_heads")[0]).metadata
    assert metadata["env_id"].startswith("Hopper")
    assert metadata["discount"] == 0.9


@pytest.mark.parametrize("folder", FOLDERS["faster_tt"])
def test_the_recipe_of_faster_tt(folder: str) -> None:
    path, _ = golden_folder(folder)
    strategy = yaml.safe_load((path / "config.yaml").read_text())["dataset"]["strategy"]
    recipe = formats.read_foreign(path, "faster_tt").recipe
    assert recipe == Recipe(8, 0.9, None, strategy=strategy)


@of("jannerm/gpt")
def test_a_pickled_discretizer(copied: Path) -> None:
    (copied / "with_discretizer.pkl").rename(copied / "data_config.pkl")
    found = Checkpoint.load(copied).discretizer
    assert found is not None
    _, check = golden_folder("jannerm/gpt")
    np.testing.assert_array_equal(found.thresholds, check["thresholds"])
    np.testing.assert_array_equal(
        found.encode(found.decode(np.full((1, 7), 3))), np.full((1, 7), 3)
    )


@of("jannerm/gpt")
def test_without_its_data_config(copied: Path) -> None:
    (copied / "data_config.pkl").unlink()
    assert formats.read_foreign(copied, "jannerm").recipe == Recipe(8)


@of("jannerm/gpt")
def test_epochs(copied: Path) -> None:
    change_state(
        shutil.copy(copied / "state_3.pt", copied / "state_12.pt"), pos_emb=torch.ones(1, 27, 16)
    )
    (copied / "state_latest.pt").write_bytes(b"")
    assert Checkpoint.load(copied).metadata["converted_from"]["epoch"] == 12
    older = formats.read_foreign(copied, "jannerm", epoch=3)
    assert older.metadata["converted_from"]["epoch"] == 3
    assert not torch.equal(older.weights["pos_emb"], torch.ones(1, 27, 16))
    with pytest.raises(FileNotFoundError, match=r"expected state_4.pt, got epochs \[3, 12\]"):
        formats.read_foreign(copied, "jannerm", epoch=4)


@pytest.mark.parametrize("name", ["faster_tt", "huggingface"])
def test_only_the_original_has_epochs(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"epoch: expected None for the format {name}, got 3"):
        formats.read_foreign(golden_folder(FOLDERS[name][0])[0], name, epoch=3)
    with pytest.raises(ValueError, match=rf"epoch: expected None for the format {name}, got 3"):
        tiny_checkpoint().save_foreign(tmp_path / "x", name, epoch=3)
    with pytest.raises(ValueError, match=r"format: expected one of 'jannerm'"):
        tiny_checkpoint().save_foreign(tmp_path / "x", "onnx")
    assert not list(tmp_path.iterdir())


# ---- writing ----


@pytest.mark.parametrize(("name", "folder"), ALL_FOLDERS)
def test_theirs_through_ours_and_back(name: str, folder: str, tmp_path: Path) -> None:
    path, check = golden_folder(folder)
    first = Checkpoint.load(path)
    again = Checkpoint.load(first.save_foreign(tmp_path / "again", name))
    assert_logits(again.model, check)
    assert again.model.config == first.model.config
    if name != "faster_tt":
        assert weights_equal(first.model, again.model)
    if first.discretizer is not None:
        assert again.discretizer is not None
        np.testing.assert_array_equal(again.discretizer.thresholds, first.discretizer.thresholds)
        assert again.discretizer.edge_tolerance == first.discretizer.edge_tolerance
    assert {**again.metadata, "converted_from": None} == {**first.metadata, "converted_from": None}


@pytest.mark.parametrize("name", formats.FORMATS)
def test_ours_through_theirs_and_back(name: str, tmp_path: Path) -> None:
    before = tiny_checkpoint()
    after = Checkpoint.load(before.save_foreign(tmp_path / "theirs", name))
    assert after.model.config == before.model.config
    assert after.discretizer is not None
    assert before.discretizer is not None
    np.testing.assert_array_equal(after.discretizer.thresholds, before.discretizer.thresholds)
    assert {k: after.metadata[k] for k in before.metadata} == before.metadata
    if name != "faster_tt":
        assert weights_equal(before.model, after.model)
        return
    tokens = torch.randint(0, 8, (2, 27))
    with torch.no_grad():
        want, got = before.model(tokens)[..., :-1], after.model(tokens)[..., :-1]
        truth = before.model.double()(tokens)[..., :-1]
    assert_as_exact(got, want, truth)


@pytest.mark.parametrize("name", formats.FORMATS)
def test_their_files_alone_suffice(name: str, tmp_path: Path) -> None:
    before = tiny_checkpoint()
    folder = before.save_foreign(tmp_path / "theirs", name)
    for extra in ("discretizer.npz", "metadata.json"):
        (folder / extra).unlink()
    after = Checkpoint.load(folder)
    assert after.model.config == before.model.config
    assert before.discretizer is not None
    if name == "faster_tt":
        assert after.discretizer is not None
        np.testing.assert_array_equal(after.discretizer.thresholds, before.discretizer.thresholds)
        assert after.metadata["discount"] == 0.9
    else:
        assert after.discretizer is None


@pytest.mark.parametrize("epoch", [None, 7])
def test_goal_conditioned_through_the_originals(epoch: int | None, tmp_path: Path) -> None:
    before = tiny_checkpoint(goal_conditioned=True, goal_value_mask="original")
    folder = before.save_foreign(tmp_path / "theirs", "jannerm", epoch=epoch)
    assert (folder / f"state_{epoch or 0}.pt").is_file()
    after = Checkpoint.load(folder)
    assert weights_equal(before.model, after.model)
    assert after.model.config == before.model.config


@pytest.mark.parametrize(("name", "message"), [
    ("jannerm", r'goal_value_mask: expected "original", the only mask'),
    ("faster_tt", r"model: expected one without goal"),
    ("huggingface", r"model: expected one without goal"),
])  # fmt: skip
def test_goals_that_a_format_cannot_hold(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_checkpoint(goal_conditioned=True).save_foreign(tmp_path / "x", name)
    assert not list(tmp_path.iterdir())


def test_faster_tt_needs_a_discretizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"discretizer: expected one .*got None"):
        Checkpoint(tiny_checkpoint().model, None).save_foreign(tmp_path / "x", "faster_tt")


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("text")
    with pytest.raises(FileExistsError, match="expected a new or empty folder"):
        tiny_checkpoint().save_foreign(tmp_path, "huggingface")
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


# ---- refusing ----


@pytest.mark.parametrize(("copied", "files"), [
    ("jannerm/gpt", ["state_3.pt"]), ("faster_tt/sep_heads", ["model_last.pt"]),
    ("huggingface/safetensors", ["model.safetensors"]), ("huggingface/bin", ["pytorch_model.bin"]),
], indirect=["copied"])  # fmt: skip
def test_missing_weights(copied: Path, files: list[str]) -> None:
    name = formats.find_format(copied)
    for file in files:
        (copied / file).unlink()
    with pytest.raises(FileNotFoundError, match="expected"):
        formats.read_foreign(copied, str(name))


@of("jannerm/gpt")
def test_another_class(copied: Path) -> None:
    change_pickle(copied / "model_config.pkl", "trajectory.datasets.sequence.GoalDataset")
    with pytest.raises(ValueError, match=r"model_config.pkl: class: expected trajectory.models"):
        Checkpoint.load(copied)


@of("jannerm/gpt")
def test_a_plain_model_is_no_conditional_one(copied: Path) -> None:
    change_pickle(copied / "model_config.pkl", "trajectory.models.transformers.ConditionalGPT")
    with pytest.raises(ValueError, match=r"state_3.pt: .*expected shape"):
        Checkpoint.load(copied)


@of("jannerm/gpt")
def test_other_pickles_as_config(copied: Path) -> None:
    (copied / "model_config.pkl").write_bytes(pickle.dumps({"vocab_size": 8}))
    with pytest.raises(ValueError, match=r"expected a pickled Config with a class and a dict"):
        Checkpoint.load(copied)
    (copied / "model_config.pkl").write_bytes(pickle.dumps(Path("x")))
    with pytest.raises(ValueError, match=r"which no checkpoint holds; nothing was run"):
        Checkpoint.load(copied)


@pytest.mark.parametrize(("changes", "message"), [
    ({"N": 9}, "N: expected the model's 8, got 9"),
    ({"discretizer": "Other"}, "discretizer: expected 'QuantileDiscretizer', got 'Other'"),
    ({"discount": "x"}, "discount: expected a number"),
    ({"penalty": [1]}, "penalty: expected a number"),
    ({"max_path_length": 0}, "max_path_length: expected an integer >= 1"),
])  # fmt: skip
@of("jannerm/gpt")
def test_a_recipe_that_does_not_fit(copied: Path, changes: dict[str, Any], message: str) -> None:
    path = copied / "data_config.pkl"
    change_pickle(path, "trajectory.datasets.sequence.DiscretizedDataset", **changes)
    with pytest.raises(ValueError, match=message):
        Checkpoint.load(copied)


@pytest.mark.parametrize(("copied", "name", "file"), [
    ("jannerm/gpt", "blocks.1.attn.mask", "state_3.pt"),
    ("jannerm/conditional", "blocks.0.attn.mask", "state_3.pt"),
    ("faster_tt/sep_heads", "blocks.1.attn_mask", "model_last.pt"),
], indirect=["copied"])  # fmt: skip
def test_another_mask(copied: Path, name: str, file: str) -> None:
    mask = torch.load(copied / file, weights_only=True)[name]
    mask[..., 9, 6] = 1 - mask[..., 9, 6].int()
    change_state(copied / file, **{name: mask})
    with pytest.raises(ValueError, match=rf"{file}: {name}: expected .* mask"):
        Checkpoint.load(copied)
    change_state(copied / file, **{name: None})  # they follow from the config
    Checkpoint.load(copied)


def change_config(folder: Path, **changes: Any) -> None:
    """Sizes by each format's own names."""
    name = str(formats.find_format(folder))
    change = {"jannerm": change_pickle, "faster_tt": change_yaml, "huggingface": change_json}[name]
    change(folder / FILES[name], **changes)


SIZES = ("vocab_size", "observation_dim", "transition_dim")
OWN_SIZES = {
    "jannerm/gpt": ("block_size", "n_layer", "n_head", "n_embd"),
    "huggingface/bin": ("block_size", "n_layer", "n_head", "n_embd"),
    "huggingface/safetensors": ("block_size", "n_layer", "n_head", "n_embd"),
    "faster_tt/sep_heads": ("seq_len", "num_layers", "num_heads", "embedding_dim"),
    "faster_tt/shared_head": ("seq_len", "num_layers", "num_heads", "embedding_dim"),
}
CASES = [(folder, size) for folder, own in OWN_SIZES.items() for size in (*SIZES, *own)]


@pytest.mark.parametrize(("copied", "size"), CASES, indirect=["copied"])
@pytest.mark.parametrize("value", [10**12, 10**9, 2**24, 12, 0, -1, 1.5, "x", None, True, [1]])
def test_sizes_that_do_not_fit_allocate_nothing(copied: Path, size: str, value: Any) -> None:
    change_config(copied, **{size: value})
    with pytest.raises(ValueError, match="expected"):
        Checkpoint.load(copied)


@of("faster_tt/sep_heads")
def test_heads_of_another_kind(copied: Path) -> None:
    change_config(copied, use_sep_heads=False)
    with pytest.raises(
        ValueError, match=r"head.bias: expected shape \(8,\) by its config, got None"
    ):
        Checkpoint.load(copied)
    change_config(copied, use_sep_heads="yes")
    with pytest.raises(ValueError, match=r"use_sep_heads: expected true or false"):
        Checkpoint.load(copied)


@of("faster_tt/sep_heads")
def test_yaml_is_plain(copied: Path) -> None:
    (copied / "config.yaml").write_text("model: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(ValueError, match=r"config.yaml: expected plain YAML, .*nothing was run"):
        Checkpoint.load(copied)
    (copied / "config.yaml").write_text("model: {}\n")
    with pytest.raises(ValueError, match=r"config.yaml: dataset: expected a section"):
        Checkpoint.load(copied)


@of("faster_tt/sep_heads")
def test_bins_of_another_model(copied: Path) -> None:
    source = tiny_checkpoint(vocab_size=8)
    other = Checkpoint.load(golden_folder("faster_tt/sep_heads")[0])
    assert other.discretizer is not None
    edges = type(other.discretizer)(other.discretizer.thresholds[1:])
    formats.faster_tt._write_discretizer(copied / "discretizer.pt", edges)
    with pytest.raises(ValueError, match=r"bin_edges: expected shape \(7, 9\), got \(7, 8\)"):
        Checkpoint.load(copied)
    assert source.discretizer is not None
    formats.faster_tt._write_discretizer(copied / "discretizer.pt", source.discretizer)
    loaded = Checkpoint.load(copied).discretizer
    assert loaded is not None
    np.testing.assert_array_equal(loaded.thresholds, source.discretizer.thresholds)


@of("huggingface/safetensors")
def test_another_model_of_hugging_face(copied: Path) -> None:
    change_config(copied, model_type="gpt2")
    with pytest.raises(
        ValueError, match=r"model_type: expected 'trajectory_transformer', got 'gpt2'"
    ):
        Checkpoint.load(copied)


@of("huggingface/safetensors")
def test_not_finite(copied: Path) -> None:
    path = copied / "model.safetensors"
    weights = load_file(path)
    weights["ln_f.bias"][0] = torch.inf
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"ln_f.bias: expected finite weights, got NaN or Inf"):
        Checkpoint.load(copied)
