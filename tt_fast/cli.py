"""The command line, `tt-fast`: parse, run a subcommand, turn errors into one line."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import subcommand

from tt_fast.commands.base import Command
from tt_fast.commands.bench import Bench
from tt_fast.commands.convert import Convert
from tt_fast.commands.data import DataCollect, DataDownload, DataInfo
from tt_fast.commands.demo import Demo
from tt_fast.commands.evaluate import Evaluate
from tt_fast.commands.plan import Plan
from tt_fast.commands.sweep import Sweep
from tt_fast.commands.train import Train
from tt_fast.presets import expand_preset

#: What a user can cause; anything else is our bug and shows its traceback.
_USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError, MemoryError)

_OPTIONS = (
    tyro.conf.OmitArgPrefixes,
    tyro.conf.OmitSubcommandPrefixes,
    tyro.conf.FlagCreatePairsOff,
)


@dataclass(frozen=True)
class Data:
    """Look at a dataset, download or collect one."""

    command: (
        Annotated[DataInfo, subcommand("info")]
        | Annotated[DataDownload, subcommand("download")]
        | Annotated[DataCollect, subcommand("collect")]
    )


@dataclass(frozen=True)
class CommandLine:
    """Trajectory Transformer: train on offline data, plan with beam search, score the policy.

    `tt-fast COMMAND --help` lists a command's options; `tt-fast --version` prints the version.
    """

    command: (
        Annotated[Data, subcommand("data")]
        | Annotated[Train, subcommand("train")]
        | Annotated[Plan, subcommand("plan")]
        | Annotated[Evaluate, subcommand("evaluate")]
        | Annotated[Convert, subcommand("convert")]
        | Annotated[Demo, subcommand("demo")]
        | Annotated[Bench, subcommand("bench")]
        | Annotated[Sweep, subcommand("sweep")]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run `tt-fast`; returns the exit status: 0, 2 for a user's error, 130 after Ctrl-C, 141 where
    nobody reads what it prints any more (`| head`), as a shell has it.

    `tt-fast sweep` leaves with 1 by SystemExit if a trial failed.
    """
    try:
        return _run(argv)
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 141


def _run(argv: Sequence[str] | None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv == ["--version"]:
        from tt_fast import __version__

        print(f"tt-fast {__version__}", flush=True)
        return 0
    try:
        command = parse(argv)
    except SystemExit:
        _flush()  # the help
        raise
    sys.path.insert(0, str(Path.cwd()))  # for module:callable, as `python -m` would
    try:
        command.run()
        _flush()
    except KeyboardInterrupt:
        print(f"tt-fast: interrupted: {command.saved()}", file=sys.stderr)
        return 130
    except (*_USER_ERRORS, RuntimeError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            raise
        if command.debug or not (isinstance(error, _USER_ERRORS) or _is_out_of_memory(error)):
            raise
        print(f"tt-fast: error: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def _nobody_reads() -> bool:
    """Whether standard output is a pipe whose other end is closed."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # no poll here, no output, or no file
        return False


def parse(argv: Sequence[str]) -> Command:
    """The subcommand of a command line; exits with 2 and says why if there is none."""
    args = _expand_preset([_expand_home(arg) for arg in argv])
    parsed = tyro.cli(CommandLine, prog="tt-fast", args=args, config=_OPTIONS).command
    return parsed.command if isinstance(parsed, Data) else parsed


def _expand_home(arg: str) -> str:
    """--output-dir=~/runs, as the shell has it of `--output-dir ~/runs` but not after an `=`."""
    option, equals, value = arg.partition("=")
    return f"{option}={Path(value).expanduser()}" if equals and value.startswith("~/") else arg


def _expand_preset(argv: Sequence[str]) -> list[str]:
    """`expand_preset`; a sweep trains and plans, so it takes the options of both."""
    args = expand_preset(argv)
    if args[:1] != ["sweep"]:
        return args
    return ["sweep", *expand_preset(["train", *args[1:]])[1:]]


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Torch's, which on the CPU is no MemoryError; on a GPU it says the same."""
    return "allocate" in str(error)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
