"""Callables put around those of a module, and taken away again in any order."""

from __future__ import annotations

from typing import Any


class Wrapping:
    """Stands in the place of a callable, which it calls; several may be around one another.

    Args:
        owner: whose it is: an attachment.
        inner: the callable in whose place it stands.
    """

    def __init__(self, owner: Any, inner: Any) -> None:
        self.owner = owner
        self.inner = inner


def is_wrapped(value: Any, owner: Any) -> bool:
    """Tells whether a wrapping of an owner is around a callable."""
    while isinstance(value, Wrapping):
        if value.owner is owner:
            return True
        value = value.inner
    return False


def unwrap(holder: Any, name: str, owner: Any) -> bool:
    """Takes an owner's wrapping away from `holder.name`, also from under those of others.

    Returns:
        Whether there was one.
    """
    value = getattr(holder, name, None)
    while isinstance(value, Wrapping):
        if value.owner is owner:
            setattr(holder, name, value.inner)
            return True
        holder, name, value = value, "inner", value.inner
    return False
