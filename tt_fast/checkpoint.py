"""A trained model on disk: weights, config, discretizer and where they come from. No pickles.

Folders of other implementations are read and written too, see `tt_fast.formats`; ours holds

weights.safetensors   parameters by the original's names
config.json           the ModelConfig, and the SHA-256 of every other file
discretizer.npz       thresholds (absent if there is no discretizer)
metadata.json         environment, dataset, discount, losses, versions, git commit
"""

from __future__ import annotations

import hashlib
import platform
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file

from tt_fast import formats
from tt_fast.config import ModelConfig, config_from_dict, config_to_dict
from tt_fast.data.load import Source, check_ref_scores
from tt_fast.discretizer import Discretizer
from tt_fast.files import atomic_folder, to_json
from tt_fast.formats import Exported
from tt_fast.model import TrajectoryTransformer
from tt_fast.training.run_folder import step_folders
from tt_fast.validate import refuse, require, require_number

_FORMAT = 1
_WEIGHTS, _CONFIG = "weights.safetensors", "config.json"
_DISCRETIZER, _METADATA = "discretizer.npz", "metadata.json"


@dataclass(frozen=True)
class Checkpoint:
    """A model, its discretizer and what is known about them."""

    model: TrajectoryTransformer
    """In eval mode, on the CPU, after `load`"""
    discretizer: Discretizer | None
    """None if there is none; a Planner then refuses"""
    metadata: dict[str, Any] = field(default_factory=dict)
    """JSON values: env_id, dataset, discount, ref_scores, train_config, losses, versions, ..."""

    def save(self, folder: str | Path) -> Path:
        """Write a new checkpoint folder, whole or not at all.

        Raises:
            FileExistsError: `folder` exists and is not empty.
        """
        with atomic_folder(folder) as temporary:
            self.write(temporary)
        return Path(folder)

    def write(self, folder: Path) -> None:
        """Write the files of `save` into an existing folder."""
        weights = {k: v.detach().cpu().contiguous() for k, v in self.model.state_dict().items()}
        save_file(weights, folder / _WEIGHTS)
        _write_json(folder / _METADATA, self.metadata)
        if self.discretizer is not None:
            np.savez(folder / _DISCRETIZER, **self.discretizer.arrays())
        others = [p for p in (_WEIGHTS, _METADATA, _DISCRETIZER) if (folder / p).exists()]
        config = {
            "format": _FORMAT,
            "model": config_to_dict(self.model.config),
            "sha256": {name: _sha256(folder / name) for name in others},
        }
        _write_json(folder / _CONFIG, config)

    @classmethod
    def load(
        cls, folder: str | Path, *, dataset: Source | None = None, epoch: int | None = None
    ) -> Checkpoint:
        """Read a checkpoint folder, or the newest checkpoint of a run folder.

        Folders of the original, of faster-trajectory-transformer and of Hugging Face are read as
        well, and nothing that they hold is run (`tt_fast.formats`).

        Args:
            folder: of the checkpoint.
            dataset: what to fit the discretizer on, as `load_dataset` takes it, where the folder
                holds only its recipe (the original's) or nothing (Hugging Face's).
            epoch: which of the original's state_N.pt; None takes the newest.

        Raises:
            FileNotFoundError: no checkpoint there.
            ValueError: damaged, or its files do not belong together; the message says which. Or a
                `dataset` for a folder that has its discretizer.
        """
        folder = resolve(folder)
        foreign = formats.find_format(folder)
        if foreign is not None:
            found = formats.read_foreign(folder, foreign, epoch=epoch)
            discretizer = _fit_if_absent(folder, found.discretizer, found.recipe, dataset)
            model = formats.new_model(found.config, found.weights)
            return cls(model, discretizer, found.metadata)
        if epoch is not None:
            refuse("epoch", "None for a checkpoint of tt_fast", epoch)
        header = formats.read_json(folder / _CONFIG)
        _check_header(folder, header)
        with _naming(folder / _CONFIG):
            config = config_from_dict(ModelConfig, header["model"])
        path = folder / _WEIGHTS
        weights = formats.read_safetensors(path, formats.expected_shapes(path, config))
        discretizer = None
        if _DISCRETIZER in header["sha256"]:
            discretizer = formats.read_discretizer(folder / _DISCRETIZER, config)
        metadata = formats.read_json(folder / _METADATA)
        with _naming(folder / _METADATA):
            _check_metadata(metadata)
        model = formats.new_model(config, weights)
        recipe = formats.Recipe.of_metadata(config.vocab_size, metadata)
        return cls(model, _fit_if_absent(folder, discretizer, recipe, dataset), metadata)

    def save_foreign(self, folder: str | Path, name: str, *, epoch: int | None = None) -> Path:
        """Write a new folder in a foreign format, whole or not at all.

        Args:
            folder: new or empty.
            name: "jannerm" (the original's), "faster_tt" or "huggingface".
            epoch: N of the original's state_N.pt.

        Raises:
            FileExistsError: `folder` exists and is not empty.
            ValueError: what the format cannot hold.
        """
        with atomic_folder(folder) as temporary:
            exported = Exported(self.model, self.discretizer, self.metadata)
            formats.write_foreign(temporary, name, exported, epoch=epoch)
        return Path(folder)


def resolve(folder: str | Path) -> Path:
    """`folder` itself if it is a checkpoint, else its newest one under checkpoints/.

    Raises:
        FileNotFoundError: neither.
    """
    folder = Path(folder)
    if (folder / _CONFIG).is_file() or formats.find_format(folder) is not None:
        return folder
    newest = newest_checkpoint(folder)
    if newest is None:
        raise FileNotFoundError(
            f"{folder}: expected a checkpoint ({_CONFIG}, {_WEIGHTS}) or a run folder with "
            "checkpoints/, got neither"
        )
    return newest


def newest_checkpoint(run_folder: Path) -> Path | None:
    """The checkpoint of a run with the most steps, or None; they appear whole, by renaming."""
    found = step_folders(run_folder)
    return found[-1] if found else None


def origin() -> dict[str, Any]:
    """Versions of what made a checkpoint, and the git commit of a source checkout (else None)."""
    versions = {name: _version(name) for name in ("tt_fast", "torch", "numpy")}
    return {
        "versions": {"python": platform.python_version(), **versions},
        "git_commit": _git_commit(Path(__file__).parent),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit(folder: Path) -> str | None:
    # --show-prefix is empty in a repository's root only: an installed copy that happens to lie in
    # somebody else's repository is not that repository's commit
    command = ["git", "-C", str(folder.parent), "rev-parse", "--show-prefix", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    prefix, _, commit = done.stdout.partition("\n")
    return commit.strip() if prefix == "" else None


def _fit_if_absent(
    folder: Path, discretizer: Discretizer | None, recipe: formats.Recipe, dataset: Source | None
) -> Discretizer | None:
    """The folder's discretizer, or one fitted on `dataset`; None if there is neither."""
    if dataset is None:
        return discretizer
    if discretizer is not None:
        refuse("dataset", f"None, as {folder} has its discretizer", dataset)
    return recipe.fit(dataset)


def _check_header(folder: Path, header: Mapping[str, Any]) -> None:
    if header.get("format") != _FORMAT:
        raise ValueError(
            f"{folder / _CONFIG}: expected format {_FORMAT}, got {header.get('format')!r}"
        )
    sums = header.get("sha256")
    if not isinstance(sums, dict) or not isinstance(header.get("model"), dict):
        raise ValueError(
            f"{folder / _CONFIG}: expected keys model and sha256, got {sorted(header)}"
        )
    for name in {_WEIGHTS, _METADATA, *sums}:
        if name not in (_WEIGHTS, _METADATA, _DISCRETIZER):
            raise ValueError(f"{folder / _CONFIG}: expected known file names, got {name!r}")
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path}: expected a file that {_CONFIG} lists, got none")
        if _sha256(path) != sums.get(name):
            raise ValueError(f"{path}: damaged: its SHA-256 is not the one in {_CONFIG}")


def _check_metadata(metadata: Mapping[str, Any]) -> None:
    """Of what is there, that which plans and scores rely on."""
    known = {name: value for name, value in metadata.items() if value is not None}
    for name in ("env_id", "dataset"):
        require(isinstance(known.get(name, ""), str), name, "text", known.get(name))
    trained = known.get("train_config", {})
    require(isinstance(trained, dict), "train_config", "an object", trained)
    require_number("discount", known.get("discount", 1.0), 0.0, 1.0)
    if "ref_scores" in known:
        check_ref_scores(known["ref_scores"])


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """A ValueError inside names the file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(to_json(values), encoding="utf-8")
