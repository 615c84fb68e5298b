"""AuraFlow: text has a stream of its own in the first blocks, and comes first in the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch.nn as nn

from dmp_common.bases.base import Argument, Base, Latent, ModelCall, Probe, TimeSource
from dmp_common.bases.outputs import Layer, output_sets, output_sites, under
from dmp_common.bases.transformer import block_sites, depth_probes, latent_with_references

_DOUBLE, _SINGLE = "joint_transformer_blocks", "single_transformer_blocks"


def padded_latent(base: Base, call: ModelCall, denoiser: nn.Module) -> Latent:
    """Returns the latents of ComfyUI's AuraFlow, which pads to whole tokens."""
    return latent_with_references(base, call, None, denoiser)


def auraflow_layers(double: int, single: int, width: int) -> Iterator[Layer]:
    """Yields the layers of AuraFlow."""
    hidden = -(-(8 * width // 3) // 256) * 256  # of the feed-forward, which has a gate

    def stream(added: bool, number: int, feed: str) -> Iterator[Layer]:
        """Yields the layers of one stream of a block but for its modulation."""
        for part in "qkv":
            name = f"add_{part}_proj" if added else f"to_{part}"
            yield Layer(f"to_{part}", width, f"attn.{name}", f"attn.w{number}{part}")
        out = "to_add_out" if added else "to_out.0"
        yield Layer("to_out", width, f"attn.{out}", f"attn.w{number}o")
        ours = "ff_context" if added else "ff"
        yield Layer("ff.in", hidden, f"{ours}.linear_1", f"{feed}.c_fc1")
        yield Layer("ff.gate", hidden, f"{ours}.linear_2", f"{feed}.c_fc2")
        yield Layer("ff.out", width, f"{ours}.out_projection", f"{feed}.c_proj")

    def mod(name: str, diffusers: str, ldm: str) -> Layer:
        return Layer(name, 6 * width, f"{diffusers}.linear", f"{ldm}.1", kind="modulation")

    text = (layer._replace(name=f"text.{layer.name}") for layer in stream(True, 1, "mlpC"))
    mods = mod("mod", "norm1", "modX"), mod("text.mod", "norm1_context", "modC")
    pair = [*mods, *stream(False, 2, "mlpX"), *text]
    alone = [mod("mod", "norm1", "modCX"), *stream(False, 1, "mlp")]
    for n in range(double):
        yield from under(pair, f"double.{n}", f"{_DOUBLE}.{n}", f"double_layers.{n}")
    for n in range(single):
        yield from under(alone, f"single.{n}", f"{_SINGLE}.{n}", f"single_layers.{n}")


@dataclass(frozen=True)
class AuraFlow:
    """Describes AuraFlow (Pony V7 too) in a row of the table.

    Eight learned tokens come before those of the text; the image tokens come last.
    """

    name: str
    double: int
    single: int
    width: int
    hub_id: str | None = None

    def base(self) -> Base:
        """Returns the base of these numbers."""
        layers = partial(auraflow_layers, self.double, self.single, self.width)
        sites = partial(block_sites, width=self.width, stride=2)
        time = "time_step_proj"
        return Base(
            name=self.name,
            sites=(
                *sites(
                    "double",
                    self.double,
                    diffusers=_DOUBLE,
                    ldm="double_layers",
                    ldm_argument=Argument("x", 1),
                ),
                *sites(
                    "single",
                    self.single,
                    diffusers=_SINGLE,
                    ldm="single_layers",
                    ldm_argument=Argument("cx", 0),
                ),
            ),
            layout="tokens",
            embedding=self.width,
            sinusoid=256,
            times={
                "diffusers": TimeSource(
                    time, Argument("timestep", 2), time, "time_step_embed", scale=1000.0
                ),
                "ldm": TimeSource(
                    "t_embedder", Argument("timestep", 1), "t_embedder.mlp", scale=1000.0
                ),
            },
            probes={
                "diffusers": (
                    Probe("pos_embed.proj", "out_features", self.width),
                    Probe(time, None, True),
                    *depth_probes(_DOUBLE, self.double),
                    *depth_probes(_SINGLE, self.single),
                ),
                "ldm": (
                    Probe("init_x_linear", "out_features", self.width),
                    Probe("cond_seq_linear", None, True),
                    *depth_probes("double_layers", self.double),
                    *depth_probes("single_layers", self.single),
                ),
            },
            prediction="flow",
            shared=True,
            latent={"ldm": padded_latent},
            architecture="auraflow",
            hub_id=self.hub_id,
            outputs=partial(output_sites, layers),
            output_sets=partial(output_sets, layers),
        )
