"""What is remembered between forward calls, up to a number of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

from torch import Tensor

from dmp_common.attach.field import Field

DEFAULT_CACHE_BYTES = 512 * 1024**2  # 20 steps of SD 1.5 at 512 px in half precision: 260 MB


class Remembered:
    """The gate's weights at some timesteps, and the fields that were made of them.

    Args:
        weights: of the distinct timesteps, times the patch's learning scale (T, S, K*N), float32.

    Attributes:
        fields: the fields by site, shape, type and place of the input they were made for.
        nbytes: bytes that the weights and fields keep alive.
    """

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights
        self.fields: dict[Hashable, Field] = {}
        self.nbytes = weights.numel() * weights.element_size()


class FieldCache(OrderedDict[Hashable, Remembered]):
    """`Remembered` weights and fields by what they depend on. A copy of a cache starts empty.

    Threads may use it at the same time: hold `lock` to look something up, the methods hold it
    themselves. What one thread looked up stays valid when another thread's call evicts it.

    Args:
        limit: bytes; 0 remembers nothing.
    """

    def __init__(self, limit: int = DEFAULT_CACHE_BYTES) -> None:
        super().__init__()
        self.limit = limit
        self.bytes = 0
        self.lock = threading.RLock()

    def put(self, key: Hashable, remembered: Remembered) -> None:
        """Remembers weights, in the place of what the key held, and evicts down to the limit."""
        with self.lock:
            replaced = self.pop(key, None)
            if replaced is not None:
                self.bytes -= replaced.nbytes
            self[key] = remembered
            self.bytes += remembered.nbytes
            self._evict()

    def add(self, key: Hashable, owner: Remembered, place: Hashable, field: Field) -> None:
        """Remembers a field beside its weights, unless these have been evicted meanwhile."""
        with self.lock:
            if self.get(key) is not owner:
                return
            replaced = owner.fields.get(place)
            grown = field.nbytes - (0 if replaced is None else replaced.nbytes)
            owner.fields[place] = field
            owner.nbytes += grown
            self.bytes += grown
            self._evict()

    def clear(self) -> None:
        """Forgets everything."""
        with self.lock:
            super().clear()
            self.bytes = 0

    def _evict(self) -> None:
        while self.bytes > self.limit:
            _, oldest = self.popitem(last=False)
            self.bytes -= oldest.nbytes

    def __deepcopy__(self, memo: dict[int, Any]) -> FieldCache:
        return FieldCache(self.limit)

    def __reduce__(self) -> tuple[type[FieldCache], tuple[int]]:
        return FieldCache, (self.limit,)
