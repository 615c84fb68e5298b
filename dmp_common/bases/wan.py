"""Video transformers: Wan 2.1 and 2.2.

The gate sees the output of the two linear layers that the timestep's sinusoid goes through, a
function of the timestep alone. Wan 2.2 TI2V-5B takes a timestep for each token, because the first
frame of a video from a picture is clean: the gate then weights the prompts of each frame by the
frame's own timestep.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn as nn
from torch import Tensor

from dmp_common.bases.base import Argument, Base, Latent, ModelCall, Probe, TimeSource
from dmp_common.bases.outputs import Layer, output_sets, output_sites, under
from dmp_common.bases.transformer import block_sites, depth_probes
from dmp_common.errors import PatchError

FRAME_STRIDE = 4  # frames of a video over frames of its latent, of all VAEs of Wan
_PATCH = 2  # latent pixels per token, in each direction; frames are not joined
# What hosts put beside a video's own frames, by its place in the original model's signature.
_OTHERS = (Argument("time_dim_concat", 4), Argument("context_latents", 6))


def nearest_frames(count: int, stride: int = FRAME_STRIDE) -> int:
    """Returns the number of frames nearest to `count` that a video can have: one, and a multiple
    of the frames that the VAE makes one frame of.

    >>> nearest_frames(80)
    81
    """
    return max(round((count - 1) / stride), 0) * stride + 1


def video_latent(base: Base, call: ModelCall, denoiser: nn.Module) -> Latent:
    """Returns the latents of diffusers' Wan, which drops an incomplete token at the edge."""
    return _video(base, call.get(Argument("hidden_states", 0)), 0)


def host_latent(base: Base, call: ModelCall, denoiser: nn.Module) -> Latent:
    """Returns the latents of ComfyUI's Wan, which pads to whole tokens.

    Raises:
        PatchError: the call has references among its frames, which a patch would change too.
    """
    for argument in _OTHERS:
        if call.get(argument) is not None:
            raise PatchError(
                f"expected a call of base {base.name} with the frames of its video alone, found "
                f"references ({argument.name}) beside them: remove the node that gives the "
                "references, or the patch."
            )
    return _video(base, call.get(Argument("x", 0)), _PATCH - 1)


def _video(base: Base, sample: Any, pad: int) -> Latent:
    if not isinstance(sample, Tensor) or sample.dim() != 5:
        found = tuple(sample.shape) if isinstance(sample, Tensor) else type(sample).__name__
        raise PatchError(
            f"expected the latent of a video (B, C, F, H, W) in the call of a model of base "
            f"{base.name}, found {found}: give a picture as a video of one frame."
        )
    frames, rows, columns = sample.shape[2], *((side + pad) // _PATCH for side in sample.shape[3:])
    return Latent(
        len(sample),
        (_PATCH * rows, _PATCH * columns),
        image_tokens=frames * rows * columns,
        frames=frames,
    )


def wan_layers(depth: int, width: int, hidden: int, pictures: bool) -> Iterator[Layer]:
    """Yields the layers of Wan: one modulation layer for all blocks.

    Args:
        hidden: channels between the two layers of a block's feed-forward.
        pictures: whether blocks attend to an embedded picture besides the caption.
    """
    block = [
        *(
            Layer(f"{attention}.{name}", width, f"{attention}.{diffusers}", f"{original}.{ldm}")
            for attention, original in (("attn1", "self_attn"), ("attn2", "cross_attn"))
            for name, diffusers, ldm in (
                ("to_q", "to_q", "q"),
                ("to_k", "to_k", "k"),
                ("to_v", "to_v", "v"),
                ("to_out", "to_out.0", "o"),
            )
        ),
        *(
            Layer(f"attn2.text.{name}", width, f"attn2.{diffusers}", f"cross_attn.{ldm}")
            for name, diffusers, ldm in (
                ("picture_k", "add_k_proj", "k_img"),
                ("picture_v", "add_v_proj", "v_img"),
            )
            if pictures
        ),
        Layer("ff.in", hidden, "ffn.net.0.proj", "ffn.0"),
        Layer("ff.out", width, "ffn.net.2", "ffn.2"),
    ]
    modulation = "condition_embedder.time_proj", "time_projection.1"
    yield Layer("mod", 6 * width, *modulation, kind="modulation")
    for n in range(depth):
        yield from under(block, f"block.{n}", f"blocks.{n}", f"blocks.{n}")


@dataclass(frozen=True)
class Wan:
    """Describes a Wan 2.1 or 2.2 in a row of the table.

    Its sites are the inputs of the blocks, whose tokens are those of all frames, one frame after
    the other. The prompt grid lies on each frame.

    Args:
        hidden: channels between the two layers of a block's feed-forward.
        channels: of the input: the latent's, and those of a picture's latent and its mask.
        pictures: blocks attend to an embedded picture besides the caption (Wan 2.1).
        switch: see `Base.switch`; that of the experts' own pipeline.
    """

    name: str
    depth: int
    width: int
    hidden: int
    channels: int = 16
    pictures: bool = False
    switch: float | None = None
    hub_id: str | None = None

    def base(self) -> Base:
        """Returns the base of these numbers."""
        time = "condition_embedder.time_embedder"
        layers = partial(wan_layers, self.depth, self.width, self.hidden, self.pictures)
        patches = (
            Probe("patch_embedding", "out_channels", self.width),
            Probe("patch_embedding", "in_channels", self.channels),
            *depth_probes("blocks", self.depth),
        )
        return Base(
            name=self.name,
            sites=block_sites(
                "block", self.depth, self.width, _PATCH, diffusers="blocks", ldm="blocks"
            ),
            layout="tokens",
            embedding=self.width,
            sinusoid=256,
            times={
                "diffusers": TimeSource(
                    time, Argument("timestep", 1), time, "condition_embedder.timesteps_proj"
                ),
                "ldm": TimeSource("time_embedding", Argument("timestep", 1), "time_embedding"),
            },
            probes={
                "diffusers": (
                    *patches,
                    Probe(time, None, True),
                    Probe("condition_embedder.image_embedder", None, self.pictures),
                ),
                "ldm": (
                    *patches,
                    Probe("time_embedding.2", "out_features", self.width),
                    Probe("blocks.0.self_attn", None, True),
                    Probe("img_emb", None, self.pictures),
                ),
            },
            prediction="flow",
            guided="calls",
            latent={"diffusers": video_latent, "ldm": host_latent},
            architecture="wan",
            switch=self.switch,
            hub_id=self.hub_id,
            outputs=partial(output_sites, layers),
            output_sets=partial(output_sets, layers),
        )
