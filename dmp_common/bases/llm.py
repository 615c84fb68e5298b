"""Transformers whose captions come from a language model: Qwen-Image, Lumina 2, Z-Image."""

from __future__ import annotations

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
    Probe,
    TimeSource,
    grid_cells,
    map_latent,
)
from dmp_common.bases.layers import lumina2_layers, qwen_layers, z_image_layers
from dmp_common.bases.outputs import output_sets, output_sites
from dmp_common.bases.transformer import block_sites, depth_probes, latent_with_references
from dmp_common.errors import PatchError

_HIDDEN = Argument("hidden_states", 0)

# ComfyUI has one class for Lumina 2 and Z-Image. It is given sigma, and inverts it itself.
_NEXT_TIME = TimeSource("t_embedder", Argument("timesteps", 1), "t_embedder.mlp", scale=1000.0)


def _next_probes(depth: int, width: int, embedding: int) -> tuple[Probe, ...]:
    return (
        Probe("x_embedder", "out_features", width),
        Probe("t_embedder.mlp.2", "out_features", embedding),
        Probe("cap_embedder", None, True),
        Probe("clip_text_pooled_proj", None, False),  # NewBie, of another depth and gate
        *depth_probes("layers", depth),
    )


def packed_latent(base: Base, call: ModelCall, denoiser: nn.Module) -> Latent:
    """Returns the latents of diffusers' Qwen-Image, packed 2 x 2.

    `img_shapes` has (frames, rows, columns) of each item, or for each item a list of these, with
    those of reference pictures after the latent's own.
    """
    sample, shapes = call.get(_HIDDEN), call.get(Argument("img_shapes", 4))
    while not isinstance(shapes[0], int):
        shapes = shapes[0]
    return Latent(len(sample), (2 * shapes[1], 2 * shapes[2]), image_tokens=sample.shape[1])


def qwen_host_latent(base: Base, call: ModelCall, denoiser: nn.Module) -> Latent:
    """Returns the latents of ComfyUI's Qwen-Image, which pads to whole tokens."""
    return latent_with_references(base, call, Argument("ref_latents", 4), denoiser)


def masked_latent(base: Base, call: ModelCall, denoiser: nn.Module) -> Latent:
    """Returns the latents of diffusers' Lumina 2: each item's image tokens follow its own caption.

    `encoder_attention_mask` (B, L) masks the captions; its sums are their lengths.
    """
    latent = map_latent(base, call.get(_HIDDEN))
    mask: Tensor = call.get(Argument("encoder_attention_mask", 3))
    lengths = tuple(int(length) for length in mask.sum(dim=1).tolist())
    text = lengths if len(set(lengths)) > 1 else lengths[0]
    return Latent(latent.batch, latent.size, text_tokens=text)


def listed_latent(base: Base, call: ModelCall, denoiser: nn.Module) -> Latent:
    """Returns the latents of diffusers' Z-Image: a list of (C, 1, H, W), whose tokens come first.

    Raises:
        PatchError: latents of different sizes in one batch, or of several frames.
    """
    sample = call.get(Argument("x", 0))
    shapes = [tuple(item.shape) if isinstance(item, Tensor) else type(item) for item in sample]
    first = shapes[0]
    if not isinstance(first, tuple) or len(first) != 4 or first[1] != 1 or len(set(shapes)) > 1:
        found = ", ".join(str(shape) for shape in dict.fromkeys(shapes))
        raise PatchError(
            f"expected latents of one size (C, 1, H, W) in a batch of base {base.name}, found "
            f"{found}: give pictures of different sizes, or with references, in calls of their own."
        )
    return Latent(len(sample), (first[2], first[3]), text_tokens=0)


def next_latent(base: Base, call: ModelCall, denoiser: nn.Module) -> Latent:
    """Returns the latents of ComfyUI's Lumina 2 and Z-Image.

    Z-Image's `pad_tokens_multiple` fills the image tokens up to whole multiples; it is None for
    Lumina 2.
    """
    latent = map_latent(base, call.get(Argument("x", 0)))
    multiple = getattr(denoiser, "pad_tokens_multiple", None)
    if not isinstance(multiple, int):
        return latent
    stride = base.sites[0].stride
    rows, columns = (grid_cells(side + stride - 1, stride) for side in latent.size)
    tokens = -(-rows * columns // multiple) * multiple
    return Latent(latent.batch, latent.size, image_tokens=tokens)


@dataclass(frozen=True)
class QwenImage:
    """Describes Qwen-Image and Qwen-Image-Edit in a row of the table.

    The latent is packed 2 x 2; text has a stream of its own. ComfyUI names the parts as diffusers
    does; how positions are embedded tells them apart. The layered sibling, which makes several
    pictures in one sequence, is no model of this base.
    """

    name: str
    depth: int
    width: int
    hub_id: str | None = None

    def base(self) -> Base:
        """Returns the base of these numbers."""
        time = "time_text_embed.timestep_embedder"
        layers = partial(qwen_layers, self.depth, self.width)
        probes = (
            Probe("img_in", "out_features", self.width),
            Probe("txt_norm", None, True),
            Probe(time, None, True),
            Probe("time_text_embed.addition_t_embedding", None, False),
            *depth_probes("transformer_blocks", self.depth),
        )
        return Base(
            name=self.name,
            sites=block_sites(
                "block",
                self.depth,
                self.width,
                2,
                diffusers="transformer_blocks",
                ldm="transformer_blocks",
                ldm_argument=Argument("hidden_states", 0),
            ),
            layout="tokens",
            embedding=self.width,
            sinusoid=256,
            times={
                "diffusers": TimeSource(
                    time, Argument("timestep", 3), time, "time_text_embed.time_proj", scale=1000.0
                ),
                "ldm": TimeSource(time, Argument("timestep", 1), time, scale=1000.0),
            },
            probes={
                "diffusers": (*probes, Probe("pe_embedder", None, False)),
                "ldm": (*probes, Probe("pos_embed", None, False)),
            },
            prediction="flow",
            guided="calls",
            latent={"diffusers": packed_latent, "ldm": qwen_host_latent},
            architecture="qwen-image",
            hub_id=self.hub_id,
            outputs=partial(output_sites, layers),
            output_sets=partial(output_sets, layers),
        )


def qwen_image(name: str, **facts: Any) -> Base:
    """Returns the base of a row `QwenImage(name, ...)`, for models that are not in the table."""
    return QwenImage(name, **facts).base()


@dataclass(frozen=True)
class Lumina2:
    """Describes Lumina-Image 2.0 (Neta Lumina too) in a row of the table.

    The naming "ldm" is the original code's. Its time runs from 0 (noise) to 1 (picture), and the
    sinusoid is of that. Text and image tokens share a sequence, text first.

    Args:
        keys: channels of the keys, and of the values. None means a third of the width.
        refiners: blocks that see the text alone, and as many that see the picture alone.
    """

    name: str
    depth: int
    width: int
    hub_id: str | None = None
    keys: int | None = None
    refiners: int = 2

    def base(self) -> Base:
        """Returns the base of these numbers."""
        time, embedding = "time_caption_embed.timestep_embedder", min(self.width, 1024)
        keys = self.keys or self.width // 3
        layers = partial(lumina2_layers, self.depth, self.width, keys, self.refiners)
        return Base(
            name=self.name,
            sites=block_sites("layer", self.depth, self.width, 2, diffusers="layers", ldm="layers"),
            layout="tokens",
            embedding=embedding,
            sinusoid=256,
            times={
                "diffusers": TimeSource(
                    time,
                    Argument("timestep", 1),
                    time,
                    "time_caption_embed.time_proj",
                    scale=1000.0,
                    inverted=True,
                ),
                "ldm": _NEXT_TIME,
            },
            probes={
                "diffusers": (
                    Probe("x_embedder", "out_features", self.width),
                    Probe(time, None, True),
                    *depth_probes("layers", self.depth),
                ),
                "ldm": _next_probes(self.depth, self.width, embedding),
            },
            prediction="flow",
            guided="calls",
            inverted=True,
            sinusoid_scale=0.001,
            shared=True,
            latent={"diffusers": masked_latent, "ldm": next_latent},
            architecture="lumina-2",
            hub_id=self.hub_id,
            outputs=partial(output_sites, layers),
            output_sets=partial(output_sets, layers),
        )


def lumina2(name: str, **facts: Any) -> Base:
    """Returns the base of a row `Lumina2(name, ...)`, for models that are not in the table."""
    return Lumina2(name, **facts).base()


@dataclass(frozen=True)
class ZImage:
    """Describes Z-Image in a row of the table.

    The naming "ldm" is ComfyUI's; diffusers kept the original code's names. Its time runs from
    noise to picture. Text and image tokens share a sequence, each filled up to multiples of 32:
    the image first in diffusers, the text first in ComfyUI.

    Args:
        refiners: blocks that see the text alone, and as many that see the picture alone.
    """

    name: str
    depth: int
    width: int
    hub_id: str | None = None
    refiners: int = 2

    def base(self) -> Base:
        """Returns the base of these numbers."""
        embedding = min(self.width, 256)
        layers = partial(z_image_layers, self.depth, self.width, self.refiners)
        return Base(
            name=self.name,
            sites=block_sites(
                "layer",
                self.depth,
                self.width,
                2,
                diffusers="layers",
                diffusers_argument=Argument("x", 0),
                ldm="layers",
            ),
            layout="tokens",
            embedding=embedding,
            sinusoid=256,
            times={
                "diffusers": TimeSource(
                    "t_embedder", Argument("t", 1), "t_embedder.mlp", scale=1000.0, inverted=True
                ),
                "ldm": _NEXT_TIME,
            },
            probes={
                "diffusers": (
                    Probe("all_x_embedder.2-1", "out_features", self.width),
                    Probe("siglip_embedder", None, False),  # Omni, which takes references
                    *depth_probes("layers", self.depth),
                ),
                "ldm": _next_probes(self.depth, self.width, embedding),
            },
            prediction="flow",
            guided="conditional first",
            inverted=True,
            time_hidden=1024,
            shared=True,
            latent={"diffusers": listed_latent, "ldm": next_latent},
            architecture="z-image",
            hub_id=self.hub_id,
            outputs=partial(output_sites, layers),
            output_sets=partial(output_sets, layers),
        )


def z_image(name: str, **facts: Any) -> Base:
    """Returns the base of a row `ZImage(name, ...)`, for models that are not in the table."""
    return ZImage(name, **facts).base()
