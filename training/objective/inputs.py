"""From a batch of the data to what the student takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dmp_common import PatchError
from training.base.encoders import FrozenEncoders
from training.data.batch import Batch
from training.objective.noise import Draws, draw
from training.options.config import TrainConfig


@dataclass(frozen=True)
class Inputs:
    """A batch on its device, encoded.

    Args:
        clean: latents, or pixels of a base without VAE (B, C, H, W).
        draws: of each sample.
        given: what each sample is told.
        weights: (B,), None if all are 1.
        keys: names of the samples.
    """

    clean: Tensor
    draws: Draws
    given: dict[str, Tensor]
    weights: Tensor | None
    keys: list[str]

    def to(self, device: torch.device) -> Inputs:
        """The same on a device; the draws stay where they are."""
        return replace(
            self,
            clean=self.clean.to(device),
            given={name: value.to(device) for name, value in self.given.items()},
            weights=None if self.weights is None else self.weights.to(device),
        )


def encode(
    batch: Batch,
    encoders: FrozenEncoders,
    config: TrainConfig,
    names: Sequence[tuple[object, ...]],
    device: torch.device,
) -> Inputs:
    """Encodes what no cache holds, and draws each sample's noise.

    Args:
        names: of each sample, what its draws depend on.
    """
    batch = batch.to(device)
    frozen = encoders.frozen
    if frozen.vae is None:
        clean, channels = batch.pixels, batch.pixels.shape[1:]
        draws = draw(names, tuple(channels), config.noise_offset).to(device)
    else:
        moments = batch.moments if batch.moments is not None else encoders.moments(batch.pixels)
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        draws = draw(names, shape, config.noise_offset).to(device)
        clean = frozen.latents(moments, draws.latent)
    return Inputs(clean, draws, _given(batch, encoders, config), batch.weights, batch.keys)


def _given(batch: Batch, encoders: FrozenEncoders, config: TrainConfig) -> dict[str, Tensor]:
    frozen, device = encoders.frozen, batch.sizes.device
    given: dict[str, Tensor] = {"sizes": batch.sizes}
    if frozen.conditioning == "caption":
        if batch.text is not None:
            given |= batch.text
        elif batch.captions is not None:
            given |= {
                name: value.to(device) for name, value in encoders.told(batch.captions).items()
            }
        else:
            raise PatchError(
                f"expected captions for base {frozen.base.name}, found images without: give "
                "caption files, or train on the empty caption with --allow_empty_captions."
            )
    else:
        given["labels"] = batch.labels if batch.labels is not None else _null(frozen, batch)
    given["guidance"] = torch.full((len(batch),), config.flux_guidance_scale, device=device)
    return given


def _null(frozen: object, batch: Batch) -> Tensor:
    label = frozen.null_label  # type: ignore[attr-defined]
    return torch.full((len(batch),), label, dtype=torch.long, device=batch.sizes.device)
