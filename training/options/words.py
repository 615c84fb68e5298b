"""The words of a command line as values by name, and the sentences for those that are none.

argparse would stop at the first mistake, and so would pydantic-settings and tyro, which are built
on it or like it; here every mistake of a line is told at once, together with those of its files.
The help texts are laid out by argparse all the same, see `helping.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

_NUMBER = re.compile(r"-(\d|\.\d|inf)")
_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False, "": False}


@dataclass
class Words:
    """What a command line says.

    Args:
        values: by name, as far as they are understood; of unknown options the words as they are.
        problems: sentences about what is not.
        help: None, "short" or "all".
    """

    values: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    help: str | None = None


def read_words(words: Sequence[str], known: dict[str, FieldInfo]) -> Words:
    """Reads the words of a command line.

    Args:
        words: of the command line, without the name of the program.
        known: the options that exist, by name.
    """
    found = Words()
    for name, given in _options(words, found):
        if name in ("help", "h"):
            found.help = "all" if found.help == "all" or "all" in given else "short"
        elif name in known:
            _take(name, given, known[name], found)
        elif name.startswith("no-") and name[3:] in known:
            _take(name[3:], ["false"], known[name[3:]], found)
        elif name.startswith("no-"):
            found.values[name[3:]] = False
        else:
            found.values[name] = given[0] if len(given) == 1 else given or True
    return found


def _options(words: Sequence[str], found: Words) -> list[tuple[str, list[str]]]:
    """The names of a command line, each with the words after it."""
    options: list[tuple[str, list[str]]] = []
    for word in words:
        if word == "-h" or (word.startswith("--") and len(word) > 2):
            name, sign, value = word.lstrip("-").partition("=")
            options.append((name, [value] if sign else []))
        elif not options or _is_short(word):
            found.problems.append(f"expected options that begin with --, found {word!r}.")
            options.append(("", []))  # takes the words that belong to it
        else:
            options[-1][1].append(word)
    return [option for option in options if option[0]]


def _is_short(word: str) -> bool:
    """Whether a word looks like -lr: no option of ours, nor a negative number, nor a caption."""
    return word.startswith("-") and len(word) > 1 and " " not in word and not _NUMBER.match(word)


def _take(name: str, given: list[str], info: FieldInfo, found: Words) -> None:
    """Puts the value of a known option among the values."""
    kinds = get_args(info.annotation) or (info.annotation,)
    if get_origin(info.annotation) is list:
        found.values[name] = [*found.values.get(name, []), *given]
    elif info.annotation is bool:
        value = _WORDS.get(given[0].lower()) if len(given) == 1 else not given or None
        if value is None:
            found.problems.append(
                f"--{name} is a switch: expected nothing, true or false after it, found "
                f"{' '.join(map(repr, given))}."
            )
        else:
            found.values[name] = value
    elif not given and name == "output_config":
        found.values[name] = "-"
    elif len(given) != 1:
        what = f"{len(given)}: {' '.join(map(repr, given))}" if given else "none"
        found.problems.append(f"--{name}: expected one value, found {what}.")
    else:
        # Numbers among choices are written as words here.
        numbers = {str(c): c for kind in kinds for c in (get_args(kind) or (kind,)) if _whole(c)}
        found.values[name] = numbers.get(given[0], given[0])


def _whole(choice: object) -> bool:
    return isinstance(choice, int) and not isinstance(choice, bool)
