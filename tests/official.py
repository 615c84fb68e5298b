"""Checkpoints as the official DMP code writes them, of a small DiT."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

from dmp_common import Base, bases, register_base

DEPTH, WIDTH, SIDE, SIZE = 4, 24, 4, 2  # a DiT for latents of 8 x 8
COUNT = SIDE * SIDE
BASE = register_base(
    bases.dit("convert-dit", depth=DEPTH, width=WIDTH, patch_size=SIZE, frequency_shift=1.0)
)
# Two bases that only the patch size tells apart, as in the real table.
TWINS = [
    register_base(bases.dit(f"convert-dit/{size}", depth=3, width=40, patch_size=size))
    for size in (2, 4)
]


def official(
    blocks: int = DEPTH, count: int = COUNT, gate: bool = True, base: Base = BASE, side: int = SIDE
) -> dict[str, Tensor]:
    """A state dict as the official DiT's, with random values."""
    draw = torch.Generator().manual_seed(0)
    width, size = base.sites[0].width, base.sites[0].stride

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    state = OrderedDict(
        {
            "pos_embed": values(1, side * side, width),
            "prompt_embeddings": values(blocks, count, width),
            "x_embedder.proj.weight": values(width, 4, size, size),
            "t_embedder.mlp.0.weight": values(width, 256),
            "y_embedder.embedding_table.weight": values(11, width),
        }
    )
    for block in range(len(base.sites)):
        state[f"blocks.{block}.attn.qkv.weight"] = values(3 * width, width)
    if gate:
        state["gate.weight"] = values(count, width + 1)
        state["gate.bias"] = values(count)
        state["w_noise"] = values(width, count)
    return state


def learned(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Only what the prompts and the gate are, without the DiT's weights."""
    return {name: value for name, value in state.items() if name.startswith(("prompt", "gate"))}


def config(**options: object) -> dict[str, object]:
    """The part of the official configuration that says how prompts are used; its defaults."""
    usual = {
        "num_tokens": COUNT,
        "topk": 1.0,
        "type": "add",
        "uncond": False,
        "init_type": "zero",
        "gate_type": "linear",
        "pt_depth": DEPTH,
    }
    return {"models": {"name": "DiT-of-a-test/2", "vp": {**usual, **options}}}


def checkpoint(state: dict[str, Tensor], **options: object) -> dict[str, object]:
    """A checkpoint as the official trainer saves it, with its configuration as plain data."""
    return {"model": state, "config": config(**options)}


def save(path: Path, contents: object) -> Path:
    torch.save(contents, path)
    return path
