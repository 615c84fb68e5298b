"""Checks images before anything is trained: their headers, or all of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from dmp_common import PatchError
from dmp_common.patch.serialize import parse_json, write_atomically
from training.data.images import open_image, require_frames_in, upright_size
from training.data.kind import DataKind
from training.data.samples import Store
from training.data.sizes import Size

THREADS = 8  # a header is little work and much waiting, on a network drive above all
_VERIFIED = "verified.json"
T = TypeVar("T")


def sizes_of(store: Store, places: Sequence[Any]) -> list[Size | PatchError]:
    """Width and height of every image from its header, or the error of one that has none."""

    def size(place: Any) -> Size:
        with store.open(place) as file:
            return upright_size(file, store.name(place))

    return in_threads(lambda place: _tried(size, place, store), places, "checking images")


def short_ones(store: Store, places: Sequence[Any], kind: DataKind) -> list[PatchError]:
    """The errors of all videos that have fewer frames than are trained on."""

    def problem(place: Any) -> PatchError | None:
        def check(place: Any) -> None:
            with store.open(place) as file:
                require_frames_in(file, store.name(place), kind.frames, kind.stills)

        return _tried(check, place, store)

    found = in_threads(problem, places, "counting frames")
    return [error for error in found if error is not None]


def whole(store: Store, places: Sequence[Any], cache: Path | None) -> dict[int, PatchError]:
    """Decodes every image; returns the errors of those that do not, by number.

    Args:
        cache: folder that remembers which images are whole, by their stamp; None for no memory.
    """
    known = _read(cache)
    stamps = in_threads(store.stamp, places)
    new = [n for n, stamp in enumerate(stamps) if stamp not in known]

    def decode(number: int) -> str:
        place = places[number]
        with store.open(place) as file:
            open_image(file, store.name(place))
        return ""

    found = in_threads(
        lambda n: _tried(decode, n, store, places[n]), new, "decoding images"
    )  # fmt: skip
    states = {stamps[n]: str(state) for n, state in zip(new, found, strict=True)}
    if states and cache is not None:
        content = json.dumps({**known, **states}, indent=0, sort_keys=True)
        write_atomically(cache / _VERIFIED, content.encode("utf-8", "surrogatepass"))
    known |= states
    return {n: PatchError(known[stamp]) for n, stamp in enumerate(stamps) if known[stamp]}


def in_threads(function: Callable[[Any], T], entries: Sequence[Any], what: str = "") -> list[T]:
    """`function` of every entry, in their order; says how far it is where that takes long."""
    with ThreadPoolExecutor(THREADS) as pool:
        results: Iterable[T] = pool.map(function, entries)
        if what:
            results = tqdm(results, what, len(entries), unit=" images", delay=2, file=sys.stderr)
        return list(results)


def _tried(
    function: Callable[[Any], T], entry: Any, store: Store, place: Any = None
) -> T | PatchError:
    try:
        return function(entry)
    except PatchError as error:
        return error
    except OSError as error:
        name = store.name(entry if place is None else place)
        return PatchError(f"expected to read {name}, found: {error.strerror}.")


def _read(cache: Path | None) -> dict[str, str]:
    """What an earlier run found, by stamp: an error, or "" for a whole image."""
    if cache is None or not (cache / _VERIFIED).is_file():
        return {}
    try:
        content = parse_json((cache / _VERIFIED).read_bytes())
    except ValueError:
        return {}  # damaged: the images are decoded again
    found = content if isinstance(content, dict) else {}
    return {stamp: state for stamp, state in found.items() if isinstance(state, str)}
