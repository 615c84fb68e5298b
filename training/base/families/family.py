"""What the trainer must know of a family of bases, besides what `dmp_common` knows."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import diffusers
import torch.nn as nn
from torch import Tensor

from dmp_common import PatchError
from training.base.schedulers import dynamic_shift

if TYPE_CHECKING:
    from training.base.latents import LatentSpace
    from training.base.places import Source
    from training.options.config import TrainConfig

Given = Mapping[str, Tensor]
# Names of weights whose distillation was trained away again, as in "Z-Image-De-Turbo".
_UNDONE = re.compile(r"(?<![a-z])(de|un)[-_. ]?(turbo|distill|schnell)")


@dataclass(frozen=True)
class Family:
    """A family of bases: what there is to load, how to call it, what it is told.

    Args:
        denoiser: folder of the denoiser in a diffusers pipeline.
        model: its class in diffusers.
        autoencoder: the class of its VAE in diffusers.
        since: the first release of diffusers that knows it and computes it as later ones do.
        pipeline: the class that reads single files with everything in them; "" for none.
        vae: whether the family works on latents.
        encoders: text encoders by folder, with their classes in transformers. The tokenizer of
            `text_encoder_2` is `tokenizer_2`, and so on.
        tokenizers: folders of tokenizers that are not named so, by that of the text encoder.
        files: by such a folder, the option that names a single file of that text encoder.
        conditioner: the class in diffusers of what stands between text encoders and denoiser, in
            the folder `text_conditioner`; "" for none.
        words: folders of tokenizers that have no text encoder of their own.
        conditioning: what a sample is told besides the timestep.
        resolution: of the base in pixels, where its configuration does not tell.
        multiple: sides of images are multiples of it.
        square: the model takes square inputs only.
        guidance: usual scale of classifier-free guidance in previews, 1 for none.
        scheduler: configuration of the noise schedule, where the weights come without one.
        vae_id: the usual VAE, where the weights come without one.
        even: the pipeline of a flow model spaces noise levels evenly from 1 to 1 / steps, before
            they are shifted.
        frame_stride: frames of a video that its VAE makes one frame of the latent of; the first
            frame has one of its own. 1 for families of pictures.
        first_frame: it goes on from a picture, the first frame of a video.
        vision: the class in transformers of what looks at that picture, besides the VAE; "" for
            none. Its folder is `image_encoder`.
        settings: of its pipeline in diffusers, besides the parts.
        distilled: the weights were distilled to draw in a few steps without guidance.
        fast: a pattern of the names of such weights, where siblings share a structure; "" for none.
        undistilled: the name of those from before, for messages.
    """

    denoiser: Literal["unet", "transformer"]
    model: str
    since: str = "0.35"
    pipeline: str = ""
    vae: bool = True
    autoencoder: str = "AutoencoderKL"
    encoders: Mapping[str, str] = field(default_factory=dict)
    tokenizers: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    conditioner: str = ""
    words: tuple[str, ...] = ()
    conditioning: Literal["caption", "label"] = "caption"
    resolution: int = 1024
    multiple: int = 64
    square: bool = False
    guidance: float = 7.5
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    vae_id: str | None = None
    even: bool = False
    distilled: bool = False
    frame_stride: int = 1
    first_frame: bool = False
    vision: str = ""
    fast: str = ""
    undistilled: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def encoder_layers(self) -> int | None:
        """How many layers of its text encoder it needs, a language model; None for all of them."""
        return None

    def of_weights(self, source: Source) -> Family:
        """The family with what its weights tell of themselves, where siblings share a structure.

        The configuration of a pipeline says whether they are distilled, or else their name; weights
        that tell nothing count as undistilled.
        """
        if not self.fast:
            return self
        return self._distilled(source.facts.get("is_distilled", self._is_fast(source.name)))

    def of_name(self, name: str) -> Family:
        """The family with what the name of its weights tells, as far as `of_weights` goes by it."""
        return self._distilled(self._is_fast(name))

    def _is_fast(self, name: str) -> bool:
        name = name.lower()
        return bool(self.fast and re.search(self.fast, name) and not _UNDONE.search(name))

    def _distilled(self, told: bool) -> Family:
        return replace(self, distilled=True, guidance=1.0) if told else self

    def require_scale(self, scale: float, base: str) -> None:
        """Refuses guidance for weights that were distilled to draw without, whose pipelines ignore
        it.

        Args:
            scale: of classifier-free guidance; 1 is none.
            base: name of the base, for the error.

        Raises:
            PatchError: the weights are distilled, and the scale is not 1.
        """
        if scale != 1.0 and self.distilled:
            raise PatchError(
                f"expected a guidance scale of 1 for the distilled weights of base {base}, found "
                f"{scale:g}: leave it out, or name weights that are not distilled."
            )

    def require_packages(self) -> None:
        """Checks that the packages are there which its model needs besides diffusers.

        Raises:
            PatchError: one is missing.
        """

    def pipeline_of(self, parts: Mapping[str, Any]) -> Any:
        """Returns its pipeline in diffusers, made of parts by folder."""
        cls = getattr(diffusers, self.pipeline)
        parameters = inspect.signature(cls).parameters
        needed: dict[str, Any] = {
            name: None for name, p in parameters.items() if p.default is inspect.Parameter.empty
        }
        if "is_distilled" in parameters:
            needed["is_distilled"] = self.distilled
        return cls(**{**needed, **parts, **self.settings})

    def predict(self, model: nn.Module, noisy: Tensor, t: Tensor, given: Given) -> Tensor:
        """The model's output (B, C or 2C, H, W).

        Args:
            noisy: (B, C, H, W), or (B, C, T, H, W) of a video, as the output is then.
            t: (B,) on the scale 0..1000.
            given: what `encode_text` said, "labels" (B,), and "sizes" (B, 6): original height and
                width, top and left of the crop, target height and width, in pixels.
        """
        raise NotImplementedError

    def reader(self, tokenizer: Any) -> Any:
        """What the pipeline reads captions with, made of a tokenizer."""
        return tokenizer

    def window(self, config: TrainConfig) -> int:
        """Tokens of a caption that are read; the rest is cut off. CLIP reads windows of 75."""
        return config.max_token_length

    def levels(self, scheduler: Any, steps: int, tokens: int) -> dict[str, Any]:
        """The arguments of `set_timesteps` of a flow model's scheduler, as its pipeline gives them.

        Args:
            scheduler: of the base.
            steps: of sampling.
            tokens: of a picture.
        """
        arguments: dict[str, Any] = {"num_inference_steps": steps}
        if self.even:
            arguments = {"sigmas": [1 - n / steps for n in range(steps)]}
        if scheduler.config.get("use_dynamic_shifting"):
            arguments["mu"] = self.shift(scheduler, steps, tokens)
        return arguments

    def shift(self, scheduler: Any, steps: int, tokens: int) -> float:
        """Logarithm of the shift of a picture's noise levels; arguments as of `levels`."""
        return dynamic_shift(scheduler, tokens)

    def look(
        self, space: LatentSpace, vision: Mapping[str, Any], pictures: Tensor, frames: int
    ) -> dict[str, Tensor]:
        """What the model is told of the first frames of B videos: tensors (B, ...) by name.

        Args:
            space: of the latents.
            vision: what looks at pictures, by folder.
            pictures: (B, 3, H, W) in [-1, 1].
            frames: of a video.
        """
        raise NotImplementedError

    def whole(self, drawn: Tensor, given: Given) -> Tensor:
        """What was drawn, with the frames that were given in their places."""
        return drawn

    def counted(self, clean: Tensor) -> Tensor | None:
        """How much each place of clean data (B, C, ...) counts in the loss, (B, 1, ...) in [0, 1];
        None where all count alike."""
        return None

    def encode_text(
        self, parts: Mapping[str, Any], captions: list[str], config: TrainConfig
    ) -> dict[str, Tensor]:
        """What the text encoders say of B captions: tensors (B, ...) by name.

        Args:
            parts: text encoders and tokenizers, by folder.
        """
        raise NotImplementedError


def like(given: Tensor, noisy: Tensor) -> Tensor:
    """A condition in the precision of the model's input."""
    return given.to(noisy.device, noisy.dtype)
