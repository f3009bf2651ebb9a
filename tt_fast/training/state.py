"""What a run needs besides its weights to continue bit for bit: optimizer and position.

Kept as training_state.safetensors beside a checkpoint's files: tensors by name, the rest as JSON in
the header.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tt_fast.config import ModelConfig, TrainConfig, config_to_dict
from tt_fast.model import TrajectoryTransformer
from tt_fast.training.log import LOSS_NAMES
from tt_fast.validate import require

_STATE = "training_state.safetensors"
#: Fields that a resumed run may change; all others decide the result.
_FREE_FIELDS = {
    "max_tokens", "max_epochs", "max_windows", "max_minutes", "device", "log_steps",
    "checkpoint_steps", "checkpoint_minutes", "eval_every", "patience", "token_storage",
    "compile",
}  # fmt: skip
#: What a run had for a field that is younger than its checkpoint.
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainConfig)}


@dataclass
class Position:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    """Next batch of the epoch"""
    tokens: int = 0
    windows: int = 0
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(LOSS_NAMES, 0.0))
    """Losses summed since the last row of metrics.csv"""
    sum_steps: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    """Means of the last row, by kind"""
    best_score: float | None = None
    """Best evaluation so far"""
    worse_evals: int = 0
    """Evaluations since that one"""
    eval_step: int = 0
    """Step of the newest evaluation"""


@dataclass(frozen=True)
class RunIdentity:
    """What decides a run's result; a resumed run must have the same."""

    model_config: ModelConfig
    train_config: TrainConfig
    data_sha256: str
    """Of tokens and thresholds"""

    def to_dict(self) -> dict[str, dict[str, object]]:
        """As it is kept, the fields that may change left out."""
        train_config = config_to_dict(self.train_config)
        return {
            "model_config": config_to_dict(self.model_config),
            "train_config": {k: v for k, v in train_config.items() if k not in _FREE_FIELDS},
            "dataset": {"sha256": self.data_sha256},
        }


def write_state(
    folder: Path,
    identity: RunIdentity,
    position: Position,
    model: TrajectoryTransformer,
    optimizer: torch.optim.Optimizer,
    *,
    with_weights: bool = False,
) -> None:
    """Write the state file into a checkpoint folder.

    Args:
        with_weights: the model's too, where the checkpoint holds others (their average).
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}/{name}"] = value.detach().cpu().contiguous()
        if with_weights:
            tensors[f"weights/{name}"] = parameter.detach().cpu().contiguous()
    about = {
        "position": json.dumps(dataclasses.asdict(position)),
        "identity": json.dumps(identity.to_dict()),
        "sha256": _digest(tensors),
    }
    save_file(tensors, folder / _STATE, metadata=about)


def read_state(
    folder: Path,
    identity: RunIdentity,
    model: TrajectoryTransformer,
    optimizer: torch.optim.Optimizer,
) -> Position:
    """Put the optimizer's state of a checkpoint folder, and the model's weights where it has
    them, in place; returns its position.

    Raises:
        ValueError: damaged or absent, or of a run with another identity; the message names what.
    """
    try:
        with safe_open(folder / _STATE, framework="pt") as file:
            about = file.metadata()
            # copies: a tensor of safetensors keeps the file mapped, and it is to be deleted one day
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / _STATE}: absent or damaged, cannot resume: {error}") from error
    if about is None or about.get("sha256") != _digest(tensors):
        raise ValueError(f"{folder / _STATE}: damaged: its SHA-256 is not the one it names")
    _check_identity(folder, json.loads(about["identity"]), identity)
    device = model.pos_emb.device
    # AdamW keeps its averages where the parameter is, its step count on the CPU unless fused
    count_device = device if optimizer.defaults.get("fused") else torch.device("cpu")
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = {
            "step": tensors[f"step/{name}"].to(count_device),
            "exp_avg": tensors[f"exp_avg/{name}"].to(device),
            "exp_avg_sq": tensors[f"exp_avg_sq/{name}"].to(device),
        }
    if identity.train_config.ema_decay is not None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(tensors[f"weights/{name}"])
    return Position(**json.loads(about["position"]))


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of all tensors' bytes, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _check_identity(
    folder: Path, before: dict[str, dict[str, object]], identity: RunIdentity
) -> None:
    now = json.loads(json.dumps(identity.to_dict()))  # tuples become lists, as in `before`
    for part, values in now.items():
        for name, value in values.items():
            was = before.get(part, {}).get(name, _DEFAULTS.get(name))
            require(was == value, f"{part}.{name}", f"{was!r}, to resume {folder}", value)
