"""Tiny bases as single files, in the namings that people have: LDM, BFL, Stability, ComfyUI."""

from __future__ import annotations

import re
import types
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from diffusers.loaders import single_file_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import tinychroma
from tests.dmp_common.originalnames import flux2_names, next_names, unet_original_name
from tests.dmp_common.realwan import wan_names
from tests.training import tinyernie, tinyflux2
from tests.training.tinybases import OWN

# What ComfyUI and Stability put before the text encoders that a file holds.
IN_FILE = {
    "sd15": {"text_encoder": "cond_stage_model.transformer.text_model."},
    "lumina2": {"text_encoder": "text_encoders.gemma2_2b.transformer."},
    "z-image": {"text_encoder": "text_encoders.qwen3_4b.transformer."},
    "flux2": {"text_encoder": "text_encoders.mistral3_24b.transformer."},
    "flux": {
        "text_encoder": "text_encoders.clip_l.transformer.text_model.",
        "text_encoder_2": "text_encoders.t5xxl.transformer.",
    },
    "chroma": {"text_encoder": "text_encoders.t5xxl.transformer."},
    **{name: own.in_file for name, own in OWN.items() if own.in_file},
}
# Their order in a joined projection.
_PARTS = {"to_q": 0, "to_k": 1, "to_v": 2, "proj_mlp": 3, "add_k_proj": 1, "add_v_proj": 2}
_VAE_NAMES = {
    r"mid_block\.resnets\.0\.": "mid.block_1.",
    r"mid_block\.resnets\.1\.": "mid.block_2.",
    r"mid_block\.attentions\.0\.": "mid.attn_1.",
    r"(down|up)_blocks\.(\d+)\.resnets\.": r"\1.\2.block.",
    r"(down|up)_blocks\.(\d+)\.(down|up)samplers\.0\.": r"\1.\2.\1sample.",
    r"conv_shortcut": "nin_shortcut",
    r"conv_norm_out": "norm_out",
    r"group_norm": "norm",
    r"to_([qkv])\.": r"\1.",
    r"to_out\.0\.": "proj_out.",
}


def weights_of(folder: Path) -> dict[str, Tensor]:
    """The tensors of a part of a pipeline in diffusers' or transformers' naming."""
    return load_file(next(folder.glob("*.safetensors")))


def vae_tensors(folder: Path) -> dict[str, Tensor]:
    """A VAE in the naming of LDM and BFL: vae-ft-mse-840000.safetensors, ae.safetensors."""
    state = weights_of(folder / "vae")
    if "encoder.conv_norm_out.weight" not in state:  # Wan's, in the naming of diffusers
        return state
    levels = len({key.split(".")[2] for key in state if key.startswith("decoder.up_blocks.")})
    renamed = {}
    for key, tensor in state.items():
        name = key
        for pattern, replacement in _VAE_NAMES.items():
            name = re.sub(pattern, replacement, name)
        # Levels of the decoder count from the other end.
        name = re.sub(r"\bup\.(\d+)\.", lambda m: f"up.{levels - 1 - int(m[1])}.", name)
        attends = "mid.attn_1." in name and name.endswith("weight") and tensor.ndim == 2
        renamed[name] = tensor[:, :, None, None] if attends else tensor
    return tinyflux2.vae_names(renamed) if "bn.running_mean" in renamed else renamed


def text_tensors(folder: Path, part: str) -> dict[str, Tensor]:
    """A text encoder as in clip_l.safetensors, clip_g.safetensors, t5xxl_fp16.safetensors or the
    file of a language model."""
    state = weights_of(folder / part)
    if "language_model.model.embed_tokens.weight" in state:
        return (tinyflux2.pruned if folder.name == "flux2" else tinyernie.text_half)(state)
    if "language_model.embed_tokens.weight" in state:  # qwen_2.5_vl_7b.safetensors
        return {key.replace("language_model.", "model."): v for key, v in state.items()}
    if "embed_tokens.weight" in state:
        return {f"model.{key}": tensor for key, tensor in state.items()}
    plain = ("text_model.", "text_projection.", "encoder.block", "encoder.final", "shared.")
    return {
        key if key.startswith(plain) else f"text_model.{key}": tensor
        for key, tensor in state.items()
    }


def denoiser_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """A denoiser in its original naming, without a prefix."""
    if name in ("sd15", "sd21", "sdxl"):
        state = weights_of(folder / "unet")
        levels = len({key.split(".")[1] for key in state if key.startswith("down_blocks.")})
        return {unet_original_name(key, levels, layers=1): tensor for key, tensor in state.items()}
    state = weights_of(folder / "transformer")
    if name in OWN:
        original = OWN[name].original
        assert original is not None
        return original(state)
    if name == "chroma":
        return _joined_as({key: tinychroma.original_name(key) for key in state}, state)
    if name == "wan":
        return {original: state[key] for key, original in wan_names(state).items()}
    if name in ("lumina2", "z-image"):
        return _joined_as(next_names(name, state), state)
    if name == "flux2":
        found = _joined_as(flux2_names(state), state)
        last = "final_layer.adaLN_modulation.1.weight"
        return {**found, last: _swapped(found[last])}
    return (_flux if name == "flux" else _sd3)(state)


def save_single(path: Path, folder: Path, name: str, *parts: str) -> Path:
    """Writes one file with the denoiser and the parts that are named: "vae", "text_encoder" ..."""
    tensors = {
        f"model.diffusion_model.{key}": tensor
        for key, tensor in denoiser_tensors(folder, name).items()
    }
    for part in parts:
        if part == "vae":
            prefix = "first_stage_model." if name.startswith("sd") else "vae."
            tensors |= {prefix + key: value for key, value in vae_tensors(folder).items()}
            continue
        prefix = IN_FILE[name][part]
        tensors |= {
            prefix + key.removeprefix("text_model."): value
            for key, value in text_tensors(folder, part).items()
        }
    return save(path, tensors)


def save(path: Path, tensors: dict[str, Tensor], dtype: torch.dtype | None = None) -> Path:
    """Writes tensors to a file."""
    save_file(
        {key: value.to(dtype or value.dtype).contiguous() for key, value in tensors.items()}, path
    )
    return path


def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' converters know the real widths alone: here they know those of tiny models."""
    for name, sizes in {
        "FluxTransformer2DModel": {3072: 32},
        "ChromaTransformer2DModel": {3072: 32},
        "Lumina2Transformer2DModel": {2304: 32, 768: 16},  # queries; keys and values
    }.items():
        entry = single_file_model.SINGLE_FILE_LOADABLE_CLASSES.get(name)
        if entry is not None:  # old releases of diffusers do not have it
            convert = entry["checkpoint_mapping_fn"]
            code = _with_numbers(convert.__code__, sizes)
            narrow = types.FunctionType(code, convert.__globals__, convert.__name__)
            monkeypatch.setitem(entry, "checkpoint_mapping_fn", narrow)


def _with_numbers(code: types.CodeType, numbers: dict[int, int]) -> types.CodeType:
    """The code of a function, and of those inside it, with other numbers in it."""
    constants = (
        _with_numbers(value, numbers)
        if isinstance(value, types.CodeType)
        else numbers.get(value, value)
        if isinstance(value, int) and not isinstance(value, bool)
        else value
        for value in code.co_consts
    )
    return code.replace(co_consts=tuple(constants))


def _joined_as(names: dict[str, str], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under their original names; those of one name are one tensor there."""
    found: dict[str, list[Tensor]] = {}
    for key in sorted(state, key=lambda key: _PARTS.get(key.split(".")[-2:][0], 0)):
        found.setdefault(names[key], []).append(state[key])
    return {name: torch.cat(parts) for name, parts in found.items()}


def _joined(state: dict[str, Tensor], prefix: str, names: tuple[str, ...], kind: str) -> Tensor:
    return torch.cat([state[f"{prefix}.{name}.{kind}"] for name in names])


def _swapped(tensor: Tensor) -> Tensor:
    """Scale and shift change places between the codes."""
    return torch.cat(tensor.chunk(2)[::-1])


def _flux(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of black-forest-labs/flux, src/flux/model.py."""
    singles = {
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
        "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
        "proj_out": "final_layer.linear",
    }
    found = {
        f"{new}.{kind}": state[f"{old}.{kind}"]
        for old, new in singles.items()
        for kind in ("weight", "bias")
    }
    for kind in ("weight", "bias"):
        modulation = _swapped(state[f"norm_out.linear.{kind}"])
        found[f"final_layer.adaLN_modulation.1.{kind}"] = modulation
    double = {
        "norm1.linear": "img_mod.lin",
        "norm1_context.linear": "txt_mod.lin",
        "ff.net.0.proj": "img_mlp.0",
        "ff.net.2": "img_mlp.2",
        "ff_context.net.0.proj": "txt_mlp.0",
        "ff_context.net.2": "txt_mlp.2",
        "attn.to_out.0": "img_attn.proj",
        "attn.to_add_out": "txt_attn.proj",
    }
    image, text = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
    for n in range(_depth(state, "transformer_blocks")):
        ours, theirs = f"transformer_blocks.{n}", f"double_blocks.{n}"
        for kind in ("weight", "bias"):
            for old, new in double.items():
                found[f"{theirs}.{new}.{kind}"] = state[f"{ours}.{old}.{kind}"]
            found[f"{theirs}.img_attn.qkv.{kind}"] = _joined(state, f"{ours}.attn", image, kind)
            found[f"{theirs}.txt_attn.qkv.{kind}"] = _joined(state, f"{ours}.attn", text, kind)
        for old, new in {
            "norm_q": "img_attn.norm.query_norm",
            "norm_k": "img_attn.norm.key_norm",
            "norm_added_q": "txt_attn.norm.query_norm",
            "norm_added_k": "txt_attn.norm.key_norm",
        }.items():
            found[f"{theirs}.{new}.scale"] = state[f"{ours}.attn.{old}.weight"]
    for n in range(_depth(state, "single_transformer_blocks")):
        ours, theirs = f"single_transformer_blocks.{n}", f"single_blocks.{n}"
        for kind in ("weight", "bias"):
            found[f"{theirs}.modulation.lin.{kind}"] = state[f"{ours}.norm.linear.{kind}"]
            found[f"{theirs}.linear2.{kind}"] = state[f"{ours}.proj_out.{kind}"]
            parts = [_joined(state, f"{ours}.attn", image, kind), state[f"{ours}.proj_mlp.{kind}"]]
            found[f"{theirs}.linear1.{kind}"] = torch.cat(parts)
        for old, new in {"norm_q": "query_norm", "norm_k": "key_norm"}.items():
            found[f"{theirs}.norm.{new}.scale"] = state[f"{ours}.attn.{old}.weight"]
    return found


def _sd3(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of Stability-AI/sd3-ref, mmditx.py."""
    singles = {
        "pos_embed.proj": "x_embedder.proj",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "context_embedder": "context_embedder",
        "proj_out": "final_layer.linear",
    }
    found = {
        f"{new}.{kind}": state[f"{old}.{kind}"]
        for old, new in singles.items()
        for kind in ("weight", "bias")
    }
    found["pos_embed"] = state["pos_embed.pos_embed"]
    for kind in ("weight", "bias"):
        modulation = _swapped(state[f"norm_out.linear.{kind}"])
        found[f"final_layer.adaLN_modulation.1.{kind}"] = modulation
    depth = _depth(state, "transformer_blocks")
    image, text = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
    for n in range(depth):
        ours, theirs = f"transformer_blocks.{n}", f"joint_blocks.{n}"
        names = {
            "attn.to_out.0": "x_block.attn.proj",
            "attn.to_add_out": "context_block.attn.proj",
            "attn2.to_out.0": "x_block.attn2.proj",
            "norm1.linear": "x_block.adaLN_modulation.1",
            "norm1_context.linear": "context_block.adaLN_modulation.1",
            "ff.net.0.proj": "x_block.mlp.fc1",
            "ff.net.2": "x_block.mlp.fc2",
            "ff_context.net.0.proj": "context_block.mlp.fc1",
            "ff_context.net.2": "context_block.mlp.fc2",
        }
        for kind in ("weight", "bias"):
            for old, new in names.items():
                if f"{ours}.{old}.{kind}" in state:
                    found[f"{theirs}.{new}.{kind}"] = state[f"{ours}.{old}.{kind}"]
            found[f"{theirs}.x_block.attn.qkv.{kind}"] = _joined(state, f"{ours}.attn", image, kind)
            found[f"{theirs}.context_block.attn.qkv.{kind}"] = _joined(
                state, f"{ours}.attn", text, kind
            )
            if f"{ours}.attn2.to_q.{kind}" in state:
                found[f"{theirs}.x_block.attn2.qkv.{kind}"] = _joined(
                    state, f"{ours}.attn2", image, kind
                )
            if n == depth - 1:  # the last block of the text scales and shifts only
                last = f"{theirs}.context_block.adaLN_modulation.1.{kind}"
                found[last] = _swapped(found[last])
    return found


def _depth(state: dict[str, Tensor], blocks: str) -> int:
    return len({key.split(".")[1] for key in state if key.startswith(f"{blocks}.")})


def same(model: nn.Module, other: nn.Module) -> bool:
    """Whether two models have the same weights."""
    state, wanted = model.state_dict(), other.state_dict()
    return state.keys() == wanted.keys() and all(torch.equal(state[k], wanted[k]) for k in wanted)
