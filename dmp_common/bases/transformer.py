"""Transformers that take the latent as a map: DiT, PixArt, Stable Diffusion 3."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn as nn
from torch import Tensor

from dmp_common.bases.base import (
    Argument,
    Base,
    Latent,
    ModelCall,
    Naming,
    Probe,
    Site,
    TimeSource,
    map_latent,
)
from dmp_common.bases.layers import dit_layers, pixart_layers, sd3_layers
from dmp_common.bases.outputs import output_sets, output_sites

_X = Argument("x", 0)
_HIDDEN = Argument("hidden_states", 0)


def block_sites(
    prefix: str,
    count: int,
    width: int,
    stride: int,
    *,
    diffusers: str,
    ldm: str | None,
    diffusers_argument: Argument = _HIDDEN,
    ldm_argument: Argument = _X,
) -> tuple[Site, ...]:
    """Returns the sites of a list of equal blocks: the input of each block.

    Args:
        prefix: names of the sites are `prefix.0`, `prefix.1` and so on.
        count, width, stride: number of blocks, and width and stride of every site.
        diffusers, ldm: path of the list of blocks in each naming; None where a naming is unknown.
        diffusers_argument, ldm_argument: the argument of a block that carries the image tokens.
    """
    lists: dict[Naming, str] = {"diffusers": diffusers}
    arguments: dict[Naming, Argument] = {"diffusers": diffusers_argument}
    if ldm is not None:
        lists["ldm"], arguments["ldm"] = ldm, ldm_argument
    return tuple(
        Site(
            f"{prefix}.{n}",
            width,
            stride,
            paths={naming: f"{path}.{n}" for naming, path in lists.items()},
            arguments=arguments,
        )
        for n in range(count)
    )


def _plain_sites(depth: int, width: int, stride: int) -> tuple[Site, ...]:
    """Returns the sites of DiT and PixArt, whose lists of blocks have the same names."""
    blocks = "transformer_blocks"
    return block_sites("block", depth, width, stride, diffusers=blocks, ldm="blocks")


def depth_probes(path: str, count: int) -> tuple[Probe, Probe]:
    """Returns probes for exactly `count` blocks in the list at a path."""
    return Probe(f"{path}.{count - 1}", None, True), Probe(f"{path}.{count}", None, False)


def latent_with_references(
    base: Base, call: ModelCall, references: Argument | None, denoiser: nn.Module
) -> Latent:
    """Returns the latents of a host's call whose model pads maps to whole tokens.

    Args:
        references: the argument with a list of reference pictures (B, C, H, W), whose tokens
            follow those of the latent; None where the model takes none.
        denoiser: the model; see `host_references`.
    """
    latent = map_latent(base, call.get(_X))
    pictures = [] if references is None else call.get(references) or host_references(denoiser)
    sizes = [latent.size, *((picture.shape[-2], picture.shape[-1]) for picture in pictures)]
    stride = base.sites[0].stride
    cells = [tuple(-(-side // stride) for side in size) for size in sizes]
    return Latent(
        latent.batch,
        (stride * cells[0][0], stride * cells[0][1]),
        image_tokens=sum(rows * columns for rows, columns in cells),
    )


def host_references(denoiser: nn.Module) -> list[Tensor]:
    """Returns the reference pictures that a model reads past its arguments.

    Forge Neo keeps them in an object `dynamic_args`, which the modules of those models import that
    look there.
    """
    held = getattr(sys.modules.get(type(denoiser).__module__), "dynamic_args", None)
    pictures: list[Tensor] = getattr(held, "ref_latents", None) or []
    return pictures


@dataclass(frozen=True)
class DiT:
    """Describes a class-conditional DiT (Peebles and Xie 2023) in a row of the table.

    The naming "ldm" is the original code's. The original time embedding has frequency shift 0;
    diffusers builds its DiT with 1.
    """

    name: str
    depth: int
    width: int
    patch_size: int
    in_channels: int = 4
    frequency_shift: float = 0.0
    grid: tuple[int, int] = (16, 16)
    architecture: str = ""
    hub_id: str | None = None

    def base(self) -> Base:
        """Returns the base of these numbers."""
        emb, kernel = "transformer_blocks.0.norm1.emb", (self.patch_size, self.patch_size)
        layers = partial(dit_layers, self.depth, self.width)
        return Base(
            name=self.name,
            sites=_plain_sites(self.depth, self.width, self.patch_size),
            layout="tokens",
            embedding=self.width,
            sinusoid=256,
            times={
                "diffusers": TimeSource(
                    emb,
                    Argument("timestep", 1),
                    f"{emb}.timestep_embedder",
                    f"{emb}.time_proj",
                    inside=True,
                    labels=f"{emb}.class_embedder",
                ),
                "ldm": TimeSource(
                    "t_embedder", Argument("t", 1), "t_embedder.mlp", labels="y_embedder"
                ),
            },
            probes={
                "diffusers": (
                    Probe("pos_embed.proj", "out_channels", self.width),
                    Probe("pos_embed.proj", "in_channels", self.in_channels),
                    Probe("pos_embed.proj", "kernel_size", kernel),
                    Probe(f"{emb}.class_embedder", None, True),
                    *depth_probes("transformer_blocks", self.depth),
                ),
                "ldm": (
                    Probe("x_embedder.proj", "out_channels", self.width),
                    Probe("x_embedder.proj", "in_channels", self.in_channels),
                    Probe("x_embedder.proj", "kernel_size", kernel),
                    Probe("y_embedder.embedding_table", None, True),
                    *depth_probes("blocks", self.depth),
                ),
            },
            frequency_shift=self.frequency_shift,
            grid=self.grid,
            labels=Argument("class_labels", 2),
            architecture=self.architecture or "diffusion-transformer",
            hub_id=self.hub_id,
            outputs=partial(output_sites, layers),
            output_sets=partial(output_sets, layers),
        )


def dit(name: str, **facts: Any) -> Base:
    """Returns the base of a row `DiT(name, ...)`, for models that are not in the table."""
    return DiT(name, **facts).base()


@dataclass(frozen=True)
class PixArt:
    """Describes PixArt-alpha and PixArt-Sigma, of the same blocks, in a row of the table."""

    name: str
    depth: int
    width: int
    patch_size: int = 2
    hub_id: str | None = None

    def base(self) -> Base:
        """Returns the base of these numbers."""
        layers = partial(pixart_layers, self.depth, self.width)
        return Base(
            name=self.name,
            sites=_plain_sites(self.depth, self.width, self.patch_size),
            layout="tokens",
            embedding=self.width,
            sinusoid=256,
            times={
                "diffusers": TimeSource(
                    "adaln_single.emb.timestep_embedder",
                    Argument("timestep", 2),
                    "adaln_single.emb.timestep_embedder",
                    "adaln_single.emb.time_proj",
                ),
                "ldm": TimeSource("t_embedder", Argument("timesteps", 1), "t_embedder.mlp"),
            },
            probes={
                "diffusers": (
                    Probe("pos_embed.proj", "out_channels", self.width),
                    Probe("pos_embed.proj", "kernel_size", (self.patch_size, self.patch_size)),
                    Probe("adaln_single.emb.timestep_embedder", None, True),
                    Probe("caption_projection", None, True),
                    *depth_probes("transformer_blocks", self.depth),
                ),
                "ldm": (
                    Probe("x_embedder.proj", "out_channels", self.width),
                    Probe("x_embedder.proj", "kernel_size", (self.patch_size, self.patch_size)),
                    Probe("y_embedder.y_proj", None, True),
                    Probe("t_block", None, True),
                    *depth_probes("blocks", self.depth),
                ),
            },
            architecture="pixart",
            hub_id=self.hub_id,
            outputs=partial(output_sites, layers),
            output_sets=partial(output_sets, layers),
        )


def pixart(name: str, **facts: Any) -> Base:
    """Returns the base of a row `PixArt(name, ...)`, for models that are not in the table."""
    return PixArt(name, **facts).base()


@dataclass(frozen=True)
class SD3:
    """Describes Stable Diffusion 3 or 3.5 in a row of the table.

    Args:
        dual: the first blocks attend twice, which only 3.5 medium's do.
        dual_blocks: how many blocks attend twice, if any.
    """

    name: str
    depth: int
    width: int
    dual: bool
    patch_size: int = 2
    hub_id: str | None = None
    dual_blocks: int = 13

    def base(self) -> Base:
        """Returns the base of these numbers."""
        layers = partial(sd3_layers, self.depth, self.width, self.dual_blocks * self.dual)
        return Base(
            name=self.name,
            sites=block_sites(
                "joint",
                self.depth,
                self.width,
                self.patch_size,
                diffusers="transformer_blocks",
                ldm="joint_blocks",
                ldm_argument=Argument("x", 1),
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
                ),
                "ldm": TimeSource("t_embedder", Argument("timesteps", 1), "t_embedder.mlp"),
            },
            probes={
                "diffusers": (
                    Probe("pos_embed.proj", "out_channels", self.width),
                    Probe("time_text_embed.timestep_embedder", None, True),
                    Probe("transformer_blocks.0.attn2", None, self.dual),
                    *depth_probes("transformer_blocks", self.depth),
                ),
                "ldm": (
                    Probe("x_embedder.proj", "out_channels", self.width),
                    Probe("joint_blocks.0.x_block.attn2", None, self.dual),
                    *depth_probes("joint_blocks", self.depth),
                ),
            },
            prediction="flow",
            architecture="stable-diffusion-3",
            hub_id=self.hub_id,
            outputs=partial(output_sites, layers),
            output_sets=partial(output_sets, layers),
        )


def sd3(name: str, **facts: Any) -> Base:
    """Returns the base of a row `SD3(name, ...)`, for models that are not in the table."""
    return SD3(name, **facts).base()
