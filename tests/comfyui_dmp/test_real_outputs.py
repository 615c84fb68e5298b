"""Output sites in ComfyUI's real model classes: a site means the same as in diffusers."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from dmp_common.attach.modulation import parts_of
from dmp_common.bases.base import Base, Naming, find_module

pytestmark = [pytest.mark.host, pytest.mark.filterwarnings("ignore")]


def modulate(model: nn.Module, base: Base, naming: Naming) -> None:
    """Scales and shifts every output site by random values that its name decides."""

    known = {site.name: site for site in base.outputs}

    def hook_of(parts):
        def hook(module, args, out: Tensor) -> Tensor:
            out = out.clone()
            for name, start, _ in parts:
                site, seed = known[name], base.output_depths[name]
                generator = torch.Generator().manual_seed(seed)
                scale, shift = 0.2 * torch.randn(2, site.width, generator=generator)
                shape = [1] * out.dim()
                shape[site.axis] = site.width
                own = out.narrow(site.axis, start, site.width)
                own.mul_(1 + scale.view(shape)).add_(shift.view(shape))
            return out

        return hook

    for path, parts in parts_of(base.outputs, naming).items():
        find_module(model, path).register_forward_hook(hook_of(parts))


def test_every_output_is_the_same_in_diffusers(family, run):
    """So the order of channels in fused and modulation layers agrees between the namings."""
    patcher, twin = family.comfy(), family.diffusers()
    sampling, base = patcher.model.model_sampling, family.base
    sigmas = torch.tensor([float(sampling.percent_to_sigma(p)) for p in (0.3, 0.6)])
    x, text, pooled = family.inputs(2)
    levels = sigmas.reshape(-1, *[1] * (x.dim() - 1))
    x = x * levels.clamp(max=15)
    plain = run.call(patcher, family, sigmas)
    modulate(patcher.model.diffusion_model, base, "ldm")
    modulate(twin, base, "diffusers")
    ours = run.call(patcher, family, sigmas)
    timesteps = base.times["ldm"].timesteps(sampling.timestep(sigmas).float())
    arguments = family.call(sampling.calculate_input(sigmas, x), timesteps, text, pooled)
    with torch.inference_mode():
        out = family.run(twin, arguments)
    theirs = sampling.calculate_denoised(sigmas, family.unpack(out, tuple(x.shape[2:])), x)
    assert (ours - plain).norm() > 0.01 * plain.norm()
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()
