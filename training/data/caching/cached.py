"""How latents and text outputs are found in a cache: by everything they depend on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.data.caching.tensor_cache import TensorCache, cache_key
from training.data.samples import Sample
from training.data.sizes import fit


@dataclass(frozen=True)
class Latents:
    """Latents of samples. A key names the encoder, the image's content and what is cut from it."""

    cache: TensorCache
    encoder: str

    def key(self, sample: Sample, flipped: bool) -> str:
        """The key of a sample's latents."""
        how = fit(sample.size, sample.subset.sizes, sample.bucket)
        return cache_key(
            encoder=self.encoder, image=sample.fingerprint, size=sample.size,
            resized=how.resized, target=how.target, crop=how.crop(), flipped=flipped,
        )  # fmt: skip

    def moments(self, sample: Sample, flipped: bool) -> Tensor:
        """Means and standard deviations (2C, h, w)."""
        return self.cache.read(self.key(sample, flipped))["moments"]


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
