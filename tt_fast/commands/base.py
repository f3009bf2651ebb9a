"""What every subcommand of `tt-fast` has: its fields are its options."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Command(ABC):
    """What every subcommand has."""

    debug: bool = False
    """Show the traceback of an error."""

    @abstractmethod
    def run(self) -> None:
        """Do it."""

    def saved(self) -> str:
        """What is on disk after Ctrl-C."""
        return "nothing was written"
