"""Trains a patch: `python training/train_dmp.py --base digits`, also under `accelerate launch`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training.options.command_line import Resolved

# Run as a script, Python puts this folder on the path, where `config` or `data` would hide other
# packages of these names; what we need there is the repository.
_HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _HERE]
sys.path.insert(0, str(_HERE.parent))


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    from dmp_common.errors import PatchError
    from training.options.command_line import parse_arguments  # --help must not wait for torch
    from training.options.problems import ConfigError, numbered

    try:
        config = parse_arguments(arguments, _check)
        from training.run.trainer import run
    except ImportError as error:
        print(
            f'error: {error}: the trainer needs its extra, run: pip install -e ".[train]"',
            file=sys.stderr,
        )
        return 1
    except ConfigError as error:
        print(f"error: {numbered(error.problems)}", file=sys.stderr)
        return 1
    try:
        run(config)
    except ConfigError as error:  # several problems of the data
        print(f"error: {numbered(error.problems)}", file=sys.stderr)
        return 1
    except PatchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _check(found: Resolved) -> None:
    """Adds what the options cannot know by themselves; imported late, for the same reason."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print("loading torch and diffusers", flush=True)  # which takes some seconds
    from training.run.checking import check_run

    check_run(found)


if __name__ == "__main__":
    raise SystemExit(main())
