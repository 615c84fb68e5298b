"""What the folder of a trained DiT says besides diffusers' configuration: text, time embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file

from dmp_common import PatchError
from dmp_common.patch.serialize import parse_json, read_bounded
from training.base.families import dit

TEXT_FILE = "text_conditioning.json"  # in the folder of a text-conditional DiT
TIME_FILE = "time_embedding.json"  # in the folder of a DiT that came from an original checkpoint
_MAX_FACTS = 1024**2  # bytes; it has two numbers


def text_facts(folder: Path) -> dict[str, Any] | None:
    """Returns "size" and "frequency_shift" of a text-conditional DiT, None for another folder.

    Raises:
        PatchError: the file that says so is damaged.
    """
    path = folder / TEXT_FILE
    if not path.is_file():
        return None
    try:
        facts = _facts(path)
        return {"size": int(facts["size"]), "frequency_shift": float(facts["frequency_shift"])}
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise PatchError(
            f"expected the size of the text embedding in {path}, found {error!r}: get the folder "
            "again."
        ) from error


def text_dit(folder: Path, text: dict[str, Any], device: str = "cpu") -> Any:
    """Returns a DiT with a text embedding, in float32, from the folder of --method full.

    Args:
        folder: of the denoiser.
        text: see `text_facts`.
        device: "meta" for the model without its weights.

    Raises:
        PatchError: the weights are missing or do not fit.
    """
    cls: Any = diffusers.DiTTransformer2DModel
    with torch.device(device):
        model = cls.from_config(cls.load_config(folder))
    dit.use_text(model, text["size"])
    dit.set_frequency_shift(model, text["frequency_shift"])
    if device == "meta":
        return model
    weights = folder / "diffusion_pytorch_model.safetensors"
    try:
        model.load_state_dict(load_file(weights))
    except (OSError, RuntimeError) as error:
        raise PatchError(
            f"expected the weights of a text-conditional DiT at {weights}, found "
            f"{' '.join(str(error).split())[:200]}: get the folder again."
        ) from error
    return model


def set_time_embedding(model: Any, folder: Path) -> None:
    """Gives a DiT trained from an original checkpoint the constant of its time embedding, which
    diffusers' own configuration cannot hold.

    Raises:
        PatchError: the file that says so is damaged.
    """
    path = folder / TIME_FILE
    if not path.is_file():
        return
    try:
        shift = float(_facts(path)["frequency_shift"])
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise PatchError(
            f"expected the frequency shift of the time embedding in {path}, found {error!r}: get "
            "the folder again."
        ) from error
    dit.set_frequency_shift(model, shift)


def _facts(path: Path) -> dict[str, Any]:
    """The entries of a small JSON file."""
    facts = parse_json(read_bounded(path, _MAX_FACTS, "a small JSON file"))
    if not isinstance(facts, dict):
        raise ValueError("JSON that is no object")
    return facts
