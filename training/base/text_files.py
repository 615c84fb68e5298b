"""Text encoders from single files, as they are handed around for Flux and SD3, and from folders.

The tensors of such a file have the names of transformers: clip_l and clip_g those of CLIPTextModel
and CLIPTextModelWithProjection, t5xxl those of T5EncoderModel.
"""

from __future__ import annotations

import re
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
# What such files also hold, and a text encoder does not need: the other half of CLIP or T5, eyes of
# a language model, a tokenizer as bytes, markers.
_IGNORED = (
    *("vision_model.", "visual_projection.", "logit_scale", "decoder.", "lm_head."),
    *("vision_tower.", "multi_modal_projector."),
)
_IGNORED_NAMES = ("spiece_model", "tekken_model", "scaled_fp8")
# A language model inside of a model of pictures and text, by its class in transformers: a pattern
# of what comes before the names of its tensors.
_INSIDE = dict.fromkeys(
    ("MistralModel", "Ministral3Model"), r"^(model\.)?language_model\.(model\.)?"
)
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_REMEDY = "give the file of this text encoder in the naming of transformers"


def text_encoder_of_folder(
    cls: Any, place: str, folder: str, dtype: torch.dtype, layers: int | None
) -> torch.nn.Module:
    """Returns a text encoder with weights from a folder or repository.

    Args:
        cls: the class in transformers.
        place: the pipeline.
        folder: of the text encoder there.
        dtype: of the weights.
        layers: see `load_text_encoder`.

    Raises:
        PatchError: it lacks some of the tensors.
    """
    options: dict[str, Any] = {} if layers is None else {"num_hidden_layers": layers}
    if cls.__name__ in _INSIDE:
        options["key_mapping"] = {_INSIDE[cls.__name__]: ""}
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # else it lists every tensor that is left out
    try:
        model, report = cls.from_pretrained(
            place, subfolder=folder, dtype=dtype, output_loading_info=True, **options
        )
    finally:
        transformers.logging.set_verbosity(before)
    if report["missing_keys"]:  # which it fills with random numbers
        names = sorted(report["missing_keys"])
        raise PatchError(
            f"{place}: expected the weights of a {cls.__name__} in {folder}, found none for "
            f"{len(names)} of its tensors ({', '.join(names[:3])}): choose another folder."
        )
    return _cut(model, layers)


def load_text_encoder(
    path: Path,
    cls: Any,
    config: Any,
    dtype: torch.dtype,
    prefix: str = "",
    layers: int | None = None,
) -> torch.nn.Module:
    """Returns a text encoder with weights from a file.

    Args:
        path: a `.safetensors` file, or a pickled one, which is read without running it.
        cls: the class in transformers.
        config: its configuration.
        dtype: of the result; weights in fp8 are converted, with their scales if there are any.
        prefix: what comes before the names of its tensors in a file with several parts.
        layers: how many of a language model's layers are needed: the others, which the file may
            lack, and the last norm are left out. None for all.

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
    if layers is not None:
        config.num_hidden_layers = layers
        tensors = {name: value for name, value in tensors.items() if not _above(name, layers)}
    # transformers knows how its own names changed from release to release.
    model, report = cls.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True,
        ignore_mismatched_sizes=True,
    )  # fmt: skip
    spare = set() if layers is None else {"norm.weight"}
    for kind, what in (
        ("mismatched_keys", "of another size"),
        ("missing_keys", "missing"),
        ("unexpected_keys", "of no use"),
    ):
        names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in report[kind])
        names = [name for name in names if name not in spare]
        if names:
            found = f"{len(names)} tensors {what} ({', '.join(names[:3])})"
            raise file_error(path, f"the weights of a {cls.__name__}", found, _REMEDY)
    return _cut(model, layers)


def _cut(model: Any, layers: int | None) -> torch.nn.Module:
    """The model; its last hidden state is that of its last layer, where layers are left out."""
    assert isinstance(model, torch.nn.Module)
    if layers is not None:
        model.norm = torch.nn.Identity()
    return model


def _above(name: str, layers: int) -> bool:
    """Whether a tensor is of a layer that is left out, or of the norm after them all."""
    found = _LAYER.search(name)
    return name.endswith("model.norm.weight") if found is None else int(found[1]) >= layers


def _pickled(path: Path) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in checkpoint.read_tensors(path).items()}


def _unscaled(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors without fp8: each weight times its scale, where it has one."""
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith((*_SCALES, ".scale_input", ".input_scale", ".comfy_quant")):
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
