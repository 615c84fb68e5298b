"""Latents and outputs of the text encoders, computed once: what to make, and how it is read."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmp_common import PatchError
from training.data.batch import Progress
from training.data.caching.cached import Latents, Texts
from training.data.caching.encoding import Encoders
from training.data.caching.tensor_cache import TensorCache
from training.data.captions.caption_rules import possible
from training.data.items import Recipe, load
from training.data.kind import DataKind
from training.data.samples import Sample, Store, Subset
from training.data.sizes import Fit, fit

_TEXTS_AT_ONCE = 16
_SPARE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Caches:
    """The caches that options ask for.

    Args:
        latents, texts: None, or where they are kept: a folder, or "memory".
        encoders: make what is missing.
        images_at_once: for the VAE.
        workers: processes that decode images.
    """

    latents: Path | str | None
    texts: Path | str | None
    encoders: Encoders
    images_at_once: int = 1
    workers: int = 0

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
        if self.latents is not None:
            samples = _fingerprinted(samples, recipe.store)
            latents = Latents(_cache(self.latents, "latents"), self.encoders.image_fingerprint)
            self._make_latents(samples, latents, recipe, rank, world, progress)
            recipe = replace(recipe, latents=latents)
        if self.texts is not None:
            texts = Texts(_cache(self.texts, "texts"), self.encoders.text_fingerprint)
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
        chunks = _chunks(missing, self.images_at_once, lambda key: _fit(jobs[key][0]).target)
        room = _Room(latents.cache, len(missing))
        requests = ([jobs[key] for key in chunk] for chunk in chunks)
        pixels = load(requests, partial(_pixels, recipe), self.workers)
        for chunk, batch in zip(chunks, pixels, strict=True):
            moments = self.encoders.encode_images(batch).float().cpu()
            for key, one in zip(chunk, moments, strict=True):
                _require_finite(one, recipe.store.name(jobs[key][0].place))
                room.used(latents.cache.write(key, {"moments": one}))
            if progress is not None:
                progress("caching latents", room.done, len(missing))

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


def plan_caches(
    options: Any,
    kind: DataKind,
    encoders: Encoders | None,
    subsets: set[Subset],
    default: Path | None,
) -> Caches | None:
    """The caches that options ask for, None for none.

    Args:
        default: folder of files where --cache_dir is not given; None where there is no place.

    Raises:
        PatchError: options that a cache cannot serve.
    """
    latents = options.cache_latents or options.cache_latents_to_disk
    texts = options.cache_text_encoder_outputs or options.cache_text_encoder_outputs_to_disk
    if not latents and not texts:
        return None
    if latents:
        wrong = {n for s in subsets for n, on in (("random_crop", s.sizes.random_crop),
                                                  ("color_aug", s.sizes.color)) if on}  # fmt: skip
        _refuse(wrong, "cache_latents", "a cached image is always the same")
    if texts and kind.conditioning != "caption":
        raise PatchError(
            "expected a base with captions for cache_text_encoder_outputs, found one that takes "
            f"{kind.conditioning}: leave it out."
        )
    if texts:
        wrong = {name for subset in subsets for name in subset.captions.varying}
        _refuse(wrong, "cache_text_encoder_outputs", "a cached caption is always the same")
    on_disk = options.cache_latents_to_disk or options.cache_text_encoder_outputs_to_disk
    folder = Path(options.cache_dir) if options.cache_dir else default
    if on_disk and folder is None:
        raise PatchError(
            "expected a place for cache files, found data that is no folder: give --cache_dir."
        )
    if encoders is None:
        raise ValueError("a cache needs encoders")
    return Caches(
        latents=(folder if options.cache_latents_to_disk else "memory") if latents else None,
        texts=(folder if options.cache_text_encoder_outputs_to_disk else "memory")
        if texts
        else None,
        encoders=encoders,
        images_at_once=options.vae_batch_size,
        workers=options.max_data_loader_n_workers,
    )


def _refuse(wrong: set[str], cache: str, why: str) -> None:
    if wrong:
        raise PatchError(
            f"expected no {' or '.join(sorted(wrong))} with {cache}, found it: {why}; leave out "
            "one of them."
        )


def _fit(sample: Sample) -> Fit:
    return fit(sample.size, sample.subset.sizes, sample.bucket)


def _cache(place: Path | str, name: str) -> TensorCache:
    return TensorCache(None if place == "memory" else Path(place) / name)


def _fingerprinted(samples: list[Sample], store: Store) -> list[Sample]:
    with ThreadPoolExecutor(8) as pool:
        prints = pool.map(store.fingerprint, [sample.place for sample in samples])
        return [replace(s, fingerprint=p) for s, p in zip(samples, prints, strict=True)]


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


def _pixels(recipe: Recipe, jobs: Sequence[tuple[Sample, bool]]) -> Tensor:
    images = []
    for sample, flipped in jobs:
        pixels = recipe.pixels(sample, *_fit(sample).crop())
        images.append(pixels.flip(-1) if flipped else pixels)
    return torch.stack(images)


def _require_finite(moments: Tensor, name: str) -> None:
    if not bool(moments.isfinite().all()):
        raise PatchError(
            f"expected finite latents of {name}, found NaN or infinity: give --no_half_vae; the "
            "VAE of SDXL overflows in half precision."
        )
