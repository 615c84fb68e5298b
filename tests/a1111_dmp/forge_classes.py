"""Model classes of Forge and Forge Neo in small, with the weights of ComfyUI's.

They are built with the host's own configuration of a family and called by its own `KModel`, with
the schedule of its engine for the family.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import torch.nn as nn
from torch import Tensor

# For each family of ComfyUI's that Forge Neo has an engine for: module and class of the model, the
# class that its loader takes a checkpoint for, and a base of the table that is of the family.
CLASSES = {
    "sd15": ("unet", "IntegratedUNet2DConditionModel", "SD15", "sd15"),
    "sdxl": ("unet", "IntegratedUNet2DConditionModel", "SDXL", "sdxl"),
    "flux": ("flux", "IntegratedFluxTransformer2DModel", "Flux", "flux"),
    "flux2": ("flux", "IntegratedFluxTransformer2DModel", "Flux2K4B", "flux2-klein-4b"),
    "chroma": ("chroma", "IntegratedChromaTransformer2DModel", "Chroma", "chroma"),
    "qwen-image": ("qwen", "QwenImageTransformer2DModel", "QwenImage", "qwen-image"),
    "lumina2": ("lumina", "NextDiT", "Lumina2", "lumina2"),
    "z-image": ("lumina", "NextDiT", "ZImage", "z-image"),
    "ernie-image": ("ernie", "ErnieImageModel", "ErnieImage", "ernie-image"),
    "krea2": ("krea", "SingleStreamDiT", "Krea2", "krea2"),
    "anima": ("anima", "Anima", "Anima", "anima"),
    "wan": ("wan", "WanModel", "WAN21_T2V", "wan-14b"),
    "wan-picture": ("wan", "WanModel", "WAN21_T2V", "wan22-i2v-14b"),
}
_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def find() -> Path:
    """The folder of Forge Neo, made importable; skips without it."""
    path = Path(os.environ.get("WEBUI_PATH", ""))
    if not (path / "backend" / "nn" / "anima.py").is_file():
        pytest.skip("needs Forge Neo's source: set WEBUI_PATH to its folder")
    for folder in (path, path / "modules_forge" / "packages"):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    before = sys.argv[:]
    sys.argv[1:] = ["--cpu"]  # the host reads it
    try:
        parts = {f"nn.{module}" for module, *_ in CLASSES.values()}
        for name in (*sorted(parts), "modules.k_model", "operations"):
            imported(name)  # before anything stands in for the host's `modules`
    finally:
        sys.argv[:] = before
    return path


def imported(name: str) -> Any:
    """A module of the host's `backend`; skips without the packages that it needs."""
    try:
        return importlib.import_module(f"backend.{name}")
    except ImportError as error:
        pytest.skip(f"needs the Python packages of Forge Neo: {error}")


def model_of(family: Any) -> nn.Module:
    """The host's `KModel` around its model of a family."""
    module, kind, guess, _ = CLASSES[family.name]
    guesses = importlib.import_module("huggingface_guess.model_list")
    config = getattr(guesses, guess)(family.unet)
    build = getattr(imported(f"nn.{module}"), kind)
    known = inspect.signature(build.__init__).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in known.values())
    given = {k: v for k, v in config.unet_config.items() if anything or k in known}
    given.pop("image_model", None)
    layers = {"device": torch.device("cpu"), "dtype": torch.float32, "manual_cast_enabled": False}
    with imported("operations").using_forge_operations(**layers):
        model = build(**given)
    model.load_state_dict(family.convert(family.diffusers().state_dict()))
    model.storage_dtype = model.computation_dtype = torch.float32
    config.model_type = config.model_type({})
    scheduler, predictor = None, None
    if config.model_type.name == "EPS":
        scheduler = diffusers.EulerDiscreteScheduler(prediction_type="epsilon", **_BETAS)
    else:
        kind = "DiscreteFlow" if config.model_type.name == "FLOW" else "Flux"  # as its engines do
        predictor = getattr(imported("modules.k_prediction"), f"Prediction{kind}")(config)
    return imported("modules.k_model").KModel(model, scheduler, config, predictor).eval()


@dataclass(frozen=True)
class Loaded:
    """A model as the host has loaded it, which stands for its `shared.sd_model`."""

    k_model: Any

    @property
    def shared(self) -> SimpleNamespace:
        """The host's `shared.sd_model`."""
        return SimpleNamespace(
            forge_objects=SimpleNamespace(unet=SimpleNamespace(model=self.k_model)),
            sd_checkpoint_info=SimpleNamespace(filename="models/own.safetensors"),
        )

    @property
    def denoiser(self) -> nn.Module:
        found: nn.Module = self.k_model.diffusion_model
        return found

    def call(self, x: Tensor, sigmas: Tensor, text: Tensor, **conds: Any) -> Tensor:
        """The denoised latent, as the host's sampler asks for it."""
        with torch.inference_mode():
            return self.k_model.apply_model(x, sigmas, c_crossattn=text, **conds)
