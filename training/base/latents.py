"""The space that a denoiser works in: latents of its VAE, and pictures of them.

Not every VAE gives its latents in the form that the denoiser takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle


class LatentSpace:
    """The latents of `AutoencoderKL`, scaled and shifted by two numbers of its configuration.

    Args:
        vae: of diffusers; on the meta device its latents have a size only.
    """

    def __init__(self, vae: Any) -> None:
        self.vae = vae

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return int(self.vae.config.latent_channels)

    @property
    def factor(self) -> int:
        """Pixels of a side over cells of the latent."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def stride(self) -> int:
        """Frames of a video over frames of its latent; the first one has a latent of its own."""
        return 1

    def moments(self, pixels: Tensor) -> Tensor:
        """Means and standard deviations (B, 2C, h, w), float32 on the VAE's device, of pixels
        (B, 3, H, W) in [-1, 1]; both are before the scaling."""
        like = next(self.vae.parameters())
        with torch.no_grad():
            mean, std = self.encode(pixels.to(like.device, like.dtype))
        return torch.cat([mean, std], dim=1).float()

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Means and standard deviations (B, C, h, w) of the latents."""
        latent = self.vae.encode(pixels).latent_dist
        return latent.mean, latent.std

    def scaled(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) of the VAE at the scale of the denoiser."""
        scaled: Tensor = (latents - self._shift) * self.vae.config.scaling_factor
        return scaled

    def unscaled(self, latents: Tensor) -> Tensor:
        """The inverse of `scaled`."""
        unscaled: Tensor = latents / self.vae.config.scaling_factor + self._shift
        return unscaled

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1], float32 on the CPU, of latents at the denoiser's scale.

        The pictures are decoded one by one, which takes the memory of one.
        """
        like = next(self.vae.parameters())
        with torch.no_grad():
            images = [
                self.picture(one.unsqueeze(0).to(like.device, like.dtype))
                for one in self.unscaled(latents)
            ]
        return torch.cat(images).float().clamp(-1, 1).cpu()

    def picture(self, latent: Tensor) -> Tensor:
        """The picture (1, 3, H, W) of one latent (1, C, h, w) of the VAE."""
        picture: Tensor = self.vae.decode(latent).sample
        return picture

    @property
    def _shift(self) -> float:
        return getattr(self.vae.config, "shift_factor", None) or 0.0


class FrameSpace(LatentSpace):
    """The latents of `AutoencoderKLQwenImage` and `AutoencoderKLWan`: a picture is a video of one
    frame, and each channel is normalised by numbers of the configuration.

    Pixels and latents of videos have an axis of frames behind the channels, which pictures do
    without.
    """

    @property
    def channels(self) -> int:
        """See `LatentSpace.channels`."""
        return int(self.vae.config.z_dim)

    @property
    def factor(self) -> int:
        """See `LatentSpace.factor`."""
        packed = getattr(self.vae.config, "patch_size", None) or 1  # pixels of a side, in Wan 2.2
        return int(packed * 2 ** len(self.vae.config.temperal_downsample))

    @property
    def stride(self) -> int:
        """See `LatentSpace.stride`."""
        return int(2 ** sum(self.vae.config.temperal_downsample))

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """See `LatentSpace.encode`."""
        mean, std = super().encode(as_video(pixels))
        return (mean, std) if pixels.ndim == 5 else (mean.squeeze(2), std.squeeze(2))

    def scaled(self, latents: Tensor) -> Tensor:
        """See `LatentSpace.scaled`."""
        mean, std = self._numbers(latents)
        return (latents - mean) / std

    def unscaled(self, latents: Tensor) -> Tensor:
        """See `LatentSpace.unscaled`."""
        mean, std = self._numbers(latents)
        return latents * std + mean

    def picture(self, latent: Tensor) -> Tensor:
        """See `LatentSpace.picture`."""
        picture = super().picture(as_video(latent))
        return picture if latent.ndim == 5 else picture.squeeze(2)

    def _numbers(self, like: Tensor) -> tuple[Tensor, Tensor]:
        config = self.vae.config
        numbers = torch.tensor([config.latents_mean, config.latents_std])
        mean, std = numbers.to(like.device, like.dtype).reshape(2, -1, *[1] * (like.ndim - 2))
        return mean, std


def as_video(picture: Tensor) -> Tensor:
    """A picture (B, C, H, W) as a video of one frame (B, C, 1, H, W); a video as it is."""
    return picture if picture.ndim == 5 else picture.unsqueeze(2)


class PackedSpace(LatentSpace):
    """The latents of `AutoencoderKLFlux2`: 2 x 2 cells of the VAE are one cell, and each of its
    channels is normalised by the mean and variance of the VAE's batch normalisation.

    The channels of a cell are in the order of the pipelines: channel of the VAE, row, column.
    """

    @property
    def channels(self) -> int:
        """See `LatentSpace.channels`."""
        return 4 * super().channels

    @property
    def factor(self) -> int:
        """See `LatentSpace.factor`."""
        return 2 * super().factor

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """See `LatentSpace.encode`."""
        mean, std = super().encode(pixels)
        return pixel_unshuffle(mean, 2), pixel_unshuffle(std, 2)

    def scaled(self, latents: Tensor) -> Tensor:
        """See `LatentSpace.scaled`."""
        mean, std = self._numbers(latents)
        return (latents - mean) / std

    def unscaled(self, latents: Tensor) -> Tensor:
        """See `LatentSpace.unscaled`."""
        mean, std = self._numbers(latents)
        return latents * std + mean

    def picture(self, latent: Tensor) -> Tensor:
        """See `LatentSpace.picture`."""
        return super().picture(pixel_shuffle(latent, 2))

    def _numbers(self, like: Tensor) -> tuple[Tensor, Tensor]:
        norm = self.vae.bn
        mean, variance = norm.running_mean, norm.running_var
        std = (variance.float() + self.vae.config.batch_norm_eps).sqrt()
        return _of_channels(mean, like), _of_channels(std, like)


def _of_channels(numbers: Tensor, like: Tensor) -> Tensor:
    return numbers.to(like.device, like.dtype)[:, None, None]


class OpaqueSpace(FrameSpace):
    """The latents of `AutoencoderKLQwenImage21`, which sees how opaque a picture is as well: ours
    are opaque, and what it draws lies on white."""

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """See `LatentSpace.encode`."""
        return super().encode(torch.cat([pixels, torch.ones_like(pixels[:, :1])], dim=1))

    def picture(self, latent: Tensor) -> Tensor:
        """See `LatentSpace.picture`."""
        drawn = super().picture(latent)
        colours, opacity = drawn[:, :3], (drawn[:, 3:] + 1) / 2
        return colours * opacity + (1 - opacity)
