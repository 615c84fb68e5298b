"""FLUX: text has a stream of its own in the double blocks, and comes first in the single ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch.nn as nn
from torch.utils.weak import WeakTensorKeyDictionary

from dmp_common.bases.base import (
    NAMINGS,
    Argument,
    Base,
    Latent,
    ModelCall,
    Naming,
    Probe,
    Site,
    TimeSource,
)
from dmp_common.bases.layers import flux2_layers, flux_layers
from dmp_common.bases.outputs import output_sets, output_sites
from dmp_common.bases.transformer import block_sites, depth_probes, latent_with_references
from dmp_common.compat import is_compiling

# The two lists of blocks.
_DOUBLE: dict[Naming, str] = {"diffusers": "transformer_blocks", "ldm": "double_blocks"}
_SINGLE: dict[Naming, str] = {"diffusers": "single_transformer_blocks", "ldm": "single_blocks"}
# Of Flux2KleinKVPipeline, whose calls have other tokens and another output with it.
_CACHE_MODE = Argument("kv_cache_mode", 9, needed=True)
# Version, rows and columns of position ids. Reading them makes the processor wait for the GPU, and
# pipelines give the same tensor at every step.
_GRIDS = WeakTensorKeyDictionary()


def packed_latent(base: Base, call: ModelCall, denoiser: nn.Module) -> Latent:
    """Returns the latents of diffusers' FLUX.1."""
    return tokens_latent(base, call, Argument("img_ids", 4))


def packed_latent_2(base: Base, call: ModelCall, denoiser: nn.Module) -> Latent:
    """Returns the latents of diffusers' FLUX.2.

    While it fills its cache of reference pictures, their tokens come before the latent's own.
    """
    latent = tokens_latent(base, call, Argument("img_ids", 3))
    if call.get(_CACHE_MODE) == "extract":
        return replace(latent, image_tokens=None)
    return latent


def tokens_latent(base: Base, call: ModelCall, argument: Argument) -> Latent:
    """Returns the latents of tokens (B, L, D) with position ids, one for each `stride` x `stride`
    cells.

    Args:
        argument: the position ids (L, n) or (B, L, n), which begin with (picture, row, column).
            The latent's own tokens have picture 0; those of reference pictures follow.
    """
    sample, ids = call.get(Argument("hidden_states", 0)), call.get(argument)
    kept = not is_compiling() and ids.device.type != "cpu" and not ids.is_inference()
    known = _GRIDS[ids] if kept and ids in _GRIDS else None
    if known is None or known[0] != ids._version:
        own = ids.detach().cpu().reshape(-1, ids.shape[-1])
        own = own[own[:, 0] == 0]
        known = 0, int(own[:, 1].max()) + 1, int(own[:, 2].max()) + 1
        if kept:
            known = _GRIDS[ids] = ids._version, *known[1:]
    _, rows, columns = known
    stride = base.sites[0].stride
    return Latent(len(sample), (stride * rows, stride * columns), image_tokens=sample.shape[1])


def host_latent(base: Base, call: ModelCall, denoiser: nn.Module) -> Latent:
    """Returns the latents of ComfyUI's and Forge's FLUX, which pad to whole tokens."""
    return latent_with_references(base, call, Argument("ref_latents", 5), denoiser)


@dataclass(frozen=True)
class Flux:
    """Describes FLUX.1 (dev, schnell), whose latent is packed 2 x 2, in a row of the table."""

    name: str
    double: int
    single: int
    width: int
    hub_id: str | None = None

    def base(self) -> Base:
        """Returns the base of these numbers."""
        layers = partial(flux_layers, self.double, self.single, self.width)
        depths = stream_depths(self.double, self.single)
        return Base(
            name=self.name,
            sites=stream_sites(self.double, self.single, self.width, stride=2),
            layout="tokens",
            embedding=self.width,
            sinusoid=256,
            times={
                "diffusers": TimeSource(
                    "time_text_embed.timestep_embedder",
                    Argument("timestep", 3),
                    "time_text_embed.timestep_embedder",
                    "time_text_embed.time_proj",
                    scale=1000.0,
                ),
                "ldm": TimeSource("time_in", Argument("timestep", 1), "time_in", scale=1000.0),
            },
            probes={
                "diffusers": (
                    Probe("x_embedder", "out_features", self.width),
                    Probe("time_text_embed.timestep_embedder", None, True),
                    *depths["diffusers"],
                ),
                "ldm": (
                    Probe("img_in", "out_features", self.width),
                    Probe("time_in", None, True),
                    Probe("double_stream_modulation_img", None, False),
                    *depths["ldm"],
                ),
            },
            prediction="flow",
            guided="calls",
            latent={"diffusers": packed_latent, "ldm": host_latent},
            shared=True,
            architecture="flux-1",
            hub_id=self.hub_id,
            outputs=partial(output_sites, layers),
            output_sets=partial(output_sets, layers),
        )


def flux(name: str, **facts: Any) -> Base:
    """Returns the base of a row `Flux(name, ...)`, for models that are not in the table."""
    return Flux(name, **facts).base()


@dataclass(frozen=True)
class Flux2:
    """Describes FLUX.2 (dev, klein) in a row of the table.

    Its latent is the VAE's, packed 2 x 2 before the model sees it: a token is one cell. The two
    layers of its time embedding have no biases.
    """

    name: str
    double: int
    single: int
    width: int
    hub_id: str | None = None

    def base(self) -> Base:
        """Returns the base of these numbers."""
        time = "time_guidance_embed.timestep_embedder"
        layers = partial(flux2_layers, self.double, self.single, self.width)
        depths = stream_depths(self.double, self.single)
        return Base(
            name=self.name,
            sites=stream_sites(self.double, self.single, self.width, stride=1),
            layout="tokens",
            embedding=self.width,
            sinusoid=256,
            times={
                "diffusers": TimeSource(
                    time,
                    Argument("timestep", 2),
                    time,
                    "time_guidance_embed.time_proj",
                    scale=1000.0,
                ),
                "ldm": TimeSource("time_in", Argument("timestep", 1), "time_in", scale=1000.0),
            },
            probes={
                "diffusers": (
                    Probe("x_embedder", "out_features", self.width),
                    Probe(time, None, True),
                    *depths["diffusers"],
                ),
                "ldm": (
                    Probe("img_in", "out_features", self.width),
                    Probe("time_in", None, True),
                    Probe("double_stream_modulation_img", None, True),
                    *depths["ldm"],
                ),
            },
            prediction="flow",
            guided="calls",
            latent={"diffusers": packed_latent_2, "ldm": host_latent},
            shared=True,
            time_bias=False,
            kept=(_CACHE_MODE,),
            architecture="flux-2",
            hub_id=self.hub_id,
            outputs=partial(output_sites, layers),
            output_sets=partial(output_sets, layers),
        )


def stream_sites(double: int, single: int, width: int, stride: int) -> tuple[Site, ...]:
    """Returns the inputs of the double blocks, then those of the single blocks."""
    places = partial(block_sites, width=width, stride=stride)
    image = Argument("img", 0)
    blocks, ldm = _DOUBLE["diffusers"], _DOUBLE["ldm"]
    singles, ldm_singles = _SINGLE["diffusers"], _SINGLE["ldm"]
    return (
        *places("double", double, diffusers=blocks, ldm=ldm, ldm_argument=image),
        *places("single", single, diffusers=singles, ldm=ldm_singles),
    )


def stream_depths(double: int, single: int) -> dict[Naming, tuple[Probe, ...]]:
    """Returns for each naming the probes for the numbers of double and single blocks."""
    return {
        naming: (*depth_probes(_DOUBLE[naming], double), *depth_probes(_SINGLE[naming], single))
        for naming in NAMINGS
    }
