"""What the original uses of typed-argument-parser: class annotations become options."""

from __future__ import annotations

import argparse
import json
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tt_fast.files import atomic_write
from tt_fast.validate import refuse, require

_TYPES = (str, int, float, bool)


class Tap:
    """A command line whose options are the annotations of the subclass.

    An option without a default is required; a bool is a flag that turns its default over. Words
    that belong to no option are in `extra_args` after `parse_args(known_only=True)`.
    """

    def __init__(self) -> None:
        self.extra_args: list[str] = []

    def parse_args(self, args: Sequence[str] | None = None, known_only: bool = False) -> Tap:
        """Read `args` (by default the process's) into attributes; itself.

        Raises:
            SystemExit: a missing option, a value of another type, or, without `known_only`, a word
                that belongs to no option; the parser printed which.
        """
        parser = argparse.ArgumentParser(description=type(self).__doc__)
        for name, kind in self._options().items():
            self._add_option(parser, name, kind)
        if known_only:
            found, self.extra_args = parser.parse_known_args(args)
        else:
            found = parser.parse_args(args)
        for name, value in vars(found).items():
            setattr(self, name, value)
        return self

    def as_dict(self) -> dict[str, Any]:
        """Every attribute, those set after parsing too."""
        return {key: value for key, value in vars(self).items() if key != "extra_args"}

    def save(
        self, path: str, with_reproducibility: bool = True, skip_unpicklable: bool = False
    ) -> None:
        """Write the attributes as JSON.

        Args:
            path: of the file.
            with_reproducibility: not used; the real one adds the command line and the commit.
            skip_unpicklable: leave out what JSON cannot hold.

        Raises:
            ValueError: an attribute that JSON cannot hold, without `skip_unpicklable`.
        """
        values = {}
        for key, value in self.as_dict().items():
            if _is_json(value):
                values[key] = value
            elif not skip_unpicklable:
                refuse(key, "a value that JSON can hold", value)
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(values, indent=4, sort_keys=True) + "\n")

    def load(self, path: str, **_: Any) -> Tap:
        """Set the attributes that `save` wrote; itself."""
        for key, value in json.loads(Path(path).read_text(encoding="utf-8")).items():
            if key != "reproducibility":
                setattr(self, key, value)
        return self

    def _options(self) -> dict[str, Any]:
        hints = typing.get_type_hints(type(self))
        return {name: kind for name, kind in hints.items() if not name.startswith("_")}

    def _add_option(self, parser: argparse.ArgumentParser, name: str, kind: Any) -> None:
        require(kind in _TYPES, f"type of {name}", "str, int, float or bool", kind)
        missing = not hasattr(type(self), name)
        default = getattr(type(self), name, None)
        if kind is bool:
            action = "store_false" if default else "store_true"
            parser.add_argument(f"--{name}", action=action, required=missing)
        else:
            parser.add_argument(f"--{name}", type=kind, default=default, required=missing)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
