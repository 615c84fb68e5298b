"""VAEs from single files: those that diffusers reads, and FLUX.2's, which it does not read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from torch import Tensor

from dmp_common.errors import file_error

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
    model = cls.from_config(config)
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    named.setdefault("bn.num_batches_tracked", torch.zeros((), dtype=torch.long))  # never read
    found = {name: tuple(value.shape) for name, value in named.items()}
    wrong = sorted(name for name, shape in wanted.items() if found.get(name) != shape)
    wrong += sorted(found.keys() - wanted.keys())
    if wrong:
        raise file_error(
            path, f"the {len(wanted)} tensors of a {cls.__name__}",
            f"{len(wrong)} that are missing, unknown or of another size ({', '.join(wrong[:3])})",
            "give the VAE of FLUX.2",
        )  # fmt: skip
    model.load_state_dict(named)
    return model.to(dtype)


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
READERS: dict[str, Callable[..., Any]] = {"AutoencoderKLFlux2": flux2_vae}
