"""Hugging Face's model class: its outputs, its files, and the planner that it never had."""

from __future__ import annotations

import copy
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign import FOLDERS, assert_as_exact, golden_folder
from numpy.typing import NDArray
from tiny import tiny_checkpoint, tiny_discretizer, weights_equal

import tt_fast
from tt_fast import Checkpoint, PlanConfig
from tt_fast.compat.huggingface import (
    TrajectoryTransformerConfig,
    TrajectoryTransformerModel,
    TrajectoryTransformerOutput,
)

NAMES = FOLDERS["huggingface"]


def load(name: str) -> tuple[TrajectoryTransformerModel, dict[str, Any]]:
    folder, check = golden_folder(name)
    return TrajectoryTransformerModel.from_pretrained(folder), check


def tensors(check: dict[str, NDArray[Any]], *names: str) -> list[torch.Tensor]:
    return [torch.from_numpy(check[name]) for name in names]


def tiny_pretrained(folder: Path) -> TrajectoryTransformerModel:
    return TrajectoryTransformerModel.from_pretrained(tiny_checkpoint().save(folder))


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_theirs(name: str) -> None:
    model, check = load(name)
    tokens, targets, mask = tensors(check, "tokens", "targets", "mask")
    with torch.no_grad():
        output = model(
            tokens, targets=targets, attention_mask=mask,
            output_hidden_states=True, output_attentions=True, return_dict=True,
        )  # fmt: skip
    assert_as_exact(output.logits, check["logits"], check["logits64"])
    assert_as_exact(output.loss, check["loss"], check["loss64"])
    # both float32: what the logits differ by at most, in states of the same size
    for got, want in ((output.hidden_states, "hidden_states"), (output.attentions, "attentions")):
        np.testing.assert_allclose(torch.stack(got).numpy(), check[want], rtol=1e-4, atol=1e-5)


def test_what_is_returned_when() -> None:
    model, check = load(NAMES[0])
    tokens, targets, mask = tensors(check, "tokens", "targets", "mask")
    alone = model(tokens)  # a tuple unless asked otherwise, as theirs
    assert isinstance(alone, tuple)
    assert [x.shape for x in alone] == [(2, 23, 10)]
    loss, logits = model(tokens, targets=targets, attention_mask=mask)
    assert (loss.shape, logits.shape) == ((), (2, 23, 10))
    output = model(tokens, return_dict=True)
    assert isinstance(output, TrajectoryTransformerOutput)
    assert output.keys() == list(output) == ["logits"]
    assert output[0] is output["logits"] is output.logits is output.to_tuple()[0]
    assert (output.loss, output.hidden_states, len(output)) == (None, None, 1)
    with pytest.raises(KeyError):
        output["loss"]


@pytest.mark.parametrize("name", NAMES)
def test_files_survive(name: str, tmp_path: Path) -> None:
    model, check = load(name)
    model.save_pretrained(tmp_path / "saved")
    again = TrajectoryTransformerModel.from_pretrained(tmp_path / "saved")
    assert weights_equal(model, again)
    assert {p.name for p in (tmp_path / "saved").iterdir()} >= {"config.json", "model.safetensors"}
    with pytest.raises(FileExistsError):
        model.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        tokens = tensors(check, "tokens")[0]
        assert torch.equal(again(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_what_we_write_and_trains_alike(name: str, tmp_path: Path) -> None:
    theirs_module = pytest.importorskip("transformers.models.deprecated.trajectory_transformer")
    model, check = load(name)
    model.save_pretrained(tmp_path / "saved")
    theirs = theirs_module.TrajectoryTransformerModel.from_pretrained(tmp_path / "saved").eval()
    assert theirs.state_dict().keys() == model.state_dict().keys()
    assert weights_equal(theirs, model)
    tokens, targets, mask = tensors(check, "tokens", "targets", "mask")
    with torch.no_grad():  # what was recorded on another processor is equal up to rounding
        assert_as_exact(theirs(tokens)[0], check["logits"], check["logits64"])
    ours = TrajectoryTransformerModel(theirs.config).eval()
    ours.load_state_dict(theirs.state_dict())
    for each in (ours, theirs):
        each(tokens, targets=targets, attention_mask=mask)[0].backward()
    gradients = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        want = gradients[key].grad
        torch.testing.assert_close(parameter.grad, want, rtol=1e-3, atol=1e-5)


def test_it_plans(tmp_path: Path) -> None:
    model, bins = tiny_pretrained(tmp_path / "tiny"), tiny_discretizer()
    config = PlanConfig(horizon=2, beam_width=4)
    want = tt_fast.beam_plan(tiny_checkpoint().model, bins, [[1, 2, 3]], config, seed=5)
    got = model.plan([[1, 2, 3]], bins, config, seed=5)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    planner = model.planner(bins, config, seed=5)
    assert planner.act(np.zeros(3)).shape == (2,)
    assert model.discretizer is not None  # ours lay beside the weights


def test_training_goes_on_in_the_planner(tmp_path: Path) -> None:
    """One set of parameters: a step of training is seen by the next plan."""
    model, bins = tiny_pretrained(tmp_path / "tiny"), tiny_discretizer()
    config = PlanConfig(horizon=2, beam_width=1, n_expand=1, k_act=1)
    before = model.plan([[1, 2, 3]], bins, config).scores[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1.0)
    assert model.plan([[1, 2, 3]], bins, config).scores[0] != before
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(-1.0)
    assert twin.plan([[1, 2, 3]], bins, config).scores[0] == before


def test_dropout_follows_the_mode(tmp_path: Path) -> None:
    model, tokens = tiny_pretrained(tmp_path / "tiny"), torch.tensor([[1, 2, 3]])
    torch.manual_seed(0)
    assert torch.equal(model(tokens)[0], model(tokens)[0])
    model.train()
    assert not torch.equal(model(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"past_key_values": ((),)}, "past_key_values: expected None: their cache gives wrong log"),
        ({"use_cache": True}, "use_cache: expected False or None: their cache gives wrong logits"),
        ({"targets": torch.zeros(1, 3, dtype=torch.long)}, "attention_mask: expected the loss"),
        ({"trajectories": torch.zeros(1, 28, dtype=torch.long)}, r"trajectories: expected shape"),
        ({"trajectories": torch.full((1, 3), 9)}, r"trajectories: expected ids in \[0, 8\]"),
        ({"trajectories": torch.zeros(1, 3)}, "trajectories: expected integers"),
    ],
)
def test_refusals(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    model = tiny_pretrained(tmp_path / "tiny")
    with pytest.raises(ValueError, match=message):
        model(**{"trajectories": torch.tensor([[1, 2, 3]]), **changes})


def test_names_on_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only the config and one kind of weights are asked for, safetensors first."""
    asked: list[Any] = []
    folders = [golden_folder("huggingface/bin")[0]] * 2

    def snapshot_download(name: str, *, allow_patterns: list[str], **options: Any) -> str:
        asked.append((name, allow_patterns, options))
        return str(folders[len(asked) - 1])

    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    model = TrajectoryTransformerModel.from_pretrained("somebody/model", revision="v1")
    assert model.config.vocab_size == 7
    assert [patterns for _, patterns, _ in asked] == [
        ["config.json", "model.safetensors"],
        ["config.json", "pytorch_model.bin"],
    ]
    assert asked[0][0] == "somebody/model"
    assert asked[0][2] == {"revision": "v1", "cache_dir": None, "token": None}
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r'"somebody/model" is no folder|install "tt_fast\[hub'):
        TrajectoryTransformerModel.from_pretrained("somebody/model")
    with pytest.raises(FileNotFoundError, match="expected a folder or a name on the hub"):
        TrajectoryTransformerModel.from_pretrained(tmp_path / "nowhere")


def test_configs() -> None:
    config = TrajectoryTransformerConfig(vocab_size=8, n_layer=2)
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (128, 4, 2)
    assert TrajectoryTransformerConfig.from_dict(config.to_dict() | {"unknown": 1}) == config
    with pytest.raises(ValueError, match="config: transition_dim: expected 25, got 24"):
        TrajectoryTransformerModel(TrajectoryTransformerConfig(transition_dim=24))


def test_any_checkpoint_becomes_one(tmp_path: Path) -> None:
    model = tiny_pretrained(tmp_path / "tiny")
    checkpoint = model.to_checkpoint()
    assert isinstance(checkpoint, Checkpoint)
    assert weights_equal(checkpoint.model, tiny_checkpoint().model)
    assert model.get_block_size() == 27
