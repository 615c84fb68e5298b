"""Makes the student's inputs from a batch of the data."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from dmp_common import PatchError
from training.base.encoders import FrozenEncoders
from training.base.frozen import FrozenBase
from training.data.batch import Batch
from training.objective.noise import Draws, Names, draw, shaped
from training.options.config import TrainConfig


@dataclass(frozen=True)
class Inputs:
    """A batch on its device, encoded.

    Args:
        clean: latents, or pixels of a base without VAE (B, C, H, W); of videos (B, C, T, H, W).
        draws: the random draws of the samples.
        given: the conditions of the samples, tensors (B, ...) by name.
        weights: (B,), factors of the losses; None if all are 1.
        keys: names of the samples.
        masks: (B, 1, H, W) in [0, 1] at the size of `clean`, how much each place counts in the
            loss, with an axis for the frames of videos; None if all count alike.
    """

    clean: Tensor
    draws: Draws
    given: dict[str, Tensor]
    weights: Tensor | None
    keys: list[str]
    masks: Tensor | None = None

    def to(self, device: torch.device) -> Inputs:
        """The same inputs on a device; the draws stay where they are."""
        return replace(
            self,
            clean=self.clean.to(device),
            given={name: value.to(device) for name, value in self.given.items()},
            weights=None if self.weights is None else self.weights.to(device),
            masks=None if self.masks is None else self.masks.to(device),
        )

    def rows(self, rows: list[int]) -> Inputs:
        """Some of the samples, each with the weight 1."""
        return Inputs(
            clean=self.clean[rows],
            draws=self.draws.rows(rows),
            given={name: value[rows] for name, value in self.given.items()},
            weights=None,
            keys=[self.keys[row] for row in rows],
            masks=None if self.masks is None else self.masks[rows],
        )


def encode(
    batch: Batch,
    encoders: FrozenEncoders,
    config: TrainConfig,
    names: Names,
    device: torch.device,
    held_out: bool = False,
) -> Inputs:
    """Encodes what no cache holds, and draws each sample's noise.

    Args:
        names: what the draws of each sample depend on.
        held_out: draw plain noise, whatever noise the options ask for: the latents of held-out
            images, which are drawn too, are then the same for every run.
    """
    options = None if held_out else config
    batch = batch.to(device)
    frozen = encoders.frozen
    if frozen.vae is None:
        clean = _pixels(batch)
        draws = draw(names, clean.shape[1:], options).to(device)
    else:
        moments = batch.moments if batch.moments is not None else encoders.moments(_pixels(batch))
        draws = draw(names, moments.chunk(2, dim=1)[0].shape[1:], options).to(device)
        clean = frozen.latents(moments, draws.latent)
    masks = _masks(batch, config)
    if masks is not None:
        masks = interpolate(masks, clean.shape[-2:], mode="area")
        masks = masks if clean.ndim == 4 else masks.unsqueeze(2)  # the same for all frames
    counted = frozen.family.counted(clean)
    if counted is not None:
        masks = counted if masks is None else masks * counted
    draws = shaped(draws, clean, config)
    return Inputs(
        clean, draws, conditions(batch, encoders, config), batch.weights, batch.keys, masks
    )


def _pixels(batch: Batch) -> Tensor:
    if batch.pixels is None:
        raise ValueError("expected a batch with pixels, found cached latents without a VAE")
    return batch.pixels


def _masks(batch: Batch, config: TrainConfig) -> Tensor | None:
    """The masks of a batch where an option asks for them.

    Raises:
        PatchError: --masked_loss is given, and the data have no masks.
    """
    if not (config.masked_loss or config.alpha_mask):
        return None
    if batch.masks is None and config.masked_loss:
        raise PatchError(
            f"expected masks for --masked_loss, found images without ({batch.keys[0]}): give "
            "conditioning_data_dir in the data set file, or --alpha_mask."
        )
    return batch.masks


def conditions(batch: Batch, encoders: FrozenEncoders, config: TrainConfig) -> dict[str, Tensor]:
    """What the model is told of a batch besides the timestep, tensors (B, ...) by name.

    Raises:
        PatchError: a base that takes captions, and images without.
    """
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
    if frozen.family.first_frame:
        given |= _first_frames(batch, encoders)
    given["guidance"] = torch.full((len(batch),), config.flux_guidance_scale, device=device)
    return given


def _first_frames(batch: Batch, encoders: FrozenEncoders) -> dict[str, Tensor]:
    if batch.first is not None:
        return batch.first
    return encoders.look(_pixels(batch)[:, :, 0])


def _null(frozen: FrozenBase, batch: Batch) -> Tensor:
    label = int(frozen.null_label or 0)
    return torch.full((len(batch),), label, dtype=torch.long, device=batch.sizes.device)
