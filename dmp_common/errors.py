"""The one error class of the package, and text from strangers made safe to show."""

from __future__ import annotations

_LONGEST = 200  # characters of one piece of text from a file
_LOOKALIKES = str.maketrans("<>&", "‹›＆")
_LONGEST_PATH = 1000
_LONGEST_MESSAGE = 4000  # a net: the pieces in a message are cut before


class PatchError(ValueError):
    """Something a user can act on: a bad patch file, a wrong model, an impossible option.

    The message is one sentence that says what was expected, what was found and what to do. Apart
    from line ends it has printable characters only, whatever text from a file stands in it.
    """

    def __init__(self, message: str = "") -> None:
        lines = message[:_LONGEST_MESSAGE].split("\n")
        super().__init__("\n".join(printable(line, _LONGEST_MESSAGE) for line in lines))


def unmarked(text: object) -> str:
    """Text for a place that may or may not read it as HTML, where escapes might be shown.

    The characters that begin markup are replaced by others that look like them.

    >>> unmarked("found <img src=x>")
    'found ‹img src=x›'
    """
    return printable(text, _LONGEST_MESSAGE).translate(_LOOKALIKES)


def file_error(path: object, expected: str, found: object, remedy: str) -> PatchError:
    """The error about a file: its path, what was expected, what was found and what to do.

    Args:
        path: of the file.
        expected, remedy: our own words.
        found: may be text from the file; it is cut and made printable.
    """
    return PatchError(
        f"{printable_path(path)}: expected {expected}, found {printable(found, 400)}: {remedy}."
    )


def printable_path(path: object) -> str:
    """A path as `printable` shows it; long enough for any that a system allows."""
    return printable(path, _LONGEST_PATH)


def printable(text: object, limit: int = _LONGEST) -> str:
    r"""Text from a file, a path or another program, as one short line that controls nothing.

    Characters that are not printable (control characters, line ends, marks that reverse the
    direction of writing) are shown as escapes, so that they cannot move a terminal's cursor or
    disguise a name. Text longer than the limit is cut and ends in "...".

    What cannot be turned into text, such as a number of 5000 digits, is told by its type.

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
