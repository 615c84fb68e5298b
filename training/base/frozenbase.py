"""The frozen base a patch is trained on: its model, the parts around it, its facts."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from dmp_common import Base, PatchError
from dmp_common.bases.base import Naming
from dmp_common.bases.timesteps import frequency_shift
from training.base import memory
from training.base.families import dit
from training.base.families.family import Family
from training.base.latents import LatentSpace
from training.base.schedulers import is_flow
from training.base.spaces import space_of
from training.data.kind import DataKind


@dataclass
class FrozenBase:
    """A base with its weights, in evaluation mode and without gradients of its own.

    Args:
        model: the denoiser.
        scheduler: diffusers scheduler; names the prediction type and the noise schedule.
        base, naming, family: what the model is.
        vae: None for a base of pixels.
        encoders: text encoders and tokenizers, by folder in a diffusers pipeline.
        vision: what looks at the first frame of a video, by folder in a diffusers pipeline.
        unconditional: every image gets the null class.
        window: tokens of a caption that its text encoders read.
        frames: of the videos that are trained on; 1 for pictures.
        stills: a picture in the data is a video that stands still.
        swapped: how many of its last blocks the CPU keeps (--blocks_to_swap).
    """

    model: nn.Module
    scheduler: Any
    base: Base
    naming: Naming
    family: Family
    vae: Any = None
    encoders: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)
    unconditional: bool = False
    window: int | None = None
    frames: int = 1
    stills: bool = False
    swapped: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """The precision that the denoiser computes in; --fp8_base stores its weights in another."""
        model: Any = self.model
        dtype: torch.dtype = model.dtype
        return dtype

    @property
    def blocks(self) -> list[nn.Module]:
        """The large parts of the denoiser in the order of the computation, see `large_blocks`."""
        return memory.large_blocks(self.model, self.base.times[self.naming].mlp)

    @property
    def swapped_blocks(self) -> list[nn.Module]:
        """The blocks that --blocks_to_swap keeps in the memory of the CPU."""
        blocks = self.blocks
        return blocks[len(blocks) - min(self.swapped, len(blocks)) :]

    @property
    def prediction(self) -> str:
        """epsilon, v_prediction, sample or flow."""
        flow = is_flow(self.scheduler)
        return "flow" if flow else str(self.scheduler.config.prediction_type)

    @property
    def facts(self) -> dict[str, Any]:
        """What a patch must record of the model it was trained on."""
        return {
            "prediction": self.prediction,
            "frequency_shift": frequency_shift(self.model, self.base, self.naming),
        }

    @property
    def space(self) -> LatentSpace | None:
        """The space of its latents; None for a base of pixels."""
        return None if self.vae is None else space_of(self.vae)

    @property
    def channels(self) -> int:
        """Of the latent, or of the pixels of a base without VAE."""
        if self.space is not None:
            return self.space.channels
        config: Any = self.model.config
        return int(config.in_channels)

    @property
    def learns_sigma(self) -> bool:
        """Whether the model also predicts the variance of the reverse process."""
        config: Any = self.model.config
        return bool(getattr(config, "out_channels", None) == 2 * config.in_channels)

    @property
    def null_label(self) -> int | None:
        """Class id that means "no class", for a base with classes."""
        return dit.null_label(self.model) if self.conditioning != "caption" else None

    @property
    def conditioning(self) -> str:
        """caption, label or none."""
        if self.family.conditioning == "caption" or dit.takes_text(self.model):
            return "caption"
        return "none" if self.unconditional or dit.null_label(self.model) == 0 else "label"

    @property
    def factor(self) -> int:
        """Pixels of a side over cells of the latent."""
        return 1 if self.space is None else self.space.factor

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """The shape (C, h, w) of what is drawn in the model's space, or (C, T, h, w) of a video.

        Args:
            height, width: in pixels.
        """
        stride = 1 if self.space is None else self.space.stride
        frames = () if self.frames == 1 else ((self.frames - 1) // stride + 1,)
        return (self.channels, *frames, height // self.factor, width // self.factor)

    @property
    def kind(self) -> DataKind:
        """What this base eats."""
        size = getattr(self.model.config, "sample_size", None)
        resolution = size * self.factor if isinstance(size, int) else self.family.resolution
        return DataKind(
            conditioning=self.conditioning,  # type: ignore[arg-type]
            channels=3 if self.vae is not None else self.channels,
            resolution=resolution,
            multiple=self.family.multiple,
            num_classes=dit.null_label(self.model) if self.conditioning == "label" else None,
            null_label=self.null_label,
            square=self.family.square,
            window=self.window,
            frames=self.frames,
            stills=self.stills,
            first_frame=self.family.first_frame,
        )

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Samples (B, C, h, w) of latents at the model's scale, from the VAE's moments; the shapes
        of videos are those of `latent_shape`.

        Args:
            moments: (B, 2C, h, w), means and standard deviations.
            noise: (B, C, h, w), standard normal.
        """
        assert self.space is not None
        mean, std = moments.chunk(2, dim=1)
        return self.space.scaled(mean + std * noise)

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels (B, C, H, W) in [-1, 1], float32 on the CPU, of what the model made; of videos
        (B, C, frames, H, W)."""
        if self.space is None:
            return latents.float().clamp(-1, 1).cpu()
        return self.space.decode(latents)

    def pipeline(self) -> Any:
        """Returns a diffusers pipeline of these parts.

        Raises:
            PatchError: diffusers has no pipeline that the trainer knows for this base.
        """
        if not self.family.pipeline:
            raise PatchError(
                f"expected a base with a pipeline in diffusers, found {self.base.name}: use its "
                "`model`."
            )
        own = {self.family.denoiser: self.model, "scheduler": self.scheduler, "vae": self.vae}
        return self.family.pipeline_of({**own, **self.encoders, **self.vision})

    def to(self, device: torch.device) -> FrozenBase:
        """Moves everything, except for the blocks that --blocks_to_swap keeps on the CPU."""
        if self.swapped and device.type != "cpu":
            memory.swap(self.model, self.swapped_blocks, device)
        else:
            self.model.to(device)
        for part in (self.vae, *self.encoders.values(), *self.vision.values()):
            if isinstance(part, nn.Module):
                part.to(device)
        return self

    def enable_gradient_checkpointing(self) -> None:
        """Computes each block again in the backward pass, which saves what is kept for it."""
        whole = self.swapped or any(p.dtype == memory.STORED for p in self.model.parameters())
        model: Any = self.model
        function = memory.whole_checkpoint if whole else memory.keyword_checkpoint
        model.enable_gradient_checkpointing(function)

    def release_encoders(self) -> None:
        """Gives the memory of the text encoders back, once every caption is encoded."""
        self.encoders.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
