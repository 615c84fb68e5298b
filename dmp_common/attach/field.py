"""The field that one site's prompts add at some timesteps, and the cache of fields."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dmp_common.attach.modulation import Modulation, ready_for
from dmp_common.errors import PatchError

DEFAULT_CACHE_BYTES = 512 * 1024**2  # 20 steps of SD 1.5 at 512 px in half precision: 260 MB


class Field(NamedTuple):
    """The field of one site, in the type, device and layout of the site's input.

    Args:
        values: the field (T, D, H, W) or (T, H*W, D); or, where `weights` are given, the prompts
            (N, D) themselves, so that no field need be built and cached.
        weights: None, or the gate weights (T, N, 1).
        start, length: the part of axis 1 of the input that the field belongs to. `start` is one
            number for all items, or one for each; `length` is None for the whole axis.
        frames: number of equal parts of axis 1 of the input, of which each gets the field.
    """

    values: Tensor
    weights: Tensor | None = None
    start: int | tuple[int, ...] = 0
    length: int | None = None
    frames: int = 1

    @property
    def nbytes(self) -> int:
        """The number of bytes that this field keeps in memory; prompts belong to the patch."""
        kept = self.values if self.weights is None else self.weights
        return kept.numel() * kept.element_size()

    def added(
        self,
        x: Tensor,
        strength: float | Tensor,
        rows: Tensor | None,
        in_place: bool = True,
    ) -> Tensor:
        """Returns x + strength * field as a new tensor in the memory layout of x.

        Another layout would choose other kernels and change results by rounding.

        Args:
            x: the site's input (B, ...).
            strength: one strength for all items, or one for each (B,).
            rows: for each item its index in T (B,), or for each frame of each item (B*F,); None
                where T divides B: the items of a video of a UNet are its frames, and those of one
                timestep follow one another.
            in_place: whether the copy of x may be written to. `vmap` forbids it where it maps over
                the field but not over x.

        Raises:
            PatchError: the number of items is not a multiple of the number of timesteps.
        """
        scaled = self.values if self.weights is None else self.weights
        if rows is not None:
            scaled = scaled[rows]
        if self.frames > 1:
            return self._added_to_frames(x, scaled, strength, in_place)
        if scaled.shape[0] not in (1, x.shape[0]):
            if x.shape[0] % scaled.shape[0]:
                raise PatchError(
                    f"expected a batch of {scaled.shape[0]} items, as many as timesteps, found "
                    f"{x.shape[0]}: give one timestep for each item."
                )
            scaled = scaled.repeat_interleave(x.shape[0] // scaled.shape[0], dim=0)
        if isinstance(strength, Tensor):
            factors = strength.to(scaled.device, scaled.dtype).reshape(-1)
            if factors.shape[0] not in (1, x.shape[0]):
                factors = factors.repeat_interleave(x.shape[0] // factors.shape[0])
            scaled, strength = scaled * factors.reshape(-1, *[1] * (scaled.dim() - 1)), 1.0
        if self.length is None:
            if self.weights is None:
                out = torch.add(x, scaled, alpha=strength)
            else:
                out = torch.addcmul(x, self.values, scaled, value=strength)
            if not in_place or out.stride() == x.stride():
                return out
        addend = scaled if self.weights is None else scaled * self.values
        if not in_place:
            return self._joined(x, addend * strength)
        if torch.is_grad_enabled() or 0 in x.stride():
            out = x.clone()
        else:  # also a part of a larger tensor (Flux splits its sequence) keeps its strides
            out = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
            out.copy_(x)
        if isinstance(self.start, tuple):
            assert self.length is not None
            for item, start in enumerate(self.start):
                own = addend[item if len(addend) > 1 else 0]
                out[item].narrow(0, start, self.length).add_(own, alpha=strength)
            return out
        part = out if self.length is None else out.narrow(1, self.start, self.length)
        part.add_(addend, alpha=strength)
        return out

    def _added_to_frames(
        self, x: Tensor, scaled: Tensor, strength: float | Tensor, in_place: bool
    ) -> Tensor:
        """Adds to each frame of sequences x (B, F*H*W, D); see `added`.

        Args:
            scaled: the field, or the weights of the prompts: one for all, for each item, or for
                each frame of each item.
        """
        video = x.view(len(x), self.frames, -1, x.shape[2])  # (B, F, H*W, D)
        scaled = _by_frame(scaled, len(x))
        if isinstance(strength, Tensor):
            factors = strength.to(scaled.device, scaled.dtype).reshape(-1, 1, 1)
            scaled, strength = scaled * _by_frame(factors, len(x)), 1.0
        if self.weights is None:
            out = torch.add(video, scaled, alpha=strength)
        else:
            out = torch.addcmul(video, self.values, scaled, value=strength)
        if out.stride() != video.stride() and in_place:
            addend = scaled if self.weights is None else scaled * self.values
            out = video.clone().add_(addend, alpha=strength)
        return out.flatten(1, 2)

    def _joined(self, x: Tensor, addend: Tensor) -> Tensor:
        """Adds to a part of x without writing in place: it splits x and joins the parts again."""
        assert self.length is not None
        starts = self.start if isinstance(self.start, tuple) else (self.start,)
        items = torch.split(x, len(x) // len(starts))  # one item each, or all at once
        return torch.cat(
            [
                torch.cat(
                    [
                        item[:, :start],
                        item[:, start : start + self.length]
                        + (addend[n : n + 1] if len(starts) == len(addend) > 1 else addend),
                        item[:, start + self.length :],
                    ],
                    dim=1,
                )
                for n, (item, start) in enumerate(zip(items, starts, strict=True))
            ]
        )


def _by_frame(values: Tensor, items: int) -> Tensor:
    """Returns values (R, ...) of all, of each item or of each frame as (B or 1, F or 1, ...).

    Raises:
        PatchError: the number of values is none of these.
    """
    if len(values) % items and len(values) != 1:
        raise PatchError(
            f"expected one timestep for each of {items} items, or for each of their frames, found "
            f"{len(values)}: call the model with such timesteps."
        )
    return values.reshape(min(items, len(values)), -1, *values.shape[1:])


Split = Callable[[Tensor, int], "dict[str, Tensor]"]


class Remembered:
    """Cached weights of the gate at some timesteps, and the fields that were made with them.

    Args:
        weights: gate weights of the distinct timesteps (T, S, K*N), float32, multiplied by the
            patch's learning scale.
        mixed: scale and shift (T, 2, C) of all sites, for a patch that modulates.
        split: returns the channels of each site of a tensor that has them along an axis.

    Attributes:
        table: scale and shift (T, 2, D) of each site, views of `mixed`.
        fields: the fields, or modulations, by their site and by shape, type, device and layout of
            its input or output.
        nbytes: the number of bytes that the weights and fields keep in memory.
    """

    def __init__(
        self, weights: Tensor, mixed: Tensor | None = None, split: Split | None = None
    ) -> None:
        self.weights = weights
        self.mixed = mixed
        self.split = split
        self.table = None if mixed is None or split is None else split(mixed, 2)
        self._ready: dict[Hashable, dict[str, tuple[Tensor, Tensor]]] = {}
        self.fields: dict[Hashable, Any] = {}
        kept = (weights,) if mixed is None else (weights, mixed)
        self.nbytes = sum(part.numel() * part.element_size() for part in kept)

    def ready(self, x: Tensor, strength: float) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns scale and shift (T, D) of each site, as `Modulation` needs them, for x.

        They are made for all sites at once: a call needs those of all, and each operation costs
        more than the few values it computes.
        """
        key = x.dtype, x.device, strength
        found = self._ready.get(key)
        if found is None:
            assert self.mixed is not None
            assert self.split is not None
            mixed = self.mixed if strength == 1.0 else self.mixed * strength
            scales, shifts = (self.split(part, 1) for part in ready_for(x, mixed))
            found = {name: (scales[name], shifts[name]) for name in scales}
            self._ready = {key: found}
        return found


class FieldCache(OrderedDict[Hashable, Remembered]):
    """A cache of `Remembered` weights and fields by what they depend on. A copy of it is empty.

    Threads may use it at the same time: hold `lock` to look something up; the methods hold it
    themselves. What one thread has looked up stays valid when another thread's call evicts it.

    Args:
        limit: the largest size in bytes; 0 caches nothing.
    """

    def __init__(self, limit: int = DEFAULT_CACHE_BYTES) -> None:
        super().__init__()
        self.limit = limit
        self.bytes = 0
        self.lock = threading.RLock()

    def put(self, key: Hashable, remembered: Remembered) -> None:
        """Stores weights in place of what the key held, and evicts the oldest over the limit."""
        with self.lock:
            replaced = self.pop(key, None)
            if replaced is not None:
                self.bytes -= replaced.nbytes
            if remembered.nbytes <= self.limit:
                self[key] = remembered
                self.bytes += remembered.nbytes
            if self.bytes > self.limit:
                self._evict()

    def add(
        self,
        key: Hashable,
        owner: Remembered,
        place: Hashable,
        field: Field | Modulation,
        alike: int = 1,
    ) -> None:
        """Stores a field beside its weights, unless these have been evicted meanwhile.

        Args:
            key: what the weights were stored with.
            owner: the weights.
            place: the site, and what its field depends on besides the weights.
            field: the field.
            alike: how many fields of this size the call makes. Where they cannot be stored all,
                none is: they would only replace one another.
        """
        with self.lock:
            if self.get(key) is not owner:
                return
            replaced = owner.fields.get(place)
            kept = field.nbytes
            if kept * alike > self.limit:
                return
            grown = kept - (0 if replaced is None else replaced.nbytes)
            owner.fields[place] = field
            owner.nbytes += grown
            self.bytes += grown
            if self.bytes > self.limit:
                self._evict()

    def clear(self) -> None:
        """Removes everything from the cache."""
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
