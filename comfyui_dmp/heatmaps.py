"""What the heat map of a gate shows: the time embeddings that the gate sees in a ComfyUI model."""

from __future__ import annotations

from typing import Any

import comfy.samplers
import torch
from torch import Tensor

from comfyui_dmp.checks import require_fitting
from comfyui_dmp.model import denoiser_of, time_embedding, timesteps_of
from dmp_common import PatchError
from dmp_common.attach.record import PatchRecord


def gate_embedding(
    model: Any, record: PatchRecord, scheduler: str, steps: int, label: int
) -> tuple[Tensor, Tensor]:
    """Computes the time embeddings that the gate of a patch sees in a model, for heat maps.

    Args:
        model: ComfyUI's `ModelPatcher`, which need not be loaded.
        record: the patch.
        scheduler, steps: ComfyUI's scheduler and its number of steps, which give the noise levels.
        label: the class label, for patches whose gate sees the class (condition t+y).

    Returns:
        The embeddings (T, E) in float32, and their timesteps (T,) on the scale 0..1000, both on
        the CPU.

    Raises:
        PatchError: the model is not of the patch's base, or it does not have this class.
    """
    patch, base_model = record.loaded.patch, model.model
    model_sampling = model.get_model_object("model_sampling")
    require_fitting(base_model, model_sampling, record)
    sigmas = comfy.samplers.calculate_sigmas(model_sampling, scheduler, steps)
    timesteps = timesteps_of(model_sampling, patch.base, sigmas[sigmas > 0]).cpu()
    denoiser = denoiser_of(base_model)
    device = next(denoiser.get_submodule(patch.base.times["ldm"].mlp).parameters()).device
    with torch.no_grad():
        e = time_embedding(base_model, patch.base, timesteps.to(device)).float()
        if patch.variant.condition == "t+y":
            table = denoiser.get_submodule("y_embedder.embedding_table")
            if not 0 <= label < table.num_embeddings:
                raise PatchError(
                    f"{record.loaded.name}: expected a class label from 0 to "
                    f"{table.num_embeddings - 1}, found {label}: choose one that the model knows."
                )
            e = e + table.weight[label].float()
    return e.cpu(), timesteps
