"""The layers of each family: names, widths and paths of their outputs, in the order of the model.

Layers whose output reaches no image token are left out: what the last block computes for the text
stream. So are the last norms (`norm_out`), whose scale and shift change places between the namings.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from dmp_common.bases.outputs import Layer, attention_layers, fused, under

_QKV = ("to_q", "to_k", "to_v")
_ADDED = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")


def _inside(module: str) -> tuple[str, ...]:
    return tuple(f"{module}.{part}" for part in _QKV)


def _modulation(name: str, width: int, diffusers: str, ldm: str) -> Layer:
    return Layer(name, width, diffusers, ldm, kind="modulation")


def dit_layers(depth: int, width: int) -> Iterator[Layer]:
    """Yields the layers of a DiT."""
    block = [
        _modulation("mod", 6 * width, "norm1.linear", "adaLN_modulation.1"),
        *attention_layers(width, _inside("attn1"), "attn.qkv"),
        Layer("to_out", width, "attn1.to_out.0", "attn.proj"),
        Layer("ff.in", 4 * width, "ff.net.0.proj", "mlp.fc1"),
        Layer("ff.out", width, "ff.net.2", "mlp.fc2"),
    ]
    for n in range(depth):
        yield from under(block, f"block.{n}", f"transformer_blocks.{n}", f"blocks.{n}")


def pixart_layers(depth: int, width: int) -> Iterator[Layer]:
    """Yields the layers of PixArt: one modulation layer for all blocks."""
    cross = (("to_k", width, "attn2.to_k"), ("to_v", width, "attn2.to_v"))
    block = [
        *(
            layer._replace(name=f"attn1.{layer.name}")
            for layer in (
                *attention_layers(width, _inside("attn1"), "attn.qkv"),
                Layer("to_out", width, "attn1.to_out.0", "attn.proj"),
            )
        ),
        *(
            layer._replace(name=f"attn2.{layer.name}")
            for layer in (
                Layer("to_q", width, "attn2.to_q", "cross_attn.q_linear"),
                *fused("cross_attn.kv_linear", cross),
                Layer("to_out", width, "attn2.to_out.0", "cross_attn.proj"),
            )
        ),
        Layer("ff.in", 4 * width, "ff.net.0.proj", "mlp.fc1"),
        Layer("ff.out", width, "ff.net.2", "mlp.fc2"),
    ]
    yield _modulation("mod", 6 * width, "adaln_single.linear", "t_block.1")
    for n in range(depth):
        yield from under(block, f"block.{n}", f"transformer_blocks.{n}", f"blocks.{n}")


def sd3_layers(depth: int, width: int, dual: int) -> Iterator[Layer]:
    """Yields the layers of Stable Diffusion 3.

    Args:
        dual: how many blocks, from the first, attend twice.
    """
    for n in range(depth):
        yield from under(
            _sd3_block(width, dual=n < dual, last=n == depth - 1),
            f"joint.{n}",
            f"transformer_blocks.{n}",
            f"joint_blocks.{n}",
        )


def _sd3_block(width: int, dual: bool, last: bool) -> Iterator[Layer]:
    text = "context_block"
    modulation = "adaLN_modulation.1"
    parts = 9 if dual else 6
    added = list(attention_layers(width, _ADDED, f"{text}.attn.qkv"))
    yield _modulation("mod", parts * width, "norm1.linear", f"x_block.{modulation}")
    if not last:
        yield _modulation("text.mod", 6 * width, "norm1_context.linear", f"{text}.{modulation}")
    yield from attention_layers(width, _inside("attn"), "x_block.attn.qkv")
    for layer in added[last:]:  # the last block's queries of the text reach no image token
        yield layer._replace(name=f"text.{layer.name}")
    yield Layer("to_out", width, "attn.to_out.0", "x_block.attn.proj")
    if dual:
        for layer in (
            *attention_layers(width, _inside("attn2"), "x_block.attn2.qkv"),
            Layer("to_out", width, "attn2.to_out.0", "x_block.attn2.proj"),
        ):
            yield layer._replace(name=f"attn2.{layer.name}")
    yield Layer("ff.in", 4 * width, "ff.net.0.proj", "x_block.mlp.fc1")
    yield Layer("ff.out", width, "ff.net.2", "x_block.mlp.fc2")
    if not last:
        yield Layer("text.to_out", width, "attn.to_add_out", f"{text}.attn.proj")
        yield Layer("text.ff.in", 4 * width, "ff_context.net.0.proj", f"{text}.mlp.fc1")
        yield Layer("text.ff.out", width, "ff_context.net.2", f"{text}.mlp.fc2")


def flux_layers(double: int, single: int, width: int) -> Iterator[Layer]:
    """Yields the layers of FLUX.1."""
    pair = [
        _modulation("mod", 6 * width, "norm1.linear", "img_mod.lin"),
        _modulation("text.mod", 6 * width, "norm1_context.linear", "txt_mod.lin"),
        *_flux_pair(width, 4 * width, ("net.0.proj", "net.2")),
    ]
    parts = (
        *zip(_QKV, [width] * 3, _inside("attn"), strict=True),
        ("ff.in", 4 * width, "proj_mlp"),
    )
    alone = [
        _modulation("mod", 3 * width, "norm.linear", "modulation.lin"),
        *fused("linear1", parts),
        Layer("to_out", width, "proj_out", "linear2"),  # of attention and feed-forward together
    ]
    return _flux_blocks(pair, double, alone, single)


def flux2_layers(double: int, single: int, width: int) -> Iterator[Layer]:
    """Yields the layers of FLUX.2: one modulation layer for all blocks of a kind.

    Its feed-forward has a gate, so the first layer is twice as wide as its three widths.
    """
    hidden = 2 * 3 * width
    for name, parts, kind in (
        ("double.mod", 6, "double_stream_modulation_img"),
        ("double.text.mod", 6, "double_stream_modulation_txt"),
        ("single.mod", 3, "single_stream_modulation"),
    ):
        yield _modulation(name, parts * width, f"{kind}.linear", f"{kind}.lin")
    pair = list(_flux_pair(width, hidden, ("linear_in", "linear_out")))
    alone = [
        Layer("qkv_ff.in", 3 * width + hidden, "attn.to_qkv_mlp_proj", "linear1"),
        Layer("to_out", width, "attn.to_out", "linear2"),
    ]
    yield from _flux_blocks(pair, double, alone, single)


def _flux_pair(width: int, hidden: int, feed: tuple[str, str]) -> Iterator[Layer]:
    """Yields the linear layers of a double block.

    Args:
        hidden: channels of the feed-forward's first layer.
        feed: paths of the feed-forward's two layers in diffusers.
    """
    yield from attention_layers(width, _inside("attn"), "img_attn.qkv")
    for layer in attention_layers(width, _ADDED, "txt_attn.qkv"):
        yield layer._replace(name=f"text.{layer.name}")
    yield Layer("to_out", width, "attn.to_out.0", "img_attn.proj")
    yield Layer("ff.in", hidden, f"ff.{feed[0]}", "img_mlp.0")
    yield Layer("ff.out", width, f"ff.{feed[1]}", "img_mlp.2")
    yield Layer("text.to_out", width, "attn.to_add_out", "txt_attn.proj")
    yield Layer("text.ff.in", hidden, f"ff_context.{feed[0]}", "txt_mlp.0")
    yield Layer("text.ff.out", width, f"ff_context.{feed[1]}", "txt_mlp.2")


def _flux_blocks(
    pair: Iterable[Layer], double: int, alone: Iterable[Layer], single: int
) -> Iterator[Layer]:
    for n in range(double):
        yield from under(pair, f"double.{n}", f"transformer_blocks.{n}", f"double_blocks.{n}")
    for n in range(single):
        here = f"single_transformer_blocks.{n}"
        yield from under(alone, f"single.{n}", here, f"single_blocks.{n}")


def qwen_layers(depth: int, width: int) -> Iterator[Layer]:
    """Yields the layers of Qwen-Image, which have the same paths in both namings."""
    dead = {"text.to_q", "text.to_out", "text.ff.in", "text.ff.out"}  # in the last block
    block = [
        ("mod", 6 * width, "img_mod.1"),
        ("text.mod", 6 * width, "txt_mod.1"),
        *((part, width, f"attn.{part}") for part in _QKV),
        *((f"text.{part}", width, path) for part, path in zip(_QKV, _ADDED, strict=True)),
        ("to_out", width, "attn.to_out.0"),
        ("text.to_out", width, "attn.to_add_out"),
        ("ff.in", 4 * width, "img_mlp.net.0.proj"),
        ("ff.out", width, "img_mlp.net.2"),
        ("text.ff.in", 4 * width, "txt_mlp.net.0.proj"),
        ("text.ff.out", width, "txt_mlp.net.2"),
    ]
    for n in range(depth):
        for name, channels, path in block:
            if n < depth - 1 or name not in dead:
                place = f"transformer_blocks.{n}.{path}"
                kind = _modulation if name.endswith("mod") else Layer
                yield kind(f"block.{n}.{name}", channels, place, place)


def lumina2_layers(depth: int, width: int, keys: int, refiners: int) -> Iterator[Layer]:
    """Yields the layers of Lumina 2.

    Args:
        keys: channels of the keys and of the values.
        refiners: blocks that see the text alone, and as many that see the picture alone.
    """
    modulation = _modulation("mod", 4 * width, "norm1.linear", "adaLN_modulation.1")
    feed = ("feed_forward.linear_1", "feed_forward.linear_2", "feed_forward.linear_3")
    block = list(_next_block(width, keys, 4 * width, "attn", feed))
    return _next_blocks(modulation, block, depth, refiners)


def z_image_layers(depth: int, width: int, refiners: int) -> Iterator[Layer]:
    """Yields the layers of Z-Image.

    Args:
        refiners: blocks that see the text alone, and as many that see the picture alone.
    """
    path = "adaLN_modulation.0"
    modulation = _modulation("mod", 4 * width, path, path)
    feed = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    block = list(_next_block(width, width, int(width / 3 * 8), "attention", feed))
    return _next_blocks(modulation, block, depth, refiners)


def _next_block(
    width: int, keys: int, hidden: int, attention: str, feed: tuple[str, str, str]
) -> Iterator[Layer]:
    """Yields the linear layers of a block of Lumina 2 or Z-Image, whose feed-forward has a gate."""
    yield from attention_layers(width, _inside(attention), "attention.qkv", keys)
    yield Layer("to_out", width, f"{attention}.to_out.0", "attention.out")
    yield Layer("ff.in", hidden, feed[0], "feed_forward.w1")
    yield Layer("ff.gate", hidden, feed[2], "feed_forward.w3")
    yield Layer("ff.out", width, feed[1], "feed_forward.w2")


def _next_blocks(
    modulation: Layer, block: Sequence[Layer], depth: int, refiners: int
) -> Iterator[Layer]:
    for n in range(refiners):
        yield from under(block, f"text.{n}", f"context_refiner.{n}", f"context_refiner.{n}")
    whole = (modulation, *block)
    for n in range(refiners):
        yield from under(whole, f"noise.{n}", f"noise_refiner.{n}", f"noise_refiner.{n}")
    for n in range(depth):
        yield from under(whole, f"layer.{n}", f"layers.{n}", f"layers.{n}")
