"""Sana in files: the transformer in its original naming, which resembles PixArt's, and Gemma 2."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dmp_common import PatchError
from tests.training import tinyfiles
from tests.training.base.test_separate_files import config_of
from tests.training.conftest import Folders
from tests.training.tinybases import TRAINED
from training.base.frozen import load_frozen

# Original names, by their parts in diffusers.
_PARTS = {
    "patch_embed": "x_embedder",
    "time_embed.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_embed.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_embed.linear": "t_block.1",
    "caption_projection.linear_": "y_embedder.y_proj.fc",
    "caption_norm": "attention_y_norm",
    "proj_out": "final_layer.linear",
    "transformer_blocks": "blocks",
    "attn1.to_out.0": "attn.proj",
    "attn2.to_out.0": "cross_attn.proj",
    "attn2.to_q": "cross_attn.q_linear",
    **{f"attn1.to_{part}": "attn.qkv" for part in "qkv"},
    **{f"attn2.to_{part}": "cross_attn.kv_linear" for part in "kv"},
    **{f"ff.conv_{part}": f"mlp.{part}_conv.conv" for part in ("inverted", "depth", "point")},
}


def original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under their original names, with the two that diffusers does not need."""
    order = ("to_q", "to_k", "to_v")  # of the parts of a joined projection
    found: dict[str, list[Tensor]] = {}
    for key in sorted(state, key=lambda key: [f".{part}." not in key for part in order]):
        name = f"final_layer.{key}" if key == "scale_shift_table" else key
        for part, other in _PARTS.items():
            name = name.replace(part, other)
        found.setdefault(name, []).append(state[key])
    joined = {name: torch.cat(parts) for name, parts in found.items()}
    return joined | {"pos_embed": torch.zeros(1), "y_embedder.y_embedding": torch.zeros(1)}


@pytest.mark.skipif("sana" not in TRAINED, reason="needs a diffusers that knows it")
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_parts_come_from_files(suffix: str, folders: Folders, tmp_path: Path) -> None:
    folder = folders("sana")
    model, text = (tinyfiles.weights_of(folder / p) for p in ("transformer", "text_encoder"))
    text = {key: value + 0.5 for key, value in text.items()}  # no others are read
    path = tmp_path / f"model{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": original(model)}, path)
    else:
        tinyfiles.save(path, original(model))
    encoder = {f"model.{key}": value for key, value in text.items()}
    given = {"text_encoder": tinyfiles.save(tmp_path / "gemma.safetensors", encoder)}
    frozen = load_frozen(config_of("sana", path, base_config=folder, **given))
    for part, expected in ((frozen.model, model), (frozen.encoders["text_encoder"], text)):
        found = part.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.skipif("sana" not in TRAINED, reason="needs a diffusers that knows it")
def test_a_file_of_sana_15_is_refused(folders: Folders, tmp_path: Path) -> None:
    """Structure without the norms is Sana's, and diffusers reads no norms from it."""
    weights = {"blocks.0.attn.q_norm.weight": torch.zeros(1)}
    path = tinyfiles.save(tmp_path / "model.safetensors", weights)
    with pytest.raises(PatchError, match="found those of Sana 1.5 at .*not supported"):
        load_frozen(config_of("sana", path, base_config=folders("sana")))
