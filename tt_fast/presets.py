"""Named settings: the original's, for each of its datasets.

Source: config/offline.py of jannerm/trajectory-transformer at 8834a6e. What a preset does not name
has the original's default, which is ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from tt_fast.validate import refuse

# Options of a plan that a preset sets, whether or not they are the defaults (offline.py:55-80).
_PLAN = {
    "horizon": 15, "beam_width": 128, "n_expand": 2, "max_context_transitions": 5,
    "k_obs": 1, "k_act": None, "cdf_obs": None, "cdf_act": 0.6, "estimate": "mean",
}  # fmt: skip
_TRAIN = {"batch_size": 256, "max_windows": 50_000_000}  # offline.py:26-53, train.py:102


@dataclass(frozen=True)
class Preset:
    """Settings of a plan and of training, by the names of `PlanConfig` and `TrainConfig`."""

    plan: Mapping[str, Any] = field(default_factory=dict)
    """Where it differs from the original's base"""
    train: Mapping[str, Any] = field(default_factory=dict)

    def options(self, command: str) -> list[str]:
        """Command-line options of `tt-fast train`, or of a command that plans."""
        values = {**_TRAIN, **self.train} if command == "train" else {**_PLAN, **self.plan}
        pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in values.items()]
        return [word for pair in pairs for word in pair]


_SHORT = {"horizon": 5, "beam_width": 32}
_LONGER = {"max_windows": 80_000_000}
_WIDE = {"horizon": 20, "beam_width": 32, "k_act": 40, "cdf_act": None}
_ANT = Preset({"horizon": 5}, {"batch_size": 128})

_JANNERM = {
    "base": Preset(),
    "halfcheetah-medium-v2": Preset(_SHORT),
    "halfcheetah-medium-replay-v2": Preset(_SHORT),
    "halfcheetah-medium-expert-v2": Preset({"beam_width": 32}),
    "hopper-medium-v2": Preset(),
    "hopper-medium-replay-v2": Preset(train=_LONGER),
    "hopper-medium-expert-v2": Preset(),
    "walker2d-medium-v2": Preset(),
    "walker2d-medium-replay-v2": Preset(_WIDE, _LONGER),
    "walker2d-medium-expert-v2": Preset({"horizon": 5}),
    "ant-medium-v2": _ANT,
    "ant-medium-replay-v2": _ANT,
    "ant-random-v2": _ANT,
}

#: Presets by name, "jannerm/hopper-medium-v2" and the like.
PRESETS = MappingProxyType({f"jannerm/{name}": preset for name, preset in _JANNERM.items()})


def check_preset(name: str | None) -> None:
    """Refuse a name that is no preset's.

    Raises:
        ValueError: names the nearest.
    """
    if name is not None and name not in PRESETS:
        nearest = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.0)
        refuse("preset", f"one of {', '.join(nearest)}, ...", name)


def expand_preset(argv: Sequence[str]) -> list[str]:
    """A command line with the options of its `--preset NAME` in front of those that it has.

    An option that the user gives himself comes later and wins. Unknown names stay for
    `check_preset`.
    """
    words = [part for word in argv for part in _split(word)]
    if "--preset" not in words[1:-1]:
        return list(argv)
    last = len(words) - 1 - words[::-1].index("--preset")  # as of any option given twice
    preset = PRESETS.get(words[last + 1])
    return list(argv) if preset is None else [words[0], *preset.options(words[0]), *words[1:]]


def _split(word: str) -> list[str]:
    prefix = "--preset="
    return ["--preset", word.removeprefix(prefix)] if word.startswith(prefix) else [word]
