"""Wan, a model of videos: a picture is a video of one frame."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import torch.nn as nn
from PIL import Image
from torch import Tensor

from dmp_common import PatchError
from dmp_common.bases.wan import FRAME_STRIDE
from training.base.families.family import Given, like
from training.base.families.transformer import T5Family
from training.base.latents import LatentSpace, as_video

if TYPE_CHECKING:
    from training.options.config import TrainConfig

_PATCH = 2  # cells of the latent in a side of a token


class Wan(T5Family):
    """Wan 2.1 and 2.2, text to video: UMT5, whose padding the model sees as zeros."""

    def predict(self, model: nn.Module, noisy: Tensor, t: Tensor, given: Given) -> Tensor:
        """See `Family.predict`; needs "prompt" (B, L, D)."""
        output = model(
            as_video(noisy),
            timestep=t,
            encoder_hidden_states=like(given["prompt"], noisy),
        ).sample
        return output.reshape(noisy.shape)

    def encode_text(
        self, parts: Mapping[str, Any], captions: list[str], config: TrainConfig
    ) -> dict[str, Tensor]:
        """{"prompt": (B, L, D)}, zero after the caption."""
        cls: Any = diffusers.WanPipeline
        pipeline = cls(vae=None, scheduler=None, transformer=None, **parts)
        try:
            prompt, _ = pipeline.encode_prompt(
                captions,
                do_classifier_free_guidance=False,
                device=parts["text_encoder"].device,
                max_sequence_length=self.window(config) + 1,
            )
        except NameError as error:  # diffusers 0.35 takes ftfy for granted
            raise PatchError(
                f"expected the package ftfy, with which diffusers {diffusers.__version__} cleans "
                "Wan's captions, found none: pip install ftfy, or a later diffusers."
            ) from error
        return {"prompt": prompt}


class WanFirst(Wan):
    """Wan 2.2 TI2V-5B, going on from a picture: the first frame of the latent is given, without
    noise and at timestep 0. Nothing is predicted there: it counts as 0."""

    def predict(self, model: nn.Module, noisy: Tensor, t: Tensor, given: Given) -> Tensor:
        """See `Family.predict`; needs "prompt" (B, L, D) and what `look` says."""
        batch, _, frames, height, width = noisy.shape
        cells = (height // _PATCH) * (width // _PATCH)
        times = t[:, None, None].expand(batch, frames, cells).clone()
        times[:, 0] = 0
        output = model(
            self.whole(noisy, given),
            timestep=times.flatten(1),
            encoder_hidden_states=like(given["prompt"], noisy),
        ).sample
        return torch.cat([torch.zeros_like(output[:, :, :1]), output[:, :, 1:]], dim=2)

    def look(
        self, space: LatentSpace, vision: Mapping[str, Any], pictures: Tensor, frames: int
    ) -> dict[str, Tensor]:
        """{"first": (B, C, 1, h, w), the latent of the first frame}."""
        mean, _ = space.moments(as_video(pictures)).chunk(2, dim=1)
        return {"first": space.scaled(mean)}

    def whole(self, drawn: Tensor, given: Given) -> Tensor:
        """See `Family.whole`."""
        return torch.cat([like(given["first"], drawn), drawn[:, :, 1:]], dim=2)

    def counted(self, clean: Tensor) -> Tensor:
        """See `Family.counted`: all frames but the one that is given."""
        counted = torch.ones_like(clean[:, :1])
        counted[:, :, 0] = 0
        return counted


class WanPicture(Wan):
    """Wan 2.1 and 2.2, picture to video: beside the noise the model sees a latent of the first
    frame with grey ones behind it, and a mask. Wan 2.1 also reads what CLIP sees in the frame."""

    def predict(self, model: nn.Module, noisy: Tensor, t: Tensor, given: Given) -> Tensor:
        """See `Family.predict`; needs "prompt" (B, L, D) and what `look` says."""
        seen = given.get("seen")
        output: Tensor = model(
            torch.cat([noisy, like(given["first"], noisy)], dim=1),
            timestep=t,
            encoder_hidden_states=like(given["prompt"], noisy),
            encoder_hidden_states_image=None if seen is None else like(seen, noisy),
        ).sample
        return output

    def look(
        self, space: LatentSpace, vision: Mapping[str, Any], pictures: Tensor, frames: int
    ) -> dict[str, Tensor]:
        """{"first": (B, S + C, T, h, w), mask and latent; "seen": (B, L, D), where CLIP looks}.

        The mask has a channel for each frame that one of the latent stands for.
        """
        count, channels, height, width = pictures.shape
        rest = pictures.new_zeros(count, channels, frames - 1, height, width)
        mean, _ = space.moments(torch.cat([as_video(pictures), rest], dim=2)).chunk(2, dim=1)
        mask = mean.new_zeros(count, space.stride, *mean.shape[2:])
        mask[:, :, 0] = 1
        told = {"first": torch.cat([mask, space.scaled(mean)], dim=1)}
        return told | ({"seen": _seen(vision, pictures)} if vision else {})


def _seen(vision: Mapping[str, Any], pictures: Tensor) -> Tensor:
    """The last hidden state but one (B, L, D) of CLIP, as the pipeline takes it."""
    encoder = vision["image_encoder"]
    levels = ((pictures + 1) * 127.5).round().clamp(0, 255).to("cpu", torch.uint8)
    images = [Image.fromarray(one.numpy()) for one in levels.permute(0, 2, 3, 1).contiguous()]
    pixels = vision["image_processor"](images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        states = encoder(pixels.to(encoder.device, encoder.dtype), output_hidden_states=True)
    return states.hidden_states[-2]


WAN = Wan(
    denoiser="transformer",
    model="WanTransformer3DModel",
    pipeline="WanPipeline",
    autoencoder="AutoencoderKLWan",
    encoders={"text_encoder": "UMT5EncoderModel"},
    files={"text_encoder": "t5xxl"},
    resolution=640,  # about the area of 832 x 480
    guidance=5.0,
    frame_stride=FRAME_STRIDE,
)
_FROM_PICTURE = vars(WAN) | {"pipeline": "WanImageToVideoPipeline", "first_frame": True}
# The models of picture to video: Wan 2.2's, and Wan 2.1's, which reads what CLIP sees besides.
WAN_PICTURE = WanPicture(**_FROM_PICTURE)
WAN_PICTURE_CLIP = WanPicture(**_FROM_PICTURE | {"vision": "CLIPVisionModel"})
# Wan 2.2 TI2V-5B with --first_frames.
WAN_FIRST = WanFirst(**_FROM_PICTURE | {"settings": {"expand_timesteps": True}})
