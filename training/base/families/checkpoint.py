"""Checkpoints of the original codes: read without running what they name, renamed for diffusers.

DiT (facebookresearch/DiT, chuanyangjin/fast-DiT) and PixArt have no single-file loader in
diffusers. Names and order of the tensors: models.py of facebookresearch/DiT and
diffusion/model/nets/PixArt.py of PixArt-alpha.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmp_common import PatchError
from dmp_common.errors import printable
from dmp_common.tools.modelfiles import tensor_shapes
from dmp_common.tools.pickles import StoredTensor
from dmp_common.tools.unpickle import TorchFile

PICKLED = (".pt", ".pth", ".ckpt")  # endings of files that torch.save wrote
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
_BLOCK_NAME = re.compile(r"blocks\.([0-9]{1,4})\.")
_MOST_SHARING = 4  # times the file's size that tensors sharing their values may take as copies
# Made anew by diffusers, or training only.
_LEFT_OUT = ("pos_embed", "y_embedder.y_embedding")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .ckpt, .pt or .pth file in their own precision; nothing in it is run.

    Tensors that share their values in the file share memory here.

    Raises:
        PatchError: no such file, a damaged one, one without tensors, or one whose tensors would
            need much more memory than the file is long as soon as a model holds them.
    """
    with TorchFile(path) as file:
        stored = _state_dict(file.contents())
        if not stored:
            raise PatchError(
                f"{path}: expected the weights of a model, found no tensors: choose a checkpoint."
            )
        tensors = {
            name: file.values(tensor)
            for name, tensor in stored.items()
            if tensor.storage.dtype is not None  # token positions and the like
        }
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if needed > _MOST_SHARING * file.size:
            raise PatchError(
                f"{path}: expected the weights of a model, found tensors that need {needed:,} "
                f"bytes in a file of {file.size:,}: choose a checkpoint as its trainer saved it."
            )
        return tensors


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in such a file, without their values."""
    with TorchFile(path) as file:
        return {name: tensor.shape for name, tensor in _state_dict(file.contents()).items()}


def shapes_of(path: Path) -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a file or folder of weights, pickled or not.

    A file that has not changed is read once, though several parts of a run ask for it.
    """
    if not path.is_file():
        return tensor_shapes(path)
    facts = path.stat()
    return _shapes_of_file(path, facts.st_mtime_ns, facts.st_size)


@lru_cache(maxsize=4)
def _shapes_of_file(path: Path, changed: int, size: int) -> Mapping[str, tuple[int, ...]]:
    return read_shapes(path) if path.suffix in PICKLED else tensor_shapes(path)


def is_transformer(tensors: Mapping[str, object]) -> bool:
    """Whether these are the weights of a DiT or PixArt in the naming of the original code."""
    return "x_embedder.proj.weight" in tensors and "blocks.0.attn.qkv.weight" in tensors


def is_pixart(tensors: Mapping[str, object]) -> bool:
    """Whether these are the weights of PixArt rather than DiT."""
    return "t_block.1.weight" in tensors


def infer_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The configuration of diffusers' model for an original DiT or PixArt.

    Raises:
        PatchError: a width that no published model has, whose heads nothing tells, or tensors
            that are missing or do not fit together.
    """
    width, channels, size, _ = _shape(tensors, "x_embedder.proj.weight", None, None, None, None)
    if width not in _HEADS:
        raise PatchError(
            f"expected a model of width {', '.join(map(str, _HEADS))}, found {width}, for which "
            "the number of attention heads is unknown: name a diffusers folder with its "
            "configuration as --base_config."
        )
    out = _shape(tensors, "final_layer.linear.weight", None, width)[0] // size**2
    config = {
        "num_attention_heads": _HEADS[width],
        "attention_head_dim": width // _HEADS[width],
        "in_channels": channels,
        "out_channels": out,
        "num_layers": _depth(tensors, width),
        "sample_size": 32,
        "patch_size": size,
    }
    if "pos_embed" in tensors:
        tokens = _shape(tensors, "pos_embed", 1, None, width)[1]
        config["sample_size"] = round(tokens**0.5) * size
    if not is_pixart(tensors):
        rows, _ = _shape(tensors, "y_embedder.embedding_table.weight", None, width)
        return {**config, "num_embeds_ada_norm": rows - 1}  # the last row is "no class"
    return {
        **config,
        "cross_attention_dim": width,
        "caption_channels": _shape(tensors, "y_embedder.y_proj.fc1.weight", width, None)[1],
        "norm_type": "ada_norm_single",
        "num_embeds_ada_norm": 1000,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "use_additional_conditions": "csize_embedder.mlp.0.weight" in tensors,
    }


def _shape(tensors: Mapping[str, Tensor], name: str, *expected: int | None) -> tuple[int, ...]:
    """The shape of a tensor; `None` in `expected` stands for any size.

    A model is built from these numbers, so each must be that of values which the file holds.
    """
    shape = tuple(tensors[name].shape) if name in tensors else ()
    if len(shape) != len(expected) or any(
        size not in (None, found) for size, found in zip(expected, shape, strict=True)
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in expected)
        raise PatchError(
            f"expected a tensor {name} of shape ({wanted}) in the weights of an original DiT or "
            f"PixArt, found {shape or 'none'}: choose such a checkpoint."
        )
    return shape


def _depth(tensors: Mapping[str, Tensor], width: int) -> int:
    """The number of blocks, all of which must be in the file."""
    found = {block[1] for name in tensors if (block := _BLOCK_NAME.match(name))}
    for layer in range(len(found)):
        _shape(tensors, f"blocks.{layer}.attn.qkv.weight", 3 * width, width)
    return len(found)


def rename(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Original DiT or PixArt weights under the names of diffusers.

    Raises:
        PatchError: a tensor that neither has.
    """
    pixart = is_pixart(tensors)
    single = _PIXART if pixart else _DIT
    depth = len({block[1] for name in tensors if (block := _BLOCK_NAME.match(name))})
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in _LEFT_OUT:
            continue
        if name == "final_layer.scale_shift_table":
            renamed["scale_shift_table"] = tensor
            continue
        stem, _, kind = name.rpartition(".")
        block = re.fullmatch(r"blocks\.([0-9]{1,4})\.(.+)", name)
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
        f"expected the weights of an original DiT or PixArt, found also {printable(name)}: give "
        "the checkpoint of the unchanged model, or a diffusers folder."
    )
