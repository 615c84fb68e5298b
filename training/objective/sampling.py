"""Images drawn from a base, or from a base with what was trained on it; for every family."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin
from torch import Tensor

from dmp_common import PatchError, attached
from training.base.encoders import FrozenEncoders
from training.base.families.family import Family
from training.base.frozen import FrozenBase
from training.base.schedulers import is_flow, token_count, token_side
from training.data.draws import generator

# Samplers of diffusers for discrete schedules; flow models take Euler.
SAMPLERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "dpm++_single": "DPMSolverSinglestepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
_NOISY = ("DDPMScheduler", "EulerAncestralDiscreteScheduler")
Given = Mapping[str, Tensor]
# The model's whole output (B, C or 2C, H, W) for noisy data, a timestep () and a condition.
Predict = Callable[[Tensor, Tensor, Given], Tensor]


def make_sampler(
    scheduler: SchedulerMixin,
    steps: int,
    tokens: int,
    name: str = "default",
    family: Family | None = None,
) -> SchedulerMixin:
    """A sampler on the schedule of a base, its timesteps set: deterministic DDIM, or Euler for
    flow models, if no other is asked for.

    Args:
        scheduler: the base's.
        steps: at most as many as the schedule has.
        tokens: how many a picture has, for flow models that shift by it.
        name: default, or a name in `SAMPLERS`.
        family: of the base; a flow model then takes the noise levels of its pipeline.

    Raises:
        PatchError: a sampler that is unknown, or not for flow models.
    """
    require_sampler(name, is_flow(scheduler))
    if is_flow(scheduler):
        sampler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
        levels = (family or Family("transformer", "")).levels
        sampler.set_timesteps(**levels(sampler, steps, tokens))
        return sampler
    settings = dict(scheduler.config)
    if name != "ddpm":
        # DPM-Solver would take three channels of an output with variances, whatever C is.
        settings.pop("variance_type", None)
    sampler = getattr(diffusers, SAMPLERS["ddim" if name == "default" else name]).from_config(
        settings
    )
    if scheduler.config.get("rescale_betas_zero_snr"):
        # The last timestep must be seen: only there the schedule is pure noise.
        sampler.register_to_config(timestep_spacing="trailing")
    sampler.set_timesteps(min(steps, sampler.config.num_train_timesteps))
    return sampler


def require_sampler(name: str, flow: bool, option: str = "--sampler") -> None:
    """Refuses a sampler that is unknown, or not for flow models.

    Args:
        name: default, or a name in `SAMPLERS`.
        flow: whether the base is a flow model.
        option: that names it, for the error.

    Raises:
        PatchError: it is one of these.
    """
    if name not in ("default", *SAMPLERS):
        raise PatchError(
            f"expected a sampler out of default, {', '.join(SAMPLERS)} with {option}, found "
            f"{name!r}: choose one."
        )
    if flow and name not in ("default", "euler"):
        raise PatchError(
            f"expected sampler euler for a flow model, found {name}: leave out {option}."
        )


def denoise(
    predict: Predict,
    sampler: SchedulerMixin,
    noise: Tensor,
    conditional: Given,
    unconditional: Given | None,
    scale: float,
    generators: Sequence[torch.Generator] = (),
    guided: int | None = None,
) -> Tensor:
    """All steps from noise (B, C, H, W) to what the model makes of it, float32.

    Args:
        sampler: a scheduler of diffusers whose timesteps are set.
        conditional: the condition of each item, tensors (B, ...) by name.
        unconditional: what stands for no condition; None without guidance.
        scale: w in uncond + w (cond - uncond).
        generators: one for each item, for samplers that add noise.
        guided: only this many first channels are guided, the others are the condition's alone;
            None guides all of them. The official code of DiT and DMP guides three of four.

    Raises:
        PatchError: there are fewer channels than are to be guided.

    Source: Ho and Salimans 2022 (guidance); facebookresearch/DiT, models.py, forward_with_cfg.
    """
    channels = noise.shape[1]
    if guided is not None and guided > channels:
        raise PatchError(
            f"expected at most as many guided channels as the model has, {channels}, found "
            f"{guided}: lower --guided_channels."
        )
    x = noise * getattr(sampler, "init_noise_sigma", 1.0)
    stochastic = type(sampler).__name__ in _NOISY
    learned = isinstance(sampler, diffusers.DDPMScheduler) and str(
        sampler.config.variance_type
    ).startswith("learned")
    more: dict[str, Any] = {"generator": list(generators)} if stochastic and generators else {}
    for step in sampler.timesteps:
        scaled = sampler.scale_model_input(x, step) if _scales(sampler) else x
        output = predict(scaled, step, conditional).float()
        prediction = output[:, :channels]
        if unconditional is not None:
            other = predict(scaled, step, unconditional)[:, :channels].float()
            mixed = other + scale * (prediction - other)
            prediction = torch.cat([mixed[:, :guided], prediction[:, guided or channels :]], dim=1)
        if learned:  # the variance is the condition's, as in the official code of DiT
            prediction = torch.cat([prediction, output[:, channels:]], dim=1)
        x = sampler.step(prediction, step, x, **more).prev_sample
    return x


def _scales(sampler: SchedulerMixin) -> bool:
    return hasattr(sampler, "scale_model_input")


def draw_latents(
    frozen: FrozenBase,
    noise: Tensor,
    conditional: Given,
    unconditional: Given | None,
    *,
    steps: int,
    scale: float,
    sampler: str = "default",
    generators: Sequence[torch.Generator] = (),
    guided: int | None = None,
) -> Tensor:
    """Samples (B, C, h, w) in the model's space, float32 on its device, from noise there; of videos
    (B, C, T, h, w).

    Args:
        frozen: the base, with whatever is on it.
        noise: of the shape of the samples, on the model's device.
        conditional, unconditional: the conditions of the B samples, see `denoise`.
        guided: the number of channels that are guided, see `denoise`.
    """
    dtype = frozen.dtype
    guiding = {
        each: each.conditional
        for each in attached(frozen.model)
        if each.patch.variant.guidance is not None
    }

    def predict(x: Tensor, step: Tensor, given: Given) -> Tensor:
        moved = {name: value.to(x.device) for name, value in given.items()}
        t = step.to(x.device).expand(len(x))
        for patch, told in guiding.items():  # the unconditional side stays plain, as in all hosts
            patch.conditional = _none if given is unconditional else told
        return frozen.family.predict(frozen.model, x.to(dtype), t, moved)

    tokens = token_count(noise.shape[2:], token_side(frozen.base))
    made = make_sampler(frozen.scheduler, steps, tokens, sampler, frozen.family)
    try:
        with torch.no_grad():
            x = denoise(predict, made, noise, conditional, unconditional, scale, generators, guided)
    finally:
        for patch, told in guiding.items():
            patch.conditional = told
    return frozen.family.whole(x, conditional)


def _none(items: int) -> Tensor:
    """No item is conditional, see `Attachment.conditional`."""
    return torch.zeros(items, dtype=torch.bool)


def draw_images(
    frozen: FrozenBase,
    noise: Tensor,
    conditional: Given,
    unconditional: Given | None,
    **how: Any,
) -> Tensor:
    """Pictures (B, C, H, W) in [-1, 1], float32 on the CPU; arguments as of `draw_latents`."""
    return frozen.decode(draw_latents(frozen, noise, conditional, unconditional, **how))


def noises(names: Sequence[object], shape: tuple[int, ...]) -> tuple[Tensor, list[torch.Generator]]:
    """Standard normal noise (B, *shape), and generators that go on from it, one for each name."""
    sources = [generator("sample", name) for name in names]
    return torch.stack([torch.randn(shape, generator=source) for source in sources]), sources


def is_guided(frozen: FrozenBase, scale: float) -> bool:
    """Whether a scale means a second call without condition; a model that takes the scale itself
    needs none.

    Raises:
        PatchError: a scale that is not 1 for weights that were distilled to draw without guidance,
            whose pipelines ignore it.
    """
    frozen.family.require_scale(scale, frozen.base.name)
    embedded = bool(getattr(frozen.model.config, "guidance_embeds", False))
    return scale != 1.0 and not embedded and frozen.kind.conditioning != "none"


def condition(
    frozen: FrozenBase,
    encoders: FrozenEncoders,
    text: str | None,
    size: tuple[int, int],
    scale: float,
) -> dict[str, Tensor]:
    """The condition of one picture, tensors (1, ...) by name.

    Args:
        text: caption or class id; None for no class (of captions "" means none).
        size: height and width in pixels.
        scale: of guidance, for models that take it as a condition.
    """
    height, width = size
    given = {
        "sizes": torch.tensor([[height, width, 0, 0, height, width]]),
        "guidance": torch.tensor([scale]),
    }
    if frozen.kind.conditioning == "caption":
        return {**given, **encoders.encode_text([text or ""])}
    labelled = frozen.kind.conditioning == "label" and text is not None
    label = int(text) if labelled and text is not None else frozen.null_label
    return {**given, "labels": torch.tensor([label])}
