"""FLUX: double blocks, where text has a stream of its own, then single blocks after the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn as nn

from dmp_common.bases.base import Argument, Base, Latent, ModelCall, Probe, TimeSource
from dmp_common.bases.transformer import block_sites, depth_probes, latent_with_references

_HIDDEN, _IDS = Argument("hidden_states", 0), Argument("img_ids", 4)


def packed_latent(base: Base, call: ModelCall, denoiser: nn.Module) -> Latent:
    """The latents of diffusers' FLUX: one token for each square of `stride` x `stride` cells.

    The position ids (L, 3) or (B, L, 3) begin with (picture, row, column). Tokens of reference
    pictures follow the latent's own; the first id of the latent's own is 0.
    """
    sample, ids = call.get(_HIDDEN), call.get(_IDS)
    ids = ids.reshape(-1, ids.shape[-1])
    own = ids[ids[:, 0] == 0]
    rows, columns = (int(own[:, axis].max()) + 1 for axis in (1, 2))
    stride = base.sites[0].stride
    return Latent(len(sample), (stride * rows, stride * columns), image_tokens=sample.shape[1])


def host_latent(base: Base, call: ModelCall, denoiser: nn.Module) -> Latent:
    """The latents of ComfyUI's and Forge's FLUX, which pad to whole tokens."""
    return latent_with_references(base, call, Argument("ref_latents", 5))


@dataclass(frozen=True)
class Flux:
    """A row of the table: FLUX.1 (dev, schnell). The latent is packed 2 x 2."""

    name: str
    double: int
    single: int
    width: int
    hub_id: str | None = None

    def base(self) -> Base:
        """The base of these numbers."""
        return Base(
            name=self.name,
            sites=(
                *block_sites(
                    "double",
                    self.double,
                    self.width,
                    2,
                    diffusers="transformer_blocks",
                    ldm="double_blocks",
                    ldm_argument=Argument("img", 0),
                ),
                *block_sites(
                    "single",
                    self.single,
                    self.width,
                    2,
                    diffusers="single_transformer_blocks",
                    ldm="single_blocks",
                ),
            ),
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
                    *depth_probes("transformer_blocks", self.double),
                    *depth_probes("single_transformer_blocks", self.single),
                ),
                "ldm": (
                    Probe("img_in", "out_features", self.width),
                    Probe("time_in", None, True),
                    *depth_probes("double_blocks", self.double),
                    *depth_probes("single_blocks", self.single),
                ),
            },
            prediction="flow",
            latent={"diffusers": packed_latent, "ldm": host_latent},
            shared=True,
            architecture="flux-1",
            hub_id=self.hub_id,
        )


def flux(name: str, **facts: Any) -> Base:
    """The base of a row `Flux(name, ...)`, for models that are not in the table."""
    return Flux(name, **facts).base()
