"""The only error class of the package, and functions that make text from files safe to show."""

from __future__ import annotations

_LONGEST = 200  # characters of one text from a file
_LOOKALIKES = str.maketrans("<>&", "‹›＆")
_LONGEST_PATH = 1000
_LONGEST_MESSAGE = 4000  # for safety only: the texts from files in a message are shorter


class PatchError(ValueError):
    """An error that a user can act on: a bad patch file, a wrong model, an impossible option.

    The message is one sentence that says what was expected, what was found and what to do. Apart
    from line ends it has printable characters only, even if it quotes text from a file.
    """

    def __init__(self, message: str = "") -> None:
        lines = message[:_LONGEST_MESSAGE].split("\n")
        super().__init__("\n".join(printable(line, _LONGEST_MESSAGE) for line in lines))


def unmarked(text: object) -> str:
    """Makes text safe for a place that may read it as HTML, or may show HTML escapes as they are.

    The characters that begin markup are replaced by others that look like them.

    >>> unmarked("found <img src=x>")
    'found ‹img src=x›'
    """
    return printable(text, _LONGEST_MESSAGE).translate(_LOOKALIKES)


def file_error(path: object, expected: str, found: object, remedy: str) -> PatchError:
    """Makes the error about a file, with its path.

    Args:
        path: the file.
        expected, remedy: what was expected and what to do, in our own words.
        found: what was found; it may be text from the file, and is cut and made printable.
    """
    return PatchError(
        f"{printable_path(path)}: expected {expected}, found {printable(found, 400)}: {remedy}."
    )


def printable_path(path: object) -> str:
    """Returns a path as `printable` shows it. The limit is above that of operating systems."""
    return printable(path, _LONGEST_PATH)


def printable(text: object, limit: int = _LONGEST) -> str:
    r"""Returns text from a file, a path or another program as one short line without control codes.

    Characters that are not printable (control characters, line ends, marks that reverse the
    direction of writing) are shown as escapes, so that they cannot move a terminal's cursor or
    disguise a name. Text longer than the limit is cut and ends in "...".

    A value that cannot be turned into text, such as a number of 5000 digits, is shown by its type.

    The result is plain text. Where it becomes part of HTML or Markdown it must still be escaped.

    >>> printable("red\x1b[31m, then\na new line")
    'red\\x1b[31m, then\\na new line'
    >>> printable("a long name", limit=9)
    'a long...'
    """
    try:
        whole = str(text)
    except (ValueError, RecursionError):
        whole = f"a {type(text).__name__} that is too large to show"
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in whole[: limit + 1]
    )
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."
