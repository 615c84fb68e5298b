"""Original names of the parameters of released models, as diffusers converts them."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import pytest
import torch
from diffusers.loaders import single_file_utils as single_file
from torch import Tensor

from dmp_common import get_base
from tests.dmp_common.realbases import MODELS, model_of
from tests.dmp_common.realmodel import Asked
from tests.dmp_common.realwan import wan_names


def unet_original_name(key: str, levels: int, layers: int = 2) -> str:
    """What we think the original name of a diffusers UNet's parameter is; the test proves it."""
    head, _, rest = key.partition(".")
    if head not in ("down_blocks", "mid_block", "up_blocks"):
        names = {
            "conv_in": "input_blocks.0.0",
            "time_embedding.linear_1": "time_embed.0",
            "time_embedding.linear_2": "time_embed.2",
            "add_embedding.linear_1": "label_emb.0.0",
            "add_embedding.linear_2": "label_emb.0.2",
            "conv_norm_out": "out.0",
            "conv_out": "out.2",
        }
        module, _, parameter = key.rpartition(".")
        return f"{names[module]}.{parameter}"
    level, kind, n, tail = ("0", *rest.split(".", 2)) if head == "mid_block" else rest.split(".", 3)
    for diffusers_name, original in {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    }.items():
        if kind == "resnets" and tail.startswith(diffusers_name):
            tail = tail.replace(diffusers_name, original, 1)
    block, place = int(level) * (layers + 1), int(n)
    if head == "mid_block":
        return f"middle_block.{2 * place if kind == 'resnets' else 1}.{tail}"
    if head == "down_blocks":
        if kind == "downsamplers":
            return f"input_blocks.{block + layers + 1}.0.{tail.replace('conv', 'op')}"
        return f"input_blocks.{block + 1 + place}.{int(kind == 'attentions')}.{tail}"
    if kind == "upsamplers":
        index = 2 if f"up_blocks.{level}.attentions" in key or _attends(levels, int(level)) else 1
        return f"output_blocks.{block + layers}.{index}.{tail}"
    return f"output_blocks.{block + place}.{int(kind == 'attentions')}.{tail}"


def _attends(levels: int, up: int) -> bool:
    """Whether a decoder level of SD (4 levels) or SDXL (3) has attention."""
    return up > 0 if levels == 4 else up < 2


@functools.cache
def original_names(name: str) -> dict[str, str]:
    """From diffusers' names of parameters to the original ones, as diffusers converts them."""
    model, base = model_of(name), get_base(MODELS[name].base)
    state, names = model.state_dict(), MODELS[name].names
    if names is not None:
        return names(state)
    if base.name == "qwen-image":  # ComfyUI took diffusers' names
        return {key: key for key in state}
    if base.layout == "map":
        levels = len(model.down_blocks)
        originals = [unet_original_name(key, levels) for key in state]
        # This converter hands values on untouched, so names may stand for tensors.
        checkpoint = {f"model.diffusion_model.{key}": key for key in originals}
        return single_file.convert_ldm_unet_checkpoint(checkpoint, dict(model.config))
    if base.name in ("lumina2", "z-image"):
        return _next_names(base.name, state)
    if base.name.startswith("flux2"):
        return _flux2_names(state)
    if base.architecture == "wan":
        return wan_names(state)
    depth = len(model.transformer_blocks)
    if base.name == "flux":
        singles = len(model.single_transformer_blocks)
        known = {f"double_blocks.{n}.x": None for n in range(depth)}
        known |= {f"single_blocks.{n}.x": None for n in range(singles)}
        known |= {"guidance_in": None} if model.config.guidance_embeds else {}
        checkpoint = Asked(known, lambda key: 3072 * 7 if ".linear1." in key else 6)
        converted = single_file.convert_flux_transformer_checkpoint_to_diffusers(checkpoint)
    else:
        known = {f"joint_blocks.{n}.x": None for n in range(depth)}
        known |= {
            f"joint_blocks.{n}.x_block.attn2.x": None
            for n in range(len(getattr(model.config, "dual_attention_layers", ())))
        }
        known |= {"joint_blocks.0.x_block.attn.ln_q.x": None} if model.config.qk_norm else {}
        known["context_embedder.weight"] = torch.zeros(base.embedding, 1)
        rows = lambda key: 2 * base.embedding  # noqa: E731
        checkpoint = Asked(known, lambda key: 3 * rows(key))
        converted = single_file.convert_sd3_transformer_checkpoint_to_diffusers(checkpoint)
    return checkpoint.origins(converted)


def next_names(name: str, keys: Iterable[str]) -> dict[str, str]:
    """What we think the original names of Lumina 2 and Z-Image are; `_next_names` proves it."""
    parts = {
        "lumina2": {
            "time_caption_embed.caption_embedder": "cap_embedder",
            "time_caption_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
            "time_caption_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
            "norm_out.linear_1": "final_layer.adaLN_modulation.1",
            "norm_out.linear_2": "final_layer.linear",
            "norm1.norm.": "attention_norm1.",
            "norm1.linear": "adaLN_modulation.1",
            "refiner.0.norm1.weight": "refiner.0.attention_norm1.weight",
            "refiner.1.norm1.weight": "refiner.1.attention_norm1.weight",
            ".norm2.": ".attention_norm2.",
            "feed_forward.linear_": "feed_forward.w",
            ".attn.": ".attention.",
        },
        "z-image": {"all_final_layer.2-1": "final_layer", "all_x_embedder.2-1": "x_embedder"},
    }[name] | {"to_out.0": "out", "norm_q": "q_norm", "norm_k": "k_norm"}
    parts |= dict.fromkeys(("to_q", "to_k", "to_v"), "qkv")
    return {key: _replaced(key, parts) for key in keys}


def _replaced(key: str, parts: dict[str, str]) -> str:
    for part, other in parts.items():
        key = key.replace(part, other)
    return key


def _next_names(name: str, state: dict[str, Tensor]) -> dict[str, str]:
    names = next_names(name, state)
    rows = {key: tensor.shape[0] for key, tensor in state.items()}
    checkpoint = {original: torch.zeros(1) for original in names.values()}
    for original in checkpoint:  # joined projections, marked by their parts
        if ".qkv." in original:
            own = [key for key, other in names.items() if other == original]
            marks = [torch.full((rows[key], 1), float(own.index(key))) for key in own]
            checkpoint[original] = torch.cat(marks)
    convert = {
        "lumina2": single_file.convert_lumina2_to_diffusers,
        "z-image": single_file.convert_z_image_transformer_checkpoint_to_diffusers,
    }[name]
    converted = convert(dict(checkpoint))
    assert set(converted) == set(state)
    for key, value in converted.items():
        if ".qkv." in names[key]:
            own = [k for k, other in names.items() if other == names[key]]
            assert value.shape[0] == rows[key]
            assert value.unique().tolist() == [float(own.index(key))], key
        else:
            assert value is checkpoint[names[key]], key
    return names


def flux2_names(keys: Iterable[str]) -> dict[str, str]:
    """What we think the original names of FLUX.2 are; `_flux2_names` proves it."""
    parts = {
        "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
        "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
        "modulation_img.linear": "modulation_img.lin",
        "modulation_txt.linear": "modulation_txt.lin",
        "stream_modulation.linear": "stream_modulation.lin",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
        "single_transformer_blocks": "single_blocks",
        "transformer_blocks": "double_blocks",
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        "attn.to_qkv_mlp_proj": "linear1",
        "attn.to_out.0": "img_attn.proj",
        "attn.to_out": "linear2",
        "attn.to_add_out": "txt_attn.proj",
        "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
        "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
        "ff.linear_in": "img_mlp.0",
        "ff.linear_out": "img_mlp.2",
        "ff_context.linear_in": "txt_mlp.0",
        "ff_context.linear_out": "txt_mlp.2",
        **dict.fromkeys(("attn.to_q", "attn.to_k", "attn.to_v"), "img_attn.qkv"),
        **{f"attn.add_{kind}_proj": "txt_attn.qkv" for kind in "qkv"},
    }
    names = {}
    for key in keys:
        original = _replaced(key, parts)
        norm = "norm." if original.startswith("single") else "img_attn.norm."
        for part, other in (("q", "query"), ("k", "key")):
            original = original.replace(f"attn.norm_{part}.weight", f"{norm}{other}_norm.scale")
        names[key] = original
    return names


def _flux2_names(state: dict[str, Tensor]) -> dict[str, str]:
    names = flux2_names(state)
    order = list(dict.fromkeys(names.values()))
    checkpoint = {
        original: torch.full((6 if ".qkv." in original else 2, 1), float(place))
        for place, original in enumerate(order)
    }
    for original, tensor in checkpoint.items():
        if ".qkv." in original:
            tensor += torch.tensor([0.0, 0.0, 0.1, 0.1, 0.2, 0.2]).reshape(6, 1)
    converted = single_file.convert_flux2_transformer_checkpoint_to_diffusers(checkpoint)
    assert set(converted) == set(state)
    for key, value in converted.items():
        part = [f"to_{kind}." in key or f"add_{kind}_proj." in key for kind in "qkv"]
        expected = order.index(names[key]) + (part.index(True) / 10 if True in part else 0)
        assert value.flatten().tolist() == pytest.approx([expected, expected]), key
    return names


def original_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Joined projections have the sum of their parts' rows."""
    shapes: dict[str, tuple[int, ...]] = {}
    state = model_of(name).state_dict()
    for key, original in original_names(name).items():
        shape, flat = tuple(state[key].shape), MODELS[name].flat
        if flat is not None and original.endswith(flat):
            shape = (state[key].numel(),)
        if original in shapes:
            shape = (shapes[original][0] + shape[0], *shape[1:])
        shapes[original] = shape
    return shapes | MODELS[name].added()
