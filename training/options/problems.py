"""The error of the options: every problem of a command line and its files, shown together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from dmp_common.errors import PatchError


class ConfigError(PatchError):
    """Problems of a configuration, each one sentence: expected, found, what to do.

    Args:
        problems: all that were found; they are shown together, so that one run tells them all.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = [str(PatchError(problem)) for problem in problems]


def problems_of(checks: Iterable[Callable[[], object]]) -> list[str]:
    """What checks find wrong, which raise a `PatchError` for it: each sentence once, in order."""
    found: list[str] = []
    for check in checks:
        try:
            check()
        except PatchError as error:
            found += error.problems if isinstance(error, ConfigError) else [str(error)]
    return list(dict.fromkeys(found))


def numbered(problems: Sequence[str]) -> str:
    """Problems as they are shown: one as it is, several numbered.

    >>> print(numbered(["The first.", "The second."]))
    found 2 problems:
      1. The first.
      2. The second.
    """
    if len(problems) == 1:
        return problems[0]
    lines = [f"{number:>3}. {problem}" for number, problem in enumerate(problems, 1)]
    return "\n".join([f"found {len(problems)} problems:", *lines])
