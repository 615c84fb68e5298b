"""A/B previews: what the base makes, what the trained model makes from equal noise, and how they
differ."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dmp_common import PatchError
from training.base.encoders import FrozenEncoders
from training.base.frozen import FrozenBase
from training.base.schedulers import is_flow
from training.data.draws import generator
from training.objective.pictures import comparison
from training.objective.sampling import condition, draw_images, is_guided
from training.options.config import TrainConfig

_OPTION = re.compile(r"\s--([a-z]+)\s+")
_CLASSES = 8  # previews of a base with classes, where no file says which


@dataclass(frozen=True)
class Prompt:
    """One line of a prompt file (kohya's format).

    Args:
        text: caption, or class id.
        negative: what the guidance leads away from.
        width, height: in pixels.
        seed: of the noise.
        steps: denoising steps.
        scale: of classifier-free guidance; for Flux the guidance told to the model.
    """

    text: str
    negative: str
    width: int
    height: int
    seed: int
    steps: int
    scale: float


def read_prompts(config: TrainConfig, frozen: FrozenBase) -> list[Prompt]:
    """The prompts of --sample_prompts; without a file, the first classes of a base with classes.

    Raises:
        PatchError: no file where captions are needed, or a line that is no prompt.
    """
    kind = frozen.kind
    if config.sample_prompts is None:
        if kind.conditioning == "caption":
            raise PatchError(
                "expected --sample_prompts, a text file with one prompt a line, for previews, "
                "found none: write one, or leave out the previews."
            )
        count = min(_CLASSES, kind.num_classes or 4)
        lines = [str(number) for number in range(count)]
    else:
        path = Path(config.sample_prompts)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PatchError(
                f"expected a text file with one prompt a line at {path}, found {error}: check "
                "--sample_prompts."
            ) from error
        lines = [line.strip() for line in text.splitlines()]
        lines = [line for line in lines if line and not line.startswith("#")]
        if not lines:
            raise PatchError(f"expected a prompt in {path}, found none: write one a line.")
    return [_parse(line, number, config, frozen) for number, line in enumerate(lines)]


def _parse(line: str, number: int, config: TrainConfig, frozen: FrozenBase) -> Prompt:
    kind = frozen.kind
    side = int(str(config.resolution).split(",")[0]) if config.resolution else kind.resolution
    text, *rest = _OPTION.split(line)
    given = dict(zip(rest[::2], rest[1::2], strict=True))
    try:
        prompt = Prompt(
            text=text.strip(),
            negative=given.pop("n", "").strip(),
            width=int(given.pop("w", side)),
            height=int(given.pop("h", side)),
            seed=int(given.pop("d", config.seed + number)),
            steps=int(given.pop("s", config.sample_steps)),
            scale=float(given.pop("l", given.pop("g", frozen.family.guidance))),
        )
        if kind.conditioning == "label":
            label = int(prompt.text)
            if not 0 <= label < (kind.num_classes or 0):
                raise ValueError(f"class {label} of {kind.num_classes}")
        if kind.square and prompt.width != prompt.height:
            raise ValueError(f"{prompt.width} x {prompt.height}; this base takes squares only")
        if min(prompt.width, prompt.height, prompt.steps) < 1 or given:
            raise ValueError(f"--{next(iter(given))}" if given else "a size or number below 1")
    except ValueError as error:
        what = "a class id" if kind.conditioning == "label" else "a prompt"
        raise PatchError(
            f"expected {what} with --n --w --h --d --s --l in --sample_prompts, found {line!r} "
            f"({error}): correct the line."
        ) from error
    step = frozen.factor * 2
    return Prompt(
        **{
            **vars(prompt),
            "width": max(step, prompt.width // step * step),
            "height": max(step, prompt.height // step * step),
        }
    )


# kohya's names of samplers, by ours; those that need a noise of their own each step are left out.
_SAMPLERS = {
    None: "default", "ddim": "ddim", "euler": "euler", "k_euler": "euler",
    "dpmsolver": "dpm++", "dpmsolver++": "dpm++", "dpmsingle": "dpm++",
}  # fmt: skip


def sampler_of(name: str | None, flow: bool) -> str:
    """The sampler of previews for kohya's name of it.

    Raises:
        PatchError: a sampler that previews do not have.
    """
    if flow:
        return "default"  # Euler
    if name not in _SAMPLERS:
        known = ", ".join(str(entry) for entry in _SAMPLERS if entry)
        raise PatchError(
            f"expected --sample_sampler out of {known}, found {name}: choose one of these, or "
            "leave it out for ddim."
        )
    return _SAMPLERS[name]


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
        self.sampler = sampler_of(config.sample_sampler, is_flow(frozen.scheduler))
        self.prompts = read_prompts(config, frozen)
        self.told = [self._told(prompt, encoders) for prompt in self.prompts]
        self.base: list[Tensor] = []

    def draw(self, stop: Callable[[], None] = lambda: None) -> list[Tensor]:
        """One picture (C, H, W) in [-1, 1] for each prompt, from the model as it is now."""
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
        if not is_guided(frozen, prompt.scale):
            return told, None
        negative = prompt.negative if frozen.kind.conditioning == "caption" else None
        return told, condition(frozen, encoders, negative, size, prompt.scale)

    def _draw(
        self, prompt: Prompt, told: dict[str, Tensor], untold: dict[str, Tensor] | None
    ) -> Tensor:
        frozen = self.frozen
        height, width = (side // frozen.factor for side in (prompt.height, prompt.width))
        source = generator("preview", prompt.seed)
        x = torch.randn(1, frozen.channels, height, width, generator=source).to(self.device)
        return draw_images(
            frozen, x, told, untold, steps=prompt.steps, scale=prompt.scale, sampler=self.sampler
        )[0]
