"""Wrappers around the callables of a module, which can be removed in any order."""

from __future__ import annotations

from typing import Any


class Wrapping:
    """A wrapper that replaces a callable and calls it. Wrappers may be around one another.

    Args:
        owner: the object that the wrapper belongs to, and is found by.
        inner: the callable that it replaces.
    """

    def __init__(self, owner: Any, inner: Any) -> None:
        self.owner = owner
        self.inner = inner


def is_wrapped(value: Any, owner: Any) -> bool:
    """Tells whether one of the wrappers around a callable belongs to an owner."""
    while isinstance(value, Wrapping):
        if value.owner is owner:
            return True
        value = value.inner
    return False


def unwrap(holder: Any, name: str, owner: Any) -> bool:
    """Removes an owner's wrapper from `holder.name`, also from below those of other owners.

    Returns:
        Whether there was such a wrapper.
    """
    value = getattr(holder, name, None)
    while isinstance(value, Wrapping):
        if value.owner is owner:
            setattr(holder, name, value.inner)
            return True
        holder, name, value = value, "inner", value.inner
    return False
