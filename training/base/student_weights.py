"""A model with the weights of a file in fewer bits (--student_weights)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from torch import Tensor

from dmp_common import PatchError
from dmp_common.bases.detect import bases_of_shapes
from dmp_common.errors import file_error, printable
from training.base.families import checkpoint
from training.base.frozen import FrozenBase
from training.base.hunyuan_files import transformer_named
from training.base.layers import copy_sharing, linear_layers, replace_layer
from training.base.places import explained
from training.base.stored import Fp8Linear, GgufLinear
from training.base.student_files import FP8, PREFIX, read_student, student_shapes

_OPTION = "--student_weights"
_MOST_SHOWN = 5
_MOST_SHARED = 0.8  # of an original's names
_CONDITIONER = re.compile(r"(net\.)?llm_adapter\.")


def load_student(frozen: FrozenBase, path: Path) -> nn.Module:
    """Returns a model of a base with the weights of a file.

    Linear layers of the blocks keep their weights as the file stores them and compute them in each
    call. Other tensors (convolutions, embeddings, norms) are computed once, in the precision of the
    base.

    Args:
        frozen: the exact base. Nothing of its weights is used; they may be on the meta device.
        path: a file in GGUF or in 8-bit floating point, in the naming of diffusers or the original.

    Raises:
        PatchError: the file is of another base, lacks tensors, or is damaged.
    """
    shapes = student_shapes(path)
    fitting = bases_of_shapes(shapes)
    if frozen.base not in fitting:
        seen = ", ".join(base.name for base in fitting) or "none that is known"
        raise file_error(
            path, f"weights of base {frozen.base.name}", f"those of {seen}",
            f"choose a file of the same base for {_OPTION}",
        )  # fmt: skip
    read = read_student(path)
    tensors = _named_as(frozen.model, read.tensors, path)
    scales = {}
    if read.scales:
        # The same renaming cuts and joins the rows of the scales as it does those of the weights.
        whole = {name: read.scales.get(name, _rows(value)) for name, value in read.tensors.items()}
        scales = _named_as(frozen.model, whole, path)
        unscaled = {name for name, value in tensors.items() if value.dtype not in FP8}
        scales = {name: value for name, value in scales.items() if name not in unscaled}
    _require_all(frozen.model, tensors, path)
    return _with_weights(frozen.model, tensors, scales)


def _rows(value: Tensor) -> Tensor:
    """Ones (O, 1) for a matrix without a scale; other tensors as they are."""
    return torch.ones(len(value), 1) if value.dim() == 2 else value


def _named_as(model: Any, tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors under the names of diffusers.

    Args:
        model: of diffusers.
        tensors: under its names, or those of the original code.
    """
    kind = type(model).__name__
    # Anima's files hold the conditioner of its text as well.
    tensors = {name: value for name, value in tensors.items() if not _CONDITIONER.match(name)}
    # Some originals share names with diffusers, up to two of three.
    shared = len(set(tensors) & set(model.state_dict()))
    if "x_embedder.proj.weight" not in tensors and shared > _MOST_SHARED * len(tensors):
        return dict(tensors)
    if kind == "HunyuanImageTransformer2DModel":
        return transformer_named(tensors, model.state_dict())
    if kind not in SINGLE_FILE_LOADABLE_CLASSES:
        return checkpoint.rename(tensors)
    # diffusers knows the original UNet with this prefix only, and others not always with it.
    prefix = PREFIX if kind == "UNet2DConditionModel" else ""
    prefixed = {prefix + name: value for name, value in tensors.items()}
    rename: Any = SINGLE_FILE_LOADABLE_CLASSES[kind]["checkpoint_mapping_fn"]
    with explained(f"weights of a {kind} in the naming of the original code", str(path), _OPTION):
        renamed: dict[str, Tensor] = rename(checkpoint=prefixed, config=dict(model.config))
    return renamed


def _require_all(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuses tensors that are not those of a model: all problems at once."""
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    problems = [f"no {name}" for name in wanted if name not in tensors]
    problems += [f"{printable(name)}, which it has not" for name in tensors if name not in wanted]
    for name, shape in wanted.items():
        if name in tensors and not _fits(tensors[name], shape):
            problems.append(f"{name} of shape {_shape(tensors[name])}, which should be {shape}")
    if problems:
        more = f" and {len(problems) - _MOST_SHOWN} more" if len(problems) > _MOST_SHOWN else ""
        raise PatchError(
            f"{path}: expected the {len(wanted)} tensors of a {type(model).__name__}, found "
            f"{'; '.join(problems[:_MOST_SHOWN])}{more}: choose a file of the whole model."
        )


def _is_stored(tensor: Tensor) -> bool:
    return hasattr(tensor, "quant_type")


def _shape(tensor: Any) -> tuple[int, ...]:
    """The shape of the values that a tensor stands for."""
    return tuple(tensor.quant_shape if _is_stored(tensor) else tensor.shape)


def _fits(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a tensor has a shape, or as many values where it is stored in other rows."""
    found = _shape(tensor)
    return found == shape or (_is_stored(tensor) and math.prod(found) == math.prod(shape))


def _with_weights(
    exact: nn.Module, tensors: Mapping[str, Tensor], scales: Mapping[str, Tensor]
) -> nn.Module:
    """A copy of a model with other weights."""
    before = exact.state_dict()
    model = copy_sharing(exact)
    replaced = set()
    for path, layer in linear_layers(exact).items():
        weight, bias = tensors[f"{path}.weight"], tensors.get(f"{path}.bias")
        if bias is not None:
            bias = _plain(bias, before[f"{path}.bias"])
        device = _home(layer.weight)
        replaced |= {f"{path}.weight", f"{path}.bias"}
        if _is_stored(weight):
            stored: Any = weight
            replace_layer(model, path, GgufLinear(layer, stored.to(device), bias))
        elif weight.dtype in FP8:
            scale = scales.get(f"{path}.weight", torch.ones(()))
            kept = nn.Parameter(weight.to(device), requires_grad=False)
            replace_layer(model, path, Fp8Linear(layer, kept, bias, scale.to(device)))
        else:
            replaced -= {f"{path}.weight", f"{path}.bias"}
    for name, _ in list(model.named_parameters(remove_duplicate=False)):
        if name not in replaced:
            plain = _plain(tensors[name], before[name], scales.get(name))
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, nn.Parameter(plain, requires_grad=False))
    for name, buffer in model.named_buffers():
        if name in tensors:
            buffer.copy_(tensors[name])
    return model


def _home(like: Tensor) -> torch.device:
    """Where the values that take a tensor's place belong: the CPU, where its own were given back
    already."""
    return torch.device("cpu") if like.is_meta else like.device


def _plain(tensor: Any, like: Tensor, scale: Tensor | None = None) -> Tensor:
    """The values of a tensor in the precision, the shape and the place of another."""
    if _is_stored(tensor):
        from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

        tensor = dequantize_gguf_tensor(tensor)
    values: Tensor = tensor.to(_home(like), like.dtype)
    if scale is not None:
        values = values * scale.to(values.device, like.dtype)
    return values.reshape(like.shape)
