"""The layers of the Stable Diffusion UNets: names, widths and paths of their outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dmp_common.bases.outputs import Layer, under


@dataclass(frozen=True)
class UnetLayers:
    """Lists the layers of a UNet when it is called.

    Args:
        widths: channels of the levels.
        attention: which levels have attention blocks.
        layers: residual blocks of an encoder level; a decoder level has one more.
        transformers: transformer blocks of an attention, for each level; the middle has as many as
            the last level.
        linear: the attention blocks' first and last layers are linear, not convolutions.
    """

    widths: Sequence[int]
    attention: Sequence[bool]
    layers: int
    transformers: Sequence[int]
    linear: bool

    def __call__(self) -> Iterator[Layer]:
        """Yields the layers in the order of the model."""
        yield from self._encoder()
        yield from self._middle()
        yield from self._decoder()

    def _encoder(self) -> Iterator[Layer]:
        stream, block = self.widths[0], 1
        for level, width in enumerate(self.widths):
            here = f"down_blocks.{level}"
            for n in range(self.layers):
                ldm = f"input_blocks.{block}"
                yield from under(
                    _resnet(width, stream != width),
                    f"in.{block}",
                    f"{here}.resnets.{n}",
                    f"{ldm}.0",
                )
                if self.attention[level]:
                    yield from self._attention(
                        level, f"in.{block}", f"{here}.attentions.{n}", f"{ldm}.1"
                    )
                stream, block = width, block + 1
            if level < len(self.widths) - 1:
                yield _convolution(
                    f"in.{block}.down",
                    width,
                    f"{here}.downsamplers.0.conv",
                    f"input_blocks.{block}.0.op",
                )
                block += 1

    def _middle(self) -> Iterator[Layer]:
        width = self.widths[-1]
        yield from under(_resnet(width, False), "mid.0", "mid_block.resnets.0", "middle_block.0")
        yield from self._attention(-1, "mid", "mid_block.attentions.0", "middle_block.1")
        yield from under(_resnet(width, False), "mid.1", "mid_block.resnets.1", "middle_block.2")

    def _decoder(self) -> Iterator[Layer]:
        block = 0
        for up, level in enumerate(reversed(range(len(self.widths)))):
            width, here = self.widths[level], f"up_blocks.{up}"
            for n in range(self.layers + 1):
                ldm = f"output_blocks.{block}"
                yield from under(  # the skip connection always needs a shortcut
                    _resnet(width, True), f"out.{block}", f"{here}.resnets.{n}", f"{ldm}.0"
                )
                if self.attention[level]:
                    yield from self._attention(
                        level, f"out.{block}", f"{here}.attentions.{n}", f"{ldm}.1"
                    )
                block += 1
            if level > 0:
                yield _convolution(
                    f"out.{block - 1}.up",
                    width,
                    f"{here}.upsamplers.0.conv",
                    f"output_blocks.{block - 1}.{2 if self.attention[level] else 1}.conv",
                )

    def _attention(self, level: int, name: str, diffusers: str, ldm: str) -> Iterator[Layer]:
        width, kind = self.widths[level], "linear" if self.linear else "convolution"
        ends = {
            part: Layer(part, width, part, part, kind=kind)  # type: ignore[arg-type]
            for part in ("proj_in", "proj_out")
        }
        yield from under((ends["proj_in"],), f"{name}.attn", diffusers, ldm)
        for n in range(self.transformers[level]):
            block = f"transformer_blocks.{n}"
            yield from under(
                _transformer(width), f"{name}.attn.{n}", f"{diffusers}.{block}", f"{ldm}.{block}"
            )
        yield from under((ends["proj_out"],), f"{name}.attn", diffusers, ldm)


def _convolution(name: str, width: int, diffusers: str, ldm: str) -> Layer:
    return Layer(name, width, diffusers, ldm, kind="convolution")


def _resnet(width: int, shortcut: bool) -> Iterator[Layer]:
    yield _convolution("conv1", width, "conv1", "in_layers.2")
    yield Layer("time", width, "time_emb_proj", "emb_layers.1", kind="modulation")
    yield _convolution("conv2", width, "conv2", "out_layers.3")
    if shortcut:
        yield _convolution("shortcut", width, "conv_shortcut", "skip_connection")


def _transformer(width: int) -> Iterator[Layer]:
    for attention in ("attn1", "attn2"):
        for part in ("to_q", "to_k", "to_v", "to_out"):
            path = f"{attention}.{part}" + ".0" * (part == "to_out")
            yield Layer(f"{attention}.{part}", width, path, path)
    # The first layer computes the values and their gates.
    yield Layer("ff.in", 8 * width, "ff.net.0.proj", "ff.net.0.proj")
    yield Layer("ff.out", width, "ff.net.2", "ff.net.2")
