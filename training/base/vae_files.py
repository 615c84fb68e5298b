"""Parts from single files that diffusers does not read: VAEs, Anima's text conditioner, and the
transformer of HunyuanImage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from torch import Tensor

from dmp_common.errors import file_error
from training.base.hunyuan_files import transformer_named, vae_named

# FLUX.2's original code has these two layers inside of its halves.
_MOVED = {"encoder.quant_conv.": "quant_conv.", "decoder.post_quant_conv.": "post_quant_conv."}


def flux2_vae(
    tensors: dict[str, Tensor], cls: Any, config: dict[str, Any], path: Path, dtype: torch.dtype
) -> Any:
    """Returns FLUX.2's VAE.

    Args:
        tensors: in the naming of the original code (ae.safetensors, flux2-vae.safetensors), or in
            that of diffusers.
        cls: its class in diffusers.
        config: its configuration there.
        path: of the file, for the error.
        dtype: of the weights.

    Raises:
        PatchError: the tensors are not those of such a VAE; all problems at once.
    """
    named = _named_as_diffusers(tensors, config)
    named.setdefault("bn.num_batches_tracked", torch.zeros((), dtype=torch.long))  # never read
    return _filled(named, cls, config, path, "give the VAE of FLUX.2").to(dtype)


def qwen_vae(
    tensors: dict[str, Tensor], cls: Any, config: dict[str, Any], path: Path, dtype: torch.dtype
) -> Any:
    """Returns Qwen-Image's VAE, whose original names are those of Wan's; otherwise as
    `flux2_vae`."""
    if not any(name.startswith("encoder.down_blocks.") for name in tensors):
        convert: Any = SINGLE_FILE_LOADABLE_CLASSES["AutoencoderKLWan"]["checkpoint_mapping_fn"]
        tensors = convert(checkpoint=dict(tensors))
    return _filled(tensors, cls, config, path, "give the VAE of Qwen-Image").to(dtype)


def conditioner(
    tensors: dict[str, Tensor], cls: Any, config: dict[str, Any], path: Path, dtype: torch.dtype
) -> Any:
    """Returns Anima's text conditioner, whose names are equal everywhere; otherwise as
    `flux2_vae`."""
    return _filled(tensors, cls, config, path, "give the transformer of Anima").to(dtype)


def hunyuan_vae(
    tensors: dict[str, Tensor], cls: Any, config: dict[str, Any], path: Path, dtype: torch.dtype
) -> Any:
    """Returns HunyuanImage's VAE; otherwise as `flux2_vae`."""
    if not any(name.startswith("encoder.down_blocks.") for name in tensors):
        tensors = vae_named(tensors, _blank(cls, config).state_dict())
    return _filled(tensors, cls, config, path, "give the VAE of HunyuanImage 2.1").to(dtype)


def hunyuan_transformer(
    tensors: dict[str, Tensor], cls: Any, config: dict[str, Any], path: Path, dtype: torch.dtype
) -> Any:
    """Returns HunyuanImage's transformer; otherwise as `flux2_vae`."""
    if not any(name.startswith("transformer_blocks.") for name in tensors):
        tensors = transformer_named(tensors, _blank(cls, config).state_dict())
    tensors = {name: value.to(dtype) for name, value in tensors.items()}
    return _filled(tensors, cls, config, path, "give the transformer of HunyuanImage 2.1")


def _blank(cls: Any, config: dict[str, Any]) -> Any:
    """A model whose weights take no memory."""
    with init_empty_weights():
        return cls.from_config(config)


def _filled(
    tensors: dict[str, Tensor], cls: Any, config: dict[str, Any], path: Path, remedy: str
) -> Any:
    """Returns a model of exactly these tensors, in the naming of diffusers."""
    model = _blank(cls, config)
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    wrong = sorted(name for name, shape in wanted.items() if found.get(name) != shape)
    wrong += sorted(found.keys() - wanted.keys())
    if wrong:
        raise file_error(
            path, f"the {len(wanted)} tensors of a {cls.__name__}",
            f"{len(wrong)} that are missing, unknown or of another size ({', '.join(wrong[:3])})",
            remedy,
        )  # fmt: skip
    model.load_state_dict(tensors, assign=True)
    return model


def _named_as_diffusers(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    if any(name.startswith("encoder.down_blocks.") for name in tensors):
        return dict(tensors)
    moved = {}
    for name, value in tensors.items():
        for old, new in _MOVED.items():
            if name.startswith(old):
                name = new + name.removeprefix(old)
        moved[name] = value
    convert: Any = SINGLE_FILE_LOADABLE_CLASSES["AutoencoderKL"]["checkpoint_mapping_fn"]
    norm = {name: value for name, value in moved.items() if name.startswith("bn.")}
    renamed: dict[str, Tensor] = convert(checkpoint=moved, config=config)
    return {**renamed, **norm}


# By the name of the class in diffusers.
READERS: dict[str, Callable[..., Any]] = {
    "AutoencoderKLFlux2": flux2_vae,
    "AutoencoderKLHunyuanImage": hunyuan_vae,
    "AutoencoderKLQwenImage": qwen_vae,
    "AnimaTextConditioner": conditioner,
    "HunyuanImageTransformer2DModel": hunyuan_transformer,
}
