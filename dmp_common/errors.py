"""The one error class of the package."""

from __future__ import annotations


class PatchError(ValueError):
    """Something a user can act on: a bad patch file, a wrong model, an impossible option.

    The message is one sentence that says what was expected, what was found and what to do.
    """
