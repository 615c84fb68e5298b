"""HunyuanImage: words in quotation marks go to an encoder of their own; and its single files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dmp_common import PatchError
from tests.training import tinyfiles
from tests.training.base.test_memory import config_of
from tests.training.conftest import Folders
from tests.training.tinybases import TRAINED
from tests.training.tinyhunyuanimage import original
from training.base.frozen import find_base, load_frozen
from training.base.student_weights import load_student

known = pytest.mark.skipif("hunyuan-image" not in TRAINED, reason="needs a diffusers that knows it")


@known
def test_padding_that_is_left_out_changes_nothing(folders: Folders) -> None:
    config = config_of("hunyuan-image", folders("hunyuan-image"), llm_max_token_length=24)
    frozen = load_frozen(config)
    captions = ['a picture of "red cat"', "a green dog"]
    with torch.no_grad():
        given = frozen.family.encode_text(frozen.encoders, captions, config)
        noisy, t = torch.randn(2, 4, 8, 8), torch.tensor([100.0, 900.0])
        found = frozen.family.predict(frozen.model, noisy, t, given)
        whole = frozen.model(
            noisy, t, given["prompt"], given["mask"], None, given["glyphs"], given["glyph_mask"]
        ).sample
    assert given["glyph_mask"].sum(dim=1).tolist() == [7, 0]  # of: Text "red cat".
    assert torch.allclose(found, whole, atol=1e-5)
    plain = given | {"glyph_mask": torch.zeros_like(given["glyph_mask"])}
    with torch.no_grad():
        without = frozen.family.predict(frozen.model, noisy, t, plain)
    assert not torch.allclose(without[0], whole[0], atol=1e-4)
    assert torch.allclose(without[1], whole[1], atol=1e-5)


# Names of the original code's own file, by their parts in ComfyUI's.
_TENCENTS = {
    "img_mod.lin.": "img_mod.linear.",
    "txt_mod.lin.": "txt_mod.linear.",
    "modulation.lin.": "modulation.linear.",
    "_attn.qkv.": "_attn_qkv.",
    "_attn.proj.": "_attn_proj.",
    "_attn.norm.query_norm.scale": "_attn_q_norm.weight",
    "_attn.norm.key_norm.scale": "_attn_k_norm.weight",
    ".norm.query_norm.scale": ".q_norm.weight",
    ".norm.key_norm.scale": ".k_norm.weight",
    "mlp.0.": "mlp.fc1.",
    "mlp.2.": "mlp.fc2.",
    "txt_in.c_embedder.in_layer": "txt_in.c_embedder.linear_1",
    "txt_in.c_embedder.out_layer": "txt_in.c_embedder.linear_2",
    ".in_layer": ".mlp.0",
    "_in.out_layer": "_in.mlp.2",
    "t_embedder.out_layer": "t_embedder.mlp.2",
}


def tencents(name: str) -> str:
    for part, other in _TENCENTS.items():
        name = name.replace(part, other)
    return name


# The beginnings of names of a VAE of two levels with one block each, two in the decoder.
_VAE = {
    "encoder.down_blocks.0.": "encoder.down.0.block.0.",
    "encoder.down_blocks.1.": "encoder.down.0.downsample.",
    "encoder.down_blocks.2.": "encoder.down.1.block.0.",
    "decoder.up_blocks.0.": "decoder.up.0.block.0.",
    "decoder.up_blocks.1.": "decoder.up.0.block.1.",
    "decoder.up_blocks.2.": "decoder.up.0.upsample.",
    "decoder.up_blocks.3.": "decoder.up.1.block.0.",
    "decoder.up_blocks.4.": "decoder.up.1.block.1.",
    "mid_block.resnets.0.": "mid.block_1.",
    "mid_block.attentions.0.proj.": "mid.attn_1.proj_out.",
    "mid_block.attentions.0.to_": "mid.attn_1.",
    "mid_block.attentions.0.": "mid.attn_1.",
    "mid_block.resnets.1.": "mid.block_2.",
    "conv_shortcut.": "nin_shortcut.",
}


def vae_name(name: str) -> str:
    for part, other in _VAE.items():
        name = name.replace(part, other)
    return name


@known
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("naming", [str, tencents], ids=["ComfyUI", "original"])
def test_parts_come_from_files(
    naming: Callable[[str], str], prefix: str, folders: Folders, tmp_path: Path
) -> None:
    """Transformer, VAE and both text encoders, and a cheap model; no others are read."""
    folder = folders("hunyuan-image")
    whole = load_frozen(config_of("hunyuan-image", folder, llm_max_token_length=24))
    weights = {
        f"{prefix}{naming(name)}": value + 0.5
        for name, value in original(tinyfiles.weights_of(folder / "transformer")).items()
    }
    path = tinyfiles.save(tmp_path / "hunyuanimage.safetensors", weights)
    vae = {vae_name(key): value for key, value in tinyfiles.weights_of(folder / "vae").items()}
    assert not any("_blocks" in name for name in vae)
    options = {"vae": tinyfiles.save(tmp_path / "vae.safetensors", vae)}
    for option, part in (("text_encoder", "text_encoder"), ("byt5", "text_encoder_2")):
        text = tinyfiles.text_tensors(folder, part)
        options[option] = tinyfiles.save(tmp_path / f"{option}.safetensors", text)
    places = {name: str(place) for name, place in options.items()}
    config = config_of(
        "hunyuan-image", path, base_config=str(folder), llm_max_token_length=24, **places
    )
    frozen = load_frozen(config)
    expected = whole.model.state_dict()
    found = frozen.model.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value + 0.5, rtol=0, atol=0)
    assert tinyfiles.same(frozen.vae, whole.vae)
    for name in ("text_encoder", "text_encoder_2"):
        assert tinyfiles.same(frozen.encoders[name], whole.encoders[name])
    assert find_base(config.model_copy(update={"base": "auto"})) is whole.base
    assert tinyfiles.same(load_student(whole, path), frozen.model)


@known
def test_a_file_of_another_size_is_told(folders: Folders, tmp_path: Path) -> None:
    folder = folders("hunyuan-image")
    weights = original(tinyfiles.weights_of(folder / "transformer"))
    weights["final_layer.more"] = weights.pop("final_layer.linear.weight")
    path = tinyfiles.save(tmp_path / "model.safetensors", weights)
    with pytest.raises(PatchError, match=r"2 that are .*\(proj_out.weight, final_layer.more\)"):
        load_frozen(config_of("hunyuan-image", path, base_config=str(folder)))
