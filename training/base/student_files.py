"""Files of a base in fewer bits: GGUF, and 8-bit floating point with or without scales.

What is read is kept as it is stored for matrices, and computed once for other tensors.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dmp_common import PatchError
from dmp_common.errors import file_error, printable
from dmp_common.tools.gguf_header import GgufTensor, read_gguf_header, require_gguf
from dmp_common.tools.modelfiles import tensor_shapes

PREFIX = "model.diffusion_model."  # of the denoiser in files with other parts beside it
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
GGUF, _SAFETENSORS = ".gguf", (".safetensors", ".sft")
_FP8_NAMES = ("F8_E4M3", "F8_E5M2")
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SCALES = (".scale_weight", ".weight_scale")  # ComfyUI's older and newer name
_BESIDE = (".scale_input", ".input_scale", ".comfy_quant")  # scales of activations, and notes
_MARK = "scaled_fp8"


@dataclass(frozen=True)
class StudentTensors:
    """The tensors of a denoiser as its file stores them.

    Args:
        tensors: by name; matrices are `GGUFParameter` or in 8-bit floating point where the file
            has them so.
        scales: (O, 1) for each tensor in 8-bit floating point that has a scale.
    """

    tensors: dict[str, Tensor]
    scales: dict[str, Tensor] = field(default_factory=dict)


def student_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Returns names and shapes of the denoiser in a file; no values are read.

    Raises:
        PatchError: it is no such file, or damaged.
    """
    if path.suffix == GGUF:
        found = {name: tensor.shape for name, tensor in read_gguf_header(path).items()}
    elif path.suffix in _SAFETENSORS:
        found = tensor_shapes(path)
    else:
        raise file_error(
            path, "a file ending in .gguf or .safetensors", path.suffix or "no ending",
            "choose such a file for --student_weights",
        )  # fmt: skip
    return {
        name.removeprefix(PREFIX): found[name] for name in _of_denoiser(found) if _is_weight(name)
    }


def stored_types(path: Path) -> dict[str, int]:
    """Returns for each type of numbers how many values of the denoiser in a file have it.

    Raises:
        PatchError: a tensor is in a type that cannot be read, or no tensor of a GGUF file is in
            fewer bits. A .safetensors file may be in full precision: it can hold another model of
            the same shapes, such as one rounded by GPTQ, pruned or merged.
    """
    counts: Counter[str] = Counter()
    if path.suffix == GGUF:
        require_gguf()
        from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES

        few = {str(kind.name) for kind in SUPPORTED_GGUF_QUANT_TYPES} - set(FLOATS)
        header = read_gguf_header(path)
        for name in _of_denoiser(header):
            counts[header[name].kind.name] += math.prod(header[name].shape)
    else:
        few = set(_FP8_NAMES)
        with _opened(path) as file:
            for name in filter(_is_weight, _of_denoiser(file.keys())):
                stored = file.get_slice(name)
                counts[stored.get_dtype()] += math.prod(stored.get_shape())
    enough = few if path.suffix == GGUF else few | set(FLOATS)
    if not set(counts) & enough or set(counts) - few - set(FLOATS):
        raise file_error(
            path, f"a model in {', '.join(sorted(few))}, besides {', '.join(FLOATS)}",
            ", ".join(sorted(counts)) or "no tensors", "choose another file of the same model",
        )  # fmt: skip
    return dict(counts)


def read_student(path: Path) -> StudentTensors:
    """Reads the denoiser in a file.

    Raises:
        PatchError: as in `stored_types`, and if the file is damaged.
    """
    stored_types(path)
    return _read_gguf(path) if path.suffix == GGUF else _read_fp8(path)


def _of_denoiser(names: Iterable[str]) -> list[str]:
    """The names of the denoiser's tensors, sorted; all where none has the prefix."""
    known = sorted(names)
    return [name for name in known if name.startswith(PREFIX)] or known


def _is_weight(name: str) -> bool:
    return not name.endswith((*_SCALES, *_BESIDE)) and name.rpartition(".")[2] != _MARK


def _read_gguf(path: Path) -> StudentTensors:
    gguf, header = require_gguf(), read_gguf_header(path)
    return StudentTensors(
        {
            name.removeprefix(PREFIX): _gguf_tensor(path, header[name], gguf)
            for name in _of_denoiser(header)
        }
    )


def _gguf_tensor(path: Path, stored: GgufTensor, gguf: Any) -> Tensor:
    """A tensor of a GGUF file: matrices stay as they are stored."""
    from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor

    raw = torch.from_numpy(np.fromfile(path, np.uint8, stored.size, offset=stored.start))
    if stored.kind.name in FLOATS:
        return raw.view(FLOATS[stored.kind.name]).reshape(stored.shape)
    block, block_bytes = gguf.GGML_QUANT_SIZES[stored.kind]
    # Its own rows where each is made of whole blocks; in other rows blocks reach over their ends.
    shape = stored.rows if stored.shape[-1] % block else stored.shape
    rows = raw.reshape(*shape[:-1], shape[-1] // block * block_bytes)
    parameter = GGUFParameter(rows, quant_type=stored.kind)
    if len(stored.shape) == 2:
        return parameter
    values: Tensor = dequantize_gguf_tensor(parameter)
    return values.reshape(stored.shape)


def _read_fp8(path: Path) -> StudentTensors:
    tensors, scales = {}, {}
    with _opened(path) as file:
        for name in _of_denoiser(file.keys()):
            own = name.removeprefix(PREFIX)
            if _is_weight(name):
                tensors[own] = file.get_tensor(name)
            elif name.endswith(_SCALES):
                scales[f"{own.rpartition('.')[0]}.weight"] = file.get_tensor(name)
    return StudentTensors(tensors, _in_rows(path, tensors, scales))


def _in_rows(
    path: Path, tensors: Mapping[str, Tensor], scales: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Scales as (O, 1), one of each row of the weight: what cuts or joins rows can cut them too.

    Raises:
        PatchError: scales of no weight in 8-bit floating point, or in other numbers.
    """
    problems, fitting = [], {}
    for name, scale in scales.items():
        weight = tensors.get(name)
        if weight is None or weight.dtype not in FP8 or scale.numel() not in (1, len(weight)):
            problems.append(f"a scale of shape {tuple(scale.shape)} for {printable(name)}")
        else:
            fitting[name] = scale.float().reshape(-1, 1).expand(len(weight), 1).contiguous()
    if problems:
        raise file_error(
            path, "one scale for a weight in fp8, or one for each of its rows",
            "; ".join(problems), "choose another file",
        )  # fmt: skip
    return fitting


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Opens a safetensors file; what the library raises becomes a `PatchError`."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    # A KeyError or ValueError means a type of numbers that torch does not have.
    except (SafetensorError, KeyError, ValueError, RuntimeError, OSError) as error:
        if isinstance(error, PatchError):
            raise
        raise file_error(path, "a whole safetensors file", error, "get it again") from error
