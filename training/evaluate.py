"""Evaluates patches: `python training/evaluate.py --base digits --model DMP=dmp:PATH ...`."""

from __future__ import annotations

import sys
from pathlib import Path

# As in train_dmp.py: the repository in place of this folder, whose names would hide others.
_HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _HERE]
sys.path.insert(0, str(_HERE.parent))


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    from training.evaluation.settings import parse_evaluation  # --help must not wait for torch

    options, config = parse_evaluation(arguments)
    try:
        from dmp_common import PatchError
        from training.evaluation.evaluating import evaluate
        from training.options.problems import ConfigError, numbered
    except ImportError as error:
        print(
            f"error: {error}: the evaluation needs the trainer's extra and its own, run: "
            'pip install -e ".[train,evaluation]"',
            file=sys.stderr,
        )
        return 1
    try:
        evaluate(options, config)
    except ConfigError as error:
        print(f"error: {numbered(error.problems)}", file=sys.stderr)
        return 1
    except PatchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
