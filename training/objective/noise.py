"""Random draws of the training itself, which depend on (seed, micro-step, position) alone.

So a resumed run draws what the uninterrupted one would have drawn, and two processes draw what
one draws for the same global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from training.data.draws import generator, word
from training.options.loss_options import LossOptions

Names = Sequence[tuple[object, ...]]
Shape = tuple[int, ...]  # of a sample: (C, H, W), or (C, T, H, W) of a video


@dataclass(frozen=True)
class Draws:
    """What B samples need.

    Args:
        noise: (B, C, H, W), standard normal until `shaped` makes the noise that is trained on.
        latent: (B, C, H, W), standard normal, for the VAE's distribution.
        u, z: (B,), uniform in [0, 1) and standard normal, for timesteps.
        constant: (B, C, 1, 1), standard normal, for a noise offset; None without.
        strength: (B, 1, 1, 1), of the noise offset; None without.
        coarse: (B, C, H, W), the noise of all coarser resolutions; None without.
        further: (B, C, H, W), normal, what perturbs the model's input; None without.
    """

    noise: Tensor
    latent: Tensor
    u: Tensor
    z: Tensor
    constant: Tensor | None = None
    strength: Tensor | None = None
    coarse: Tensor | None = None
    further: Tensor | None = None

    def to(self, device: torch.device) -> Draws:
        """The same draws on a device."""
        return self._mapped(lambda part: part.to(device))

    def rows(self, rows: list[int]) -> Draws:
        """The draws of some of the samples."""
        return self._mapped(lambda part: part[rows])

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Draws:
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {
            name: None if part is None else change(part) for name, part in parts.items()
        }
        return Draws(**changed)

    @property
    def entering(self) -> Tensor | None:
        """The noise (B, C, H, W) of the model's input, where it differs from the target's."""
        return None if self.further is None else self.noise + self.further


def draw(names: Names, shape: Shape, options: LossOptions | None = None) -> Draws:
    """Draws for B samples.

    What an option asks for comes from a generator of its own, so that it changes nothing else;
    only the noise offset is older than this rule, and stands before `latent`.

    Args:
        names: of each sample, what its draws depend on.
        shape: (C, H, W).
        options: of the noise; None for standard normal noise.
    """
    count = len(names)
    noise, latent = torch.empty(count, *shape), torch.empty(count, *shape)
    u, z = torch.empty(count), torch.empty(count)
    offset = options is not None and bool(options.noise_offset or options.adaptive_noise_scale)
    constant = torch.empty(count, shape[0], 1, 1)
    source = torch.Generator()
    for row, name in enumerate(names):
        source.manual_seed(word(*name))
        u[row].uniform_(generator=source)
        z[row].normal_(generator=source)
        noise[row].normal_(generator=source)
        if offset:
            constant[row].normal_(generator=source)
        latent[row].normal_(generator=source)
    draws = Draws(noise, latent, u, z)
    if options is None:
        return draws
    more: dict[str, Tensor] = {}
    if offset:
        more = {"constant": constant, "strength": _offset_strength(names, options)}
    if options.multires_noise_iterations:
        more["coarse"] = torch.stack([_coarse_noise(name, shape, options) for name in names])
    if options.ip_noise_gamma:
        more["further"] = torch.stack([_further_noise(name, shape, options) for name in names])
    return replace(draws, **more)


def held_out_draws(names: Names, shape: Shape) -> tuple[Tensor, Tensor]:
    """Noise (B, *shape) and u (B,) as `draw` gives them, without what only training needs."""
    noise, u = torch.empty(len(names), *shape), torch.empty(len(names))
    source, z = torch.Generator(), torch.empty(())
    for row, name in enumerate(names):
        source.manual_seed(word(*name))
        u[row].uniform_(generator=source)
        z.normal_(generator=source)
        noise[row].normal_(generator=source)
    return noise, u


def shaped(draws: Draws, clean: Tensor, options: LossOptions) -> Draws:
    """The draws with the noise that is trained on: with its offset and its coarser resolutions.

    Args:
        clean: (B, C, H, W) on the device of the draws; its channel means scale an adaptive offset.

    Sources: Guttenberg 2023 (noise offset); Whitaker 2023, "Multi-Resolution Noise for Diffusion
    Model Training". kohya's scripts divide noise of many resolutions by the deviation of the
    whole batch; here each sample is divided by its own, so that it depends on no other.
    """
    noise = draws.noise
    if draws.constant is not None and draws.strength is not None:
        strength = draws.strength
        if options.adaptive_noise_scale:
            means = clean.float().mean(dim=(2, 3), keepdim=True).abs()
            strength = (strength + options.adaptive_noise_scale * means).clamp(min=0)
        noise = noise + strength * draws.constant
    if draws.coarse is not None:
        noise = noise + draws.coarse
        noise = noise / noise.flatten(1).std(dim=1).reshape(-1, 1, 1, 1)
    return replace(draws, noise=noise, constant=None, strength=None, coarse=None)


def _offset_strength(names: Names, options: LossOptions) -> Tensor:
    """The strength of each sample's noise offset (B, 1, 1, 1), before adaptation."""
    if not options.noise_offset_random_strength:
        return torch.full((len(names), 1, 1, 1), options.noise_offset)
    drawn = [torch.rand(1, 1, 1, generator=generator(*name, "offset")) for name in names]
    return options.noise_offset * torch.stack(drawn)


def _coarse_noise(name: tuple[object, ...], shape: Shape, options: LossOptions) -> Tensor:
    """The sum (C, H, W) of noise at coarser and coarser resolutions, enlarged.

    The first has the full resolution, as in kohya's scripts; each further one is smaller by a
    factor between two and four, which is drawn anew.
    """
    source = generator(*name, "multires")
    channels, height, width = shape
    total = torch.zeros(1, *shape)
    for number in range(options.multires_noise_iterations):
        factor = (2 + 2 * float(torch.rand((), generator=source))) ** number
        size = max(1, int(height / factor)), max(1, int(width / factor))
        level = torch.randn(1, channels, *size, generator=source)
        enlarged = interpolate(level, (height, width), mode="bilinear", align_corners=False)
        total += options.multires_noise_discount**number * enlarged
        if 1 in size:
            break
    return total[0]


def _further_noise(name: tuple[object, ...], shape: Shape, options: LossOptions) -> Tensor:
    """What perturbs the model's input (C, H, W).

    Source: Ning et al. 2023, "Input Perturbation Reduces Exposure Bias in Diffusion Models".
    """
    source = generator(*name, "input perturbation")
    strength = options.ip_noise_gamma
    if options.ip_noise_gamma_random_strength:
        strength *= float(torch.rand((), generator=source))
    return strength * torch.randn(shape, generator=source)
