"""Lets the exact model draw pictures; keeps the states on the way and its predictions there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.sample
import comfy.samplers
import torch
from torch import Tensor

from comfyui_dmp.model import timesteps_of
from comfyui_dmp.predictions import as_output
from comfyui_dmp.states import States
from dmp_common import Base
from dmp_common.patch.objectives import guided, strength_of_guidance


@dataclass(frozen=True)
class Aim:
    """What the cheap model shall predict.

    Args:
        guidance: the guidance scale of the exact call; None where it is not guided.
        dial: whether all scales from 1 to that one are learned, so that the patch's strength
            stands for them.
        cfg: the scale with which pictures are drawn where the exact call is not guided.
    """

    guidance: float | None
    dial: bool
    cfg: float


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn.

    Args:
        sampler, scheduler: ComfyUI's names.
        steps: the least number of steps; it is drawn up to twice as many, so that the states have
            more noise levels.
        seed: of noise, steps and scales.
    """

    sampler: str
    scheduler: str
    steps: int
    seed: int

    def source(self, run: int) -> torch.Generator:
        """The random generator of a run."""
        return torch.Generator().manual_seed((self.seed + 7919 * run) % 2**63)

    def steps_of(self, run: int) -> int:
        """The number of steps of a run."""
        return int(torch.randint(self.steps, 2 * self.steps + 1, (), generator=self.source(run)))


# Told the number of calls done, and the denoised latent of the last one.
Seen = Callable[[Tensor], None]


class Teacher(comfy.samplers.CFGGuider):  # type: ignore[misc]
    """A guider of ComfyUI that keeps what it sees.

    Args:
        model: ComfyUI's `ModelPatcher` of the exact model.
        base: its base.
        aim: what is kept.
        number: of the positive conditioning.
        scales: the guidance scale of each picture (B,); None where the exact call is not guided.
        seen: is called after each call of the model.
    """

    def __init__(
        self, model: Any, base: Base, aim: Aim, number: int, scales: Tensor | None, seen: Seen
    ) -> None:
        super().__init__(model)
        self._base, self._aim, self._number = base, aim, number
        self._scales, self._seen = scales, seen
        self.kept: list[States] = []

    def predict_noise(
        self, x: Tensor, timestep: Tensor, model_options: Any = None, seed: int | None = None
    ) -> Tensor:
        """Returns the denoised latent that the sampler goes on with, and keeps the state."""
        aim, negative = self._aim, self.conds.get("negative")
        conds = [self.conds["positive"], *([] if negative is None else [negative])]
        found = comfy.samplers.calc_cond_batch(
            self.inner_model, conds, x, timestep, model_options or {}
        )
        if aim.guidance is not None:
            assert self._scales is not None
            walked = guided(found[0], found[1], self._scales.to(x.device))
            self._keep(x, timestep, walked, self._number)
        else:
            self._keep(x, timestep, found[0], self._number)
            walked = found[0]
            if negative is not None:
                # A repaired model is called on both sides of guidance.
                self._keep(x, timestep, found[1], 0)
                walked = guided(found[0], found[1], aim.cfg)
        self._seen(walked)
        return walked

    def _keep(self, x: Tensor, sigmas: Tensor, denoised: Tensor, number: int) -> None:
        sampling = self.inner_model.model_sampling
        x, denoised, sigmas = x.float(), denoised.float(), sigmas.float()
        strengths = None
        if self._aim.dial:
            assert self._aim.guidance is not None
            assert self._scales is not None
            found = strength_of_guidance(self._scales, self._aim.guidance)
            assert isinstance(found, Tensor)
            strengths = found.cpu()
        self.kept.append(
            States(
                x.cpu().clone(),
                sigmas.cpu().clone(),
                timesteps_of(sampling, self._base, sigmas).cpu(),
                as_output(sampling, denoised, x, sigmas).cpu(),
                torch.full((len(x),), number),
                strengths,
            )
        )


def draw(
    model: Any,
    base: Base,
    aim: Aim,
    how: Drawing,
    positive: Any,
    negative: Any | None,
    number: int,
    run: int,
    shape: tuple[int, ...],
    seen: Seen,
) -> tuple[list[States], Tensor, Tensor]:
    """Draws pictures of one conditioning.

    Args:
        positive, negative: ComfyUI's conditionings.
        number: of the positive one; the negative one is number 0.
        run: the number of this drawing, which its random draws depend on.
        shape: of the latents (B, C, ..., h, w).
        seen: is called after each call of the model with the denoised latents.

    Returns:
        The states, the noise, and the finished latents.
    """
    source = how.source(run)
    steps = how.steps_of(run)
    noise = torch.randn(shape, generator=source)
    scales = None
    if aim.guidance is not None:
        scales = torch.full((shape[0],), aim.guidance)
        if aim.dial:
            scales = 1 + (aim.guidance - 1) * torch.rand(shape[0], generator=source)
    guider = Teacher(model, base, aim, number, scales, seen)
    conds = {"positive": positive} | ({} if negative is None else {"negative": negative})
    guider.inner_set_conds(conds)
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, how.scheduler, steps)
    latents = guider.sample(
        noise,
        torch.zeros(shape),
        comfy.samplers.sampler_object(how.sampler),
        sigmas,
        disable_pbar=True,
        seed=how.seed,
    )
    return guider.kept, noise, latents.cpu()
