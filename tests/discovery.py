"""Finds the modules in which families describe themselves, so that a new family is a new file."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

_TESTS = Path(__file__).parent


def modules(package: str, prefix: str, function: str = "known") -> Iterator[ModuleType]:
    """Imports the modules of a package of tests that have a function.

    Args:
        package: "tests" or a package below it.
        prefix: what the modules' names begin with; the module that is named so itself is left out.
        function: the name of the function.

    Returns:
        The modules in the order of their names, so that all processes have the same tests.
    """
    folder = _TESTS.joinpath(*package.split(".")[1:])
    for path in sorted(folder.glob(f"{prefix}?*.py")):
        if f"\ndef {function}(" in path.read_text(encoding="utf-8"):
            yield importlib.import_module(f"{package}.{path.stem}")
