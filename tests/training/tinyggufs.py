"""GGUF files as ComfyUI-GGUF's converter and its quantiser make them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

_GROUP = 256  # values of a row after ComfyUI-GGUF has reshaped a tensor
# What its quantiser leaves as it is in Stable Diffusion 1.5 and XL.
_PRECISE = ("time_embed", "label_emb.", "add_embedding.", "conv_in.", "conv_out.",
            "input_blocks.0.0.", ".out.2.")  # fmt: skip


def write_gguf(path: Path, tensors: Mapping[str, Tensor], kind: str = "Q4_0") -> Path:
    """Writes tensors: those of two dimensions or more in a type of GGUF, where rows allow it.

    As ComfyUI-GGUF does for Stable Diffusion 1.5 and XL, what does not divide into rows of 256 is
    reshaped so, and its shape is written beside it. Embeddings, the first and the last layer stay
    in float32.
    """
    writer = gguf.GGUFWriter(None, "sd1")
    writer.add_string("general.name", "tiny")
    writer.add_array("general.tags", ["one", "two"])
    for name, tensor in tensors.items():
        values = tensor.float().numpy()
        wanted = gguf.GGMLQuantizationType[kind]
        if tensor.dim() > 1 and values.shape[-1] % _GROUP and values.size % _GROUP == 0:
            shape = tuple(int(size) for size in values.shape)
            writer.add_array(f"comfy.gguf.orig_shape.{name}", shape)
            values = values.reshape(-1, _GROUP)
        precise = any(part in f".{name}" for part in _PRECISE)
        whole = values.shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0
        if tensor.dim() < 2 or precise or not whole:
            wanted = gguf.GGMLQuantizationType.F32
        by_hand = wanted.name.endswith("_K")
        data = (
            random_blocks(values.shape, kind) if by_hand else gguf.quants.quantize(values, wanted)
        )
        writer.add_tensor(name, data, raw_dtype=wanted)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_blocks(shape: tuple[int, ...], kind: str) -> np.ndarray:
    """Bytes of random values in a type that Python cannot write; scales are small and finite."""
    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    count = int(np.prod(shape)) // block
    source = np.random.default_rng(0)
    blocks = source.integers(0, 256, (count, size), dtype=np.uint8)
    scales = source.uniform(0.001, 0.002, (count, 2)).astype(np.float16).view(np.uint8)
    # Each block has its scale, and some a minimum after it, in half precision at one end.
    place = {"Q2_K": -4, "Q3_K": -2, "Q4_K": 0, "Q5_K": 0, "Q6_K": -2}[kind]
    width = 2 if kind in ("Q3_K", "Q6_K") else 4
    blocks[:, place : place + width or None] = scales[:, :width]
    return blocks.reshape(*shape[:-1], shape[-1] // block * size)


def read_values(path: Path) -> dict[str, Tensor]:
    """What the package gguf itself reads of a file: the values of its tensors, in their shapes."""
    reader = gguf.GGUFReader(path)
    values = {}
    for tensor in reader.tensors:
        found = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        key = reader.fields.get(f"comfy.gguf.orig_shape.{tensor.name}")
        shape = [int(n) for n in reversed(tensor.shape)] if key is None else key.contents()
        values[tensor.name] = found.reshape(shape)
    return values
