"""Text encoders from single files, as they are handed around for Flux and SD3.

The tensors of such a file have the names of transformers: clip_l and clip_g those of CLIPTextModel
and CLIPTextModelWithProjection, t5xxl those of T5EncoderModel.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from dmp_common import PatchError
from dmp_common.errors import file_error
from training.base.families import checkpoint

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = (".scale_weight", ".weight_scale")  # of weights in fp8, as ComfyUI saves them
# What such files also hold, and a text encoder does not need: the other half of CLIP or T5, a
# tokenizer as bytes, markers.
_IGNORED = ("vision_model.", "visual_projection.", "logit_scale", "decoder.", "lm_head.")
_IGNORED_NAMES = ("spiece_model", "scaled_fp8")
_REMEDY = "give the file of this text encoder in the naming of transformers"


def load_text_encoder(
    path: Path, cls: Any, config: Any, dtype: torch.dtype, prefix: str = ""
) -> torch.nn.Module:
    """Returns a text encoder with weights from a file.

    Args:
        path: a `.safetensors` file, or a pickled one, which is read without running it.
        cls: the class in transformers.
        config: its configuration.
        dtype: of the result; weights in fp8 are converted, with their scales if there are any.
        prefix: what comes before the names of its tensors in a file with several parts.

    Raises:
        PatchError: the file has too few tensors, others, or some of another size.
    """
    stored = load_file(path) if path.suffix in (".safetensors", ".sft") else _pickled(path)
    tensors = {
        name.removeprefix(prefix): value
        for name, value in stored.items()
        if name.startswith(prefix)
    }
    tensors = _only_text(_unscaled(tensors, dtype), cls)
    _project(tensors, cls)
    # transformers knows how its own names changed from release to release.
    model, report = cls.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True,
        ignore_mismatched_sizes=True,
    )  # fmt: skip
    for kind, what in (
        ("mismatched_keys", "of another size"),
        ("missing_keys", "missing"),
        ("unexpected_keys", "of no use"),
    ):
        if report[kind]:
            names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in report[kind])
            found = f"{len(names)} tensors {what} ({', '.join(names[:3])})"
            raise file_error(path, f"the weights of a {cls.__name__}", found, _REMEDY)
    assert isinstance(model, torch.nn.Module)
    return model


def _pickled(path: Path) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in checkpoint.read_tensors(path).items()}


def _unscaled(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors without fp8: each weight times its scale, where it has one."""
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith((*_SCALES, ".scale_input", ".input_scale")):
            continue
        if tensor.dtype in _FP8:
            stem = name.removesuffix(".weight")
            scales = [tensors[stem + end] for end in _SCALES if stem + end in tensors]
            value = tensor.float()
            for scale in scales:
                value = value * scale.float()
            tensor = value.to(dtype)
        plain[name] = tensor
    return plain


def _only_text(tensors: dict[str, Tensor], cls: type) -> dict[str, Tensor]:
    # Some files of CLIP-L have a projection.
    extra = ("text_projection.",) if cls is transformers.CLIPTextModel else ()
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith((*_IGNORED, *extra))
        and name not in _IGNORED_NAMES
        and not name.endswith(".position_ids")
    }


def _project(tensors: dict[str, Tensor], cls: type) -> None:
    """Adds the projection that a clip_l.safetensors of SD3 may lack: there it is the identity.

    Source: Stability's reference code of SD3, other_impls.py, CLIPTextModel.
    """
    name = "text_projection.weight"
    if cls is not transformers.CLIPTextModelWithProjection or name in tensors:
        return
    norm = tensors.get("text_model.final_layer_norm.weight")
    if norm is None:
        raise PatchError(
            f"expected the weights of a {cls.__name__}, found no text_model.final_layer_norm in "
            f"the file: {_REMEDY}."
        )
    tensors[name] = torch.eye(len(norm), dtype=norm.dtype)
