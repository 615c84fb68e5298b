"""The frozen encoders of a base: pixels to latents, captions to what the model is told."""

from __future__ import annotations

import hashlib
import json

import torch
import torch.nn as nn
from torch import Tensor

from training.base.frozen import FrozenBase
from training.options.config import TrainConfig

_SAMPLES = 512  # values of a tensor that its fingerprint looks at


class FrozenEncoders:
    """Implements `training.data.caching.encoding.Encoders` for a base.

    Args:
        frozen: the base; on the device where encoding happens.
        config: its text settings.
    """

    def __init__(self, frozen: FrozenBase, config: TrainConfig) -> None:
        self.frozen, self.config = frozen, config
        self.image_fingerprint = fingerprint(frozen.vae) if frozen.vae is not None else "none"
        if frozen.frames != 1:  # so that caches of pictures stay valid
            self.image_fingerprint += f" of {frozen.frames} frames, stills {frozen.stills}"
        if frozen.family.first_frame:
            self.image_fingerprint += ", the first one given"
        if frozen.vision:
            self.image_fingerprint += f" and {fingerprint(frozen.vision['image_encoder'])}"
        settings = (config.max_token_length, config.clip_skip, config.t5_max_token_length)
        parts = [json.dumps(settings)]
        language = (config.llm_max_token_length, config.system_prompt)
        if any(language):  # else caches stay valid that were made before there were such options
            parts.append(json.dumps(language))
        for name, part in frozen.encoders.items():
            text = fingerprint(part) if isinstance(part, nn.Module) else _of_tokenizer(part)
            parts.append(f"{name}:{text}")
        self.text_fingerprint = hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def encode_images(self, pixels: Tensor) -> Tensor:
        """See `Encoders.encode_images`."""
        return self.moments(pixels).cpu()

    def moments(self, pixels: Tensor) -> Tensor:
        """Moments (B, 2C, h, w), float32, on the VAE's device."""
        assert self.frozen.space is not None
        return self.frozen.space.moments(pixels)

    def encode_first_frames(self, pixels: Tensor) -> dict[str, Tensor]:
        """See `Encoders.encode_first_frames`."""
        return {name: value.cpu() for name, value in self.look(pixels[:, :, 0]).items()}

    def look(self, pictures: Tensor) -> dict[str, Tensor]:
        """What the model is told of pictures (B, 3, H, W) in [-1, 1], the first frames of videos:
        tensors (B, ...) by name, on the encoders' device."""
        frozen = self.frozen
        assert frozen.space is not None
        return frozen.family.look(frozen.space, frozen.vision, pictures, frozen.frames)

    def encode_text(self, captions: list[str]) -> dict[str, Tensor]:
        """See `Encoders.encode_text`."""
        return {name: value.cpu() for name, value in self.told(captions).items()}

    def told(self, captions: list[str]) -> dict[str, Tensor]:
        """The same on the encoders' device."""
        with torch.no_grad():
            return self.frozen.family.encode_text(self.frozen.encoders, captions, self.config)


def fingerprint(module: nn.Module) -> str:
    """Names a module by its configuration, and by the shapes and some values of its weights.

    Some, because T5 alone has 19 GB; another training changes nearly every value.
    """
    digest = hashlib.sha256()
    config = getattr(module, "config", None)
    if config is not None:
        settings = config if isinstance(config, dict) else config.to_dict()
        told = {k: v for k, v in settings.items() if not k.startswith(("_", "dtype", "torch"))}
        digest.update(json.dumps(told, sort_keys=True, default=str).encode())
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().flatten()
        some = flat[:: max(1, len(flat) // _SAMPLES)].float().cpu()
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()


def _of_tokenizer(tokenizer: object) -> str:
    vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True)  # type: ignore[attr-defined]
    return hashlib.sha256(vocabulary.encode()).hexdigest()
