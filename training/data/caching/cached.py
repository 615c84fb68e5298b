"""How latents and text outputs are found in a cache: by everything they depend on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from training.data.caching.tensor_cache import BROKEN, TensorCache, cache_key
from training.data.samples import Sample
from training.data.sizes import fit

_FIRST = "first."  # before the names of what a model is told of a first frame


class CachedImage(NamedTuple):
    """What the cache has of an image.

    Args:
        moments: means and standard deviations (2C, h, w).
        mask: (1, H, W) uint8, at the size of the pixels; None without one.
        first: what the model is told of the first frame, by name; None where it is told nothing.
        broken: why the image cannot be used, empty for most; its moments are then those of grey.
    """

    moments: Tensor
    mask: Tensor | None = None
    broken: str = ""
    first: dict[str, Tensor] | None = None

    def tensors(self) -> dict[str, Tensor]:
        """As the cache keeps it."""
        tensors = {"moments": self.moments}
        if self.mask is not None:
            tensors["mask"] = self.mask
        tensors |= {f"{_FIRST}{name}": value for name, value in (self.first or {}).items()}
        if self.broken:
            data = self.broken.encode("utf-8", "surrogatepass")
            tensors[BROKEN] = torch.tensor(list(data), dtype=torch.uint8)
        return tensors


@dataclass(frozen=True)
class Latents:
    """Latents of samples. A key names the encoder, the image's content and what is cut from it."""

    cache: TensorCache
    encoder: str

    def key(self, sample: Sample, flipped: bool) -> str:
        """The key of a sample's latents."""
        how = fit(sample.size, sample.subset.sizes, sample.bucket)
        # Only where there is a mask, so that caches made before there were any stay valid.
        mask = {"mask": sample.mask_print} if sample.mask_print else {}
        return cache_key(
            encoder=self.encoder, image=sample.fingerprint, size=sample.size,
            resized=how.resized, target=how.target, crop=how.crop(), flipped=flipped, **mask,
        )  # fmt: skip

    def read(self, sample: Sample, flipped: bool) -> CachedImage:
        """A sample's latents and mask."""
        tensors = self.cache.read(self.key(sample, flipped))
        broken = tensors.get(BROKEN)
        error = "" if broken is None else bytes(broken.tolist()).decode("utf-8", "surrogatepass")
        first = {
            name.removeprefix(_FIRST): value
            for name, value in tensors.items()
            if name.startswith(_FIRST)
        }
        return CachedImage(tensors["moments"], tensors.get("mask"), error, first or None)


@dataclass(frozen=True)
class Texts:
    """Outputs of the text encoders for captions."""

    cache: TensorCache
    encoder: str

    def key(self, caption: str) -> str:
        """The key of a caption's outputs."""
        return cache_key(encoder=self.encoder, caption=caption)

    def stacked(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Outputs of B captions, each (B, ...)."""
        outputs = {caption: self.cache.read(self.key(caption)) for caption in set(captions)}
        names = outputs[captions[0]]
        return {name: torch.stack([outputs[c][name] for c in captions]) for name in names}
