"""The node Flux KV Cache, which keeps what the model makes of references in its first step."""

from __future__ import annotations

import pytest

from dmp_common import PatchError


@pytest.fixture
def cached(comfyui_path):
    """Puts the node on a model."""
    import comfy_extras.nodes_flux

    node = getattr(comfy_extras.nodes_flux, "FluxKVCache", None)
    if node is None:
        pytest.skip("this release of ComfyUI has no Flux KV Cache")
    return lambda model: node.execute(model).args[0]


@pytest.fixture
def draw(real, run):
    """Draws a picture from a reference, with it at timestep 0, as the node wants."""
    family = real.FAMILIES["flux2"]
    told = {
        "reference_latents": [real.noise(9, 1, family.channels, 4, 8)],
        "reference_latents_method": "index_timestep_zero",
    }
    return lambda model: run.sample(model, family, cfg=1.0, **told)


def test_an_adding_patch_acts_where_the_references_are_kept(real, run, host, cached, draw):
    """Their tokens leave the sequence then. The node itself changes the picture a little."""
    family = real.FAMILIES["flux2"]
    plain, patch = family.comfy(), run.record(family.patch(sites="all"))
    expected, without = draw(host.attach(plain, patch)), draw(plain)
    found = draw(host.attach(cached(plain), patch))
    assert (found - expected).norm() < 0.1 * (expected - without).norm()
    assert (found - expected).norm() > 0


def test_a_modulating_patch_is_refused_there(real, run, host, cached, draw):
    family = real.FAMILIES["flux2"]
    patch = run.record(family.patch(mix="modulate", sites="modulated"))
    draw(host.attach(family.comfy(), patch))
    with pytest.raises(PatchError, match="without Flux KV Cache for this patch"):
        draw(host.attach(cached(family.comfy()), patch))
