"""Reference pictures of Krea 2 in ComfyUI's own class."""

from __future__ import annotations

import pytest
import torch

pytestmark = [pytest.mark.host, pytest.mark.filterwarnings("ignore")]


def test_the_gate_does_not_see_the_timestep_of_the_references(real, run, host):
    """One method embeds timestep 0 after that of the items; the other embeds one timestep."""
    family = real.FAMILIES.get("krea2") or pytest.skip("needs a ComfyUI that knows it")
    patch = family.patch(sites=["block.0"], std=0.2)
    patcher = host.attach(family.comfy(), run.record(patch))
    reference = real.noise(9, 1, family.channels, *family.frames, 4, 8)
    block, seen = patcher.model.diffusion_model.blocks[0], []
    handle = block.register_forward_hook(lambda module, args, out: seen.append(args[0].clone()))
    for method in ("index", "index_timestep_zero"):
        sigmas = torch.tensor([0.5])
        run.call(patcher, family, sigmas, ref_latents=[reference], ref_latents_method=method)
    handle.remove()
    assert torch.equal(*seen)
