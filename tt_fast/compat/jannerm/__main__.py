"""`python -m tt_fast.compat.jannerm`: run a script of the original code unmodified."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import tt_fast
from tt_fast.compat.jannerm.runner import Run, run_script

PROG = "python -m tt_fast.compat.jannerm"
_USER_ERRORS = (ValueError, OSError, ImportError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; returns the exit status: 0, 2 for a user's error, 130 after Ctrl-C.

    What the script itself raises shows its traceback.
    """
    arguments = _parser().parse_args(argv)
    try:
        run_script(
            Run(
                arguments.script,
                tuple(arguments.options),
                arguments.keep_search,
                arguments.dataset_file,
                arguments.max_episode_steps,
            )
        )
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted", file=sys.stderr)
        return 130
    except _USER_ERRORS as error:
        if arguments.debug or not _is_ours(error):
            raise
        print(f"{PROG}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROG,
        description="Run scripts/train.py or scripts/plan.py of jannerm/trajectory-transformer "
        "as they are, with stand-ins for gym, D4RL and mujoco_py, and plan with tt_fast.",
        epilog="Options before SCRIPT are the ones above; all that follows it is the script's own.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--keep-search", action="store_true", help="leave the original's own planner in place"
    )
    parser.add_argument(
        "--dataset-file", type=Path, metavar="FILE", help="HDF5 file in place of D4RL's own"
    )
    parser.add_argument(
        "--max-episode-steps",
        type=int,
        metavar="N",
        help="time limit in place of the environment's",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")
    parser.add_argument("script", type=Path, metavar="SCRIPT", help="path of the script")
    parser.add_argument(
        "options", nargs=argparse.REMAINDER, metavar="...", help="the script's options"
    )
    return parser


def _is_ours(error: BaseException) -> bool:
    """It was raised in tt_fast, which says what it expected, and not in the script."""
    package = Path(tt_fast.__file__).resolve().parent
    frames = traceback.extract_tb(error.__traceback__)
    return Path(frames[-1].filename).resolve().is_relative_to(package)


if __name__ == "__main__":
    sys.exit(main())
