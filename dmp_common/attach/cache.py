"""A memory of finished fields: least recently used first out, with a limit in bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any, Protocol

DEFAULT_CACHE_BYTES = 512 * 1024**2  # 20 steps of SD 1.5 at 512 px in half precision: 260 MB


class Sized(Protocol):
    """What can be remembered: fields and gate weights."""

    @property
    def nbytes(self) -> int:
        """Bytes it keeps alive."""


class FieldCache:
    """Fields and gate weights by key. A copy of a patch starts with an empty one.

    Args:
        limit: bytes; 0 remembers nothing.
    """

    def __init__(self, limit: int = DEFAULT_CACHE_BYTES) -> None:
        self.limit = limit
        self.bytes = 0
        self._fields: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable) -> Any:
        """What a key was put with, or None."""
        field = self._fields.get(key)
        if field is not None:
            self._fields.move_to_end(key)
        return field

    def put(self, key: Hashable, field: Sized) -> None:
        """Remembers a field, and forgets the oldest ones beyond the limit."""
        size = field.nbytes
        if size > self.limit:
            return
        self._fields[key] = field
        self.bytes += size
        while self.bytes > self.limit:
            _, oldest = self._fields.popitem(last=False)
            self.bytes -= oldest.nbytes

    def clear(self) -> None:
        """Forgets everything."""
        self._fields.clear()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._fields)

    def __deepcopy__(self, memo: dict[int, Any]) -> FieldCache:
        return FieldCache(self.limit)

    def __reduce__(self) -> tuple[type[FieldCache], tuple[int]]:
        return FieldCache, (self.limit,)
