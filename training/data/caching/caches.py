"""Makes latents and outputs of the text encoders, once."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dmp_common import PatchError
from training.data.batch import Progress
from training.data.caching.cached import CachedImage, Latents, Texts
from training.data.caching.encoding import Encoders
from training.data.caching.plan import CachePlan
from training.data.caching.tensor_cache import TensorCache
from training.data.captions.caption_rules import possible
from training.data.faults import Faults
from training.data.images import BrokenImageError
from training.data.items import Recipe
from training.data.loader import load
from training.data.samples import FileStore, Sample, TensorStore
from training.data.sizes import Fit, fit
from training.data.sources.scan import in_threads

_TEXTS_AT_ONCE = 16
_SPARE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Caches:
    """Makes the caches of a plan.

    Args:
        plan: what is wanted.
        encoders: make what is missing.
        faults: counts images that do not decode.
    """

    plan: CachePlan
    encoders: Encoders
    faults: Faults

    def prepared(
        self,
        samples: list[Sample],
        recipe: Recipe,
        rank: int,
        world: int,
        progress: Progress | None,
    ) -> tuple[list[Sample], Recipe]:
        """Makes this rank's share; returns what loads from the caches.

        Raises:
            PatchError: an image does not decode, latents are not finite, or no room on the disk.
        """
        plan = self.plan
        if plan.latents is not None:
            samples = _fingerprinted(samples, recipe)
            latents = Latents(_cache(plan.latents, "latents"), self.encoders.image_fingerprint)
            self._make_latents(samples, latents, recipe, rank, world, progress)
            recipe = replace(recipe, latents=latents)
        if plan.texts is not None:
            texts = Texts(_cache(plan.texts, "texts"), self.encoders.text_fingerprint)
            self._make_texts(samples, texts, rank, world, progress)
            recipe = replace(recipe, texts=texts)
        return samples, recipe

    def _make_latents(
        self,
        samples: list[Sample],
        latents: Latents,
        recipe: Recipe,
        rank: int,
        world: int,
        progress: Progress | None,
    ) -> None:
        jobs: dict[str, tuple[Sample, bool]] = {}
        for sample in samples:
            sides = (False, True) if recipe.augment and sample.subset.sizes.flip else (False,)
            jobs.update({latents.key(sample, flipped): (sample, flipped) for flipped in sides})
        missing = _missing(latents.cache, list(jobs), rank, world)
        missing.sort(key=lambda key: _fit(jobs[key][0]).target)
        chunks = _chunks(missing, self.plan.images_at_once, lambda key: _fit(jobs[key][0]).target)
        room, broken = _Room(latents.cache, len(missing)), dict[str, str]()
        requests = ([jobs[key] for key in chunk] for chunk in chunks)
        loaded = load(requests, partial(_decoded, recipe), self.plan.workers)
        for chunk, images in zip(chunks, loaded, strict=True):
            pixels = torch.stack([one.pixels for one in images])
            moments = self.encoders.encode_images(pixels)
            told = self.encoders.encode_first_frames(pixels) if recipe.kind.first_frame else {}
            for n, (key, one, image) in enumerate(
                zip(chunk, moments.float().cpu(), images, strict=True)
            ):
                sample = jobs[key][0]
                _require_finite(one, sample.key)
                first = {name: value[n] for name, value in told.items()} or None
                cached = CachedImage(one, image.mask, image.broken, first)
                room.used(latents.cache.write(key, cached.tensors()))
                if image.broken:
                    broken[sample.key] = image.broken
            if progress is not None:
                progress("caching latents", room.done, len(missing))
        self.faults.add(broken)

    def _make_texts(
        self,
        samples: list[Sample],
        texts: Texts,
        rank: int,
        world: int,
        progress: Progress | None,
    ) -> None:
        captions = {""}  # what a dropped caption becomes
        for sample in samples:
            captions.update(possible(sample.captions, sample.subset.captions))
        by_key = {texts.key(caption): caption for caption in sorted(captions)}
        missing = _missing(texts.cache, list(by_key), rank, world)
        room = _Room(texts.cache, len(missing))
        for chunk in _chunks(missing, _TEXTS_AT_ONCE):
            outputs = self.encoders.encode_text([by_key[key] for key in chunk])
            for n, key in enumerate(chunk):
                one = {name: tensor[n].cpu() for name, tensor in outputs.items()}
                room.used(texts.cache.write(key, one))
            if progress is not None:
                progress("caching text", room.done, len(missing))


class _Room:
    """Stops before the disk is full, not when it is."""

    def __init__(self, cache: TensorCache, count: int) -> None:
        self._folder, self._left, self.done = cache.folder, count, 0

    def used(self, size: int) -> None:
        """Counts one more entry of `size` bytes; the first tells how many bytes all will take.

        Raises:
            PatchError: the disk has no room for the rest.
        """
        self.done += 1
        self._left -= 1
        if self._folder is None or self.done != 1:
            return
        free, needed = shutil.disk_usage(self._folder).free, size * self._left + _SPARE_BYTES
        if free < needed:
            raise PatchError(
                f"expected {needed / 2**30:.1f} GiB free for the cache in {self._folder}, found "
                f"{free / 2**30:.1f} GiB: make room, or give another --cache_dir."
            )


def _fit(sample: Sample) -> Fit:
    return fit(sample.size, sample.subset.sizes, sample.bucket)


def _cache(place: Path | str, name: str) -> TensorCache:
    return TensorCache(None if place == "memory" else Path(place) / name)


def _fingerprinted(samples: list[Sample], recipe: Recipe) -> list[Sample]:
    store = recipe.store
    assert not isinstance(store, TensorStore), "open_data refuses caches of tensors"

    def of(sample: Sample) -> Sample:
        try:
            mask = "alpha" if sample.subset.alpha_mask else ""
            if sample.mask is not None:
                mask = FileStore().fingerprint(sample.mask)
            image = store.fingerprint(sample.place)
        except OSError as error:
            raise PatchError(
                f"expected to read {store.name(sample.place)}, found: {error.strerror}: start "
                "again with data that does not change."
            ) from error
        return replace(sample, fingerprint=image, mask_print=mask if recipe.masked else "")

    return in_threads(of, samples)


def _missing(cache: TensorCache, keys: list[str], rank: int, world: int) -> list[str]:
    """The keys that this rank has to make: its share, or everything in memory."""
    mine = keys if cache.folder is None else keys[rank::world]
    with ThreadPoolExecutor(8) as pool:
        states = dict(zip(mine, pool.map(cache.state, mine), strict=True))
    damaged = [key for key, state in states.items() if state == "damaged"]
    if damaged:
        print(
            f"{len(damaged)} damaged files in {cache.folder} are made again, such as "
            f"{cache.path(damaged[0]).name}",
            file=sys.stderr,
        )
    return [key for key, state in states.items() if state != "good"]


def _chunks(
    keys: Sequence[str], size: int, group: Callable[[str], Any] = lambda key: None
) -> list[list[str]]:
    """Runs of at most `size` keys of one group."""
    chunks: list[list[str]] = []
    for key in keys:
        last = chunks[-1] if chunks else []
        if last and len(last) < size and group(last[0]) == group(key):
            last.append(key)
        else:
            chunks.append([key])
    return chunks


class _Decoded(NamedTuple):
    """Pixels of one side of an image, its mask (1, H, W) uint8, and what is wrong with it."""

    pixels: Tensor
    mask: Tensor | None
    broken: str


def _decoded(recipe: Recipe, jobs: Sequence[tuple[Sample, bool]]) -> list[_Decoded]:
    return [_of_side(recipe, sample, flipped) for sample, flipped in jobs]


def _of_side(recipe: Recipe, sample: Sample, flipped: bool) -> _Decoded:
    how = _fit(sample)
    left, top = how.crop()
    try:
        pixels = recipe.pixels(sample, left, top)
        mask = recipe.mask(sample, left, top) if recipe.masked else None
    except BrokenImageError as error:
        # Its place is filled, so that every process knows without asking the others.
        width, height = how.target
        return _Decoded(torch.zeros(recipe.kind.shape(height, width)), None, str(error))
    if mask is not None:
        mask = (mask.flip(-1) if flipped else mask).mul(255).round().to(torch.uint8)
    return _Decoded(pixels.flip(-1) if flipped else pixels, mask, "")


def _require_finite(moments: Tensor, name: str) -> None:
    if not bool(moments.isfinite().all()):
        raise PatchError(
            f"expected finite latents of {name}, found NaN or infinity: give --no_half_vae; the "
            "VAE of SDXL overflows in half precision."
        )
