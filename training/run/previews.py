"""A/B previews: what the base makes, what the trained model makes from equal noise, and how they
differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dmp_common.patch.serialize import open_regular
from training.base.encoders import FrozenEncoders
from training.base.frozen import FrozenBase
from training.base.schedulers import is_flow
from training.data.draws import generator
from training.data.images import open_image, to_tensor
from training.data.sizes import SizeRules, crop_and_resize, fit
from training.objective.pictures import comparison, strip
from training.objective.sampling import SAMPLERS, condition, draw_images, is_guided
from training.options.config import TrainConfig
from training.run.prompt_files import Prompt, read_prompts

# kohya's names of samplers that are not ours.
_SAMPLERS = {"dpmsolver": "dpm++", "dpmsolver++": "dpm++", "dpmsingle": "dpm++_single"}


def previewed(config: TrainConfig) -> bool:
    """Whether a run draws previews."""
    wanted = (config.sample_prompts, config.sample_every_n_steps, config.sample_every_n_epochs)
    return any(wanted) or config.sample_at_first


def sampler_of(name: str | None, flow: bool) -> str:
    """The name that `make_sampler` knows of a sampler of --sample_sampler.

    Those that it does not have, and any for a flow model, become "default".
    """
    if flow or name is None:
        return "default"
    plain = name.removeprefix("k_")
    known = _SAMPLERS.get(plain, plain)
    return known if known in SAMPLERS else "default"


def _first_frame(prompt: Prompt, device: torch.device) -> Tensor:
    """The picture (1, 3, H, W) that a video goes on from, cropped to its size."""
    assert prompt.image is not None
    with open_regular(Path(prompt.image).expanduser(), "a picture") as file:
        picture = open_image(file, prompt.image)
    target = prompt.width, prompt.height
    how = fit(picture.size, SizeRules(target, 1))
    return to_tensor(crop_and_resize(picture, how, *how.crop())).unsqueeze(0).to(device)


class Previews:
    """Draws previews; what the prompts say is encoded once, when this is made.

    Args:
        frozen: the base.
        encoders: of the base.
        config: of the run.
        device: of the model.
    """

    def __init__(
        self,
        frozen: FrozenBase,
        encoders: FrozenEncoders,
        config: TrainConfig,
        device: torch.device,
    ) -> None:
        self.frozen, self.device = frozen, device
        self.sampler, self.flow = config.sample_sampler, is_flow(frozen.scheduler)
        self.prompts = read_prompts(config, frozen)
        self.told = [self._told(prompt, encoders) for prompt in self.prompts]
        self.base: list[Tensor] = []

    def draw(self, stop: Callable[[], None] = lambda: None) -> list[Tensor]:
        """One picture (C, H, W) in [-1, 1] for each prompt, from the model as it is now; of a video
        it is a strip of frames."""
        pictures = []
        for prompt, (told, untold) in zip(self.prompts, self.told, strict=True):
            pictures.append(self._draw(prompt, told, untold))
            stop()
        return pictures

    def pairs(self, trained: list[Tensor]) -> list[Image.Image]:
        """Base, trained and their difference, labelled, one image for each prompt."""
        kind = self.frozen.kind.conditioning
        return [
            comparison(left, right, prompt.text if kind == "caption" else f"class {prompt.text}")
            for left, right, prompt in zip(self.base, trained, self.prompts, strict=True)
        ]

    def _told(
        self, prompt: Prompt, encoders: FrozenEncoders
    ) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """What the model is told of a prompt, and of none where there is guidance."""
        frozen, size = self.frozen, (prompt.height, prompt.width)
        told = condition(frozen, encoders, prompt.text, size, prompt.scale)
        first = {} if prompt.image is None else encoders.look(_first_frame(prompt, self.device))
        if not is_guided(frozen, prompt.scale):
            return told | first, None
        negative = prompt.negative if frozen.kind.conditioning == "caption" else None
        return told | first, condition(frozen, encoders, negative, size, prompt.scale) | first

    def _draw(
        self, prompt: Prompt, told: dict[str, Tensor], untold: dict[str, Tensor] | None
    ) -> Tensor:
        frozen = self.frozen
        shape = frozen.latent_shape(prompt.height, prompt.width)
        source = generator("preview", prompt.seed)
        x = torch.randn(1, *shape, generator=source).to(self.device)
        more = [generator("preview noise", prompt.seed)]
        drawn = draw_images(
            frozen,
            x,
            told,
            untold,
            steps=prompt.steps,
            scale=prompt.scale,
            sampler=sampler_of(prompt.sampler or self.sampler, self.flow),
            generators=more,
        )
        return strip(drawn[0])
