"""Checkpoints of the original codes: read without running what they name, renamed for diffusers.

DiT (facebookresearch/DiT, chuanyangjin/fast-DiT) and PixArt have no single-file loader in
diffusers. Names and order of the tensors: models.py of facebookresearch/DiT and
diffusion/model/nets/PixArt.py of PixArt-alpha.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmp_common import PatchError
from dmp_common.tools.unpickle import StoredTensor, TorchFile

# Where the weights are, best first: fast-DiT samples from its average.
_NESTS = ("ema", "state_dict_ema", "state_dict", "model")
_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # DiT, Table 1; PixArt has the width of XL

_BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
    "cross_attn.q_linear": "attn2.to_q",
    "cross_attn.proj": "attn2.to_out.0",
}
_SPLIT = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
}
_EMB = "norm1.emb"
_DIT = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_DIT_REPEATED = {  # one in the original, one a block in diffusers
    "t_embedder.mlp.0": f"{_EMB}.timestep_embedder.linear_1",
    "t_embedder.mlp.2": f"{_EMB}.timestep_embedder.linear_2",
    "y_embedder.embedding_table": f"{_EMB}.class_embedder.embedding_table",
}
_PIXART = {
    "x_embedder.proj": "pos_embed.proj",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "csize_embedder.mlp.0": "adaln_single.emb.resolution_embedder.linear_1",
    "csize_embedder.mlp.2": "adaln_single.emb.resolution_embedder.linear_2",
    "ar_embedder.mlp.0": "adaln_single.emb.aspect_ratio_embedder.linear_1",
    "ar_embedder.mlp.2": "adaln_single.emb.aspect_ratio_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    "final_layer.linear": "proj_out",
}
# Made anew by diffusers, or training only.
_LEFT_OUT = ("pos_embed", "y_embedder.y_embedding")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .ckpt, .pt or .pth file in their own precision; nothing in it is run.

    Raises:
        PatchError: no such file, a damaged one, or one without tensors.
    """
    with TorchFile(path) as file:
        stored = _state_dict(file.contents())
        if not stored:
            raise PatchError(
                f"{path}: expected the weights of a model, found no tensors: choose a checkpoint."
            )
        return {
            name: file.values(tensor).to(tensor.storage.dtype)
            for name, tensor in stored.items()
            if tensor.storage.dtype is not None  # token positions and the like
        }


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in such a file, without their values."""
    with TorchFile(path) as file:
        return {name: tensor.shape for name, tensor in _state_dict(file.contents()).items()}


def is_transformer(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the weights of a DiT or PixArt in the naming of the original code."""
    return "x_embedder.proj.weight" in tensors and "blocks.0.attn.qkv.weight" in tensors


def is_pixart(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the weights of PixArt rather than DiT."""
    return "t_block.1.weight" in tensors


def infer_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The configuration of diffusers' model for an original DiT or PixArt.

    Raises:
        PatchError: a width that no published model has, whose heads nothing tells.
    """
    weight = tensors["x_embedder.proj.weight"]  # (D, C, p, p)
    width, channels, size, _ = weight.shape
    if width not in _HEADS:
        raise PatchError(
            f"expected a model of width {', '.join(map(str, _HEADS))}, found {width}, for which "
            "the number of attention heads is unknown: name a diffusers folder with its "
            "configuration as --base_config."
        )
    out = tensors["final_layer.linear.weight"].shape[0] // size**2
    config = {
        "num_attention_heads": _HEADS[width],
        "attention_head_dim": width // _HEADS[width],
        "in_channels": channels,
        "out_channels": out,
        "num_layers": 1 + max(int(n.split(".")[1]) for n in tensors if n.startswith("blocks.")),
        "sample_size": 32,
        "patch_size": size,
    }
    if "pos_embed" in tensors:
        config["sample_size"] = round(tensors["pos_embed"].shape[1] ** 0.5) * size
    if not is_pixart(tensors):
        rows = tensors["y_embedder.embedding_table.weight"].shape[0]
        return {**config, "num_embeds_ada_norm": rows - 1}  # the last row is "no class"
    return {
        **config,
        "cross_attention_dim": width,
        "caption_channels": tensors["y_embedder.y_proj.fc1.weight"].shape[1],
        "norm_type": "ada_norm_single",
        "num_embeds_ada_norm": 1000,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "use_additional_conditions": "csize_embedder.mlp.0.weight" in tensors,
    }


def rename(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Original DiT or PixArt weights under the names of diffusers.

    Raises:
        PatchError: a tensor that neither has.
    """
    pixart = is_pixart(tensors)
    single = _PIXART if pixart else _DIT
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in _LEFT_OUT:
            continue
        if name == "final_layer.scale_shift_table":
            renamed["scale_shift_table"] = tensor
            continue
        stem, _, kind = name.rpartition(".")
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if block:
            renamed |= _rename_in_block(int(block[1]), block[2], tensor, name)
        elif stem in single:
            renamed[f"{single[stem]}.{kind}"] = tensor
        elif not pixart and stem in _DIT_REPEATED:
            for layer in range(depth):
                renamed[f"transformer_blocks.{layer}.{_DIT_REPEATED[stem]}.{kind}"] = tensor
        else:
            raise _unknown(name)
    return renamed


def _rename_in_block(layer: int, name: str, tensor: Tensor, full: str) -> dict[str, Tensor]:
    prefix = f"transformer_blocks.{layer}."
    if name == "scale_shift_table":
        return {prefix + name: tensor}
    stem, _, kind = name.rpartition(".")
    if stem in _SPLIT:
        parts = _SPLIT[stem]
        pieces = torch.chunk(tensor, len(parts))
        return {f"{prefix}{part}.{kind}": piece for part, piece in zip(parts, pieces, strict=True)}
    if stem not in _BLOCK:
        raise _unknown(full)
    return {f"{prefix}{_BLOCK[stem]}.{kind}": tensor}


def _state_dict(contents: object) -> dict[str, StoredTensor]:
    for nest in _NESTS:
        if isinstance(contents, dict) and isinstance(contents.get(nest), dict):
            contents = contents[nest]
            break
    found = contents.items() if isinstance(contents, dict) else ()
    return {
        name.removeprefix("module."): value
        for name, value in found
        if isinstance(name, str) and isinstance(value, StoredTensor)
    }


def _unknown(name: str) -> PatchError:
    return PatchError(
        f"expected the weights of an original DiT or PixArt, found also {name}: give the "
        "checkpoint of the unchanged model, or a diffusers folder."
    )
