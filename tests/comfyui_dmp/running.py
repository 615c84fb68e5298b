"""Runs ComfyUI's real models: single calls as its sampler makes them, and whole samplings."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import comfy.patcher_extension
import comfy.sample
import torch
from torch import Tensor

from comfyui_dmp.jobs import Job
from comfyui_dmp.teacher import Drawing
from dmp_common import Patch
from dmp_common.attach.record import LoadedPatch, PatchRecord


def record(patch: Patch, **settings: Any) -> PatchRecord:
    """A patch as it travels along a wire."""
    return PatchRecord(LoadedPatch(patch, Path("test.safetensors")), **settings)


def call(
    patcher: Any,
    family: Any,
    sigmas: Tensor,
    size: tuple[int, int] | None = None,
    **conds: Any,
) -> Tensor:
    """One call of the model, with the wrappers of its patcher; the denoised latent."""
    x, text, pooled = family.inputs(len(sigmas), size)
    model = patcher.model
    if family.adm:
        conds["y"] = model.encode_adm(
            pooled_output=pooled, height=8 * x.shape[2], width=8 * x.shape[3]
        )
    elif family.channels == 16:  # SD3 and Flux
        conds["y"] = pooled
    own = family.conds.items()
    conds = {name: made(len(x)) if callable(made) else made for name, made in own} | conds
    x = x * sigmas.reshape(-1, *[1] * (x.dim() - 1)).clamp(max=15)
    return call_with(patcher, x, sigmas, text, **conds)


def call_with(patcher: Any, x: Tensor, sigmas: Tensor, text: Tensor, **conds: Any) -> Tensor:
    """One call with a noisy latent and a caption; otherwise as `call`."""
    model = patcher.model
    options = copy.deepcopy(patcher.model_options["transformer_options"])
    extension = comfy.patcher_extension
    extension.merge_nested_dicts(
        options.setdefault("wrappers", {}), patcher.wrappers, copy_dict1=False
    )
    options["sigmas"] = sigmas
    object_patches = patcher.object_patches.get("model_sampling")
    before = model.model_sampling
    try:
        model.model_sampling = object_patches or before
        with torch.inference_mode():
            return model.apply_model(
                x,
                sigmas,
                c_crossattn=text,
                transformer_options=options,
                **conds,
            )
    finally:
        model.model_sampling = before


def sample(
    patcher: Any,
    family: Any,
    *,
    steps: int = 2,
    cfg: float = 5.0,
    count: int = 1,
    size: tuple[int, int] | None = None,
    negative_tokens: int | None = None,
    **extra: Any,
) -> Tensor:
    """A whole sampling through ComfyUI's own code, as the KSampler node does it."""
    x, text, pooled = family.inputs(1, size)
    latent = torch.zeros(count, *x.shape[1:])
    start = torch.randn(latent.shape, generator=torch.Generator().manual_seed(5))
    positive = [[text, {"pooled_output": pooled, **extra}]]
    negative = [[-text[:, :negative_tokens], {"pooled_output": -pooled}]]
    return comfy.sample.sample(
        patcher,
        start,
        steps,
        cfg,
        "euler",
        "normal",
        positive,
        negative,
        latent,
        disable_pbar=True,
        seed=5,
    )


def conditioning(family: Any, sign: float = 1.0) -> Any:
    """A conditioning as it travels along a wire."""
    _, text, pooled = family.inputs(1)
    return [[sign * text, {"pooled_output": sign * pooled}]]


def job(family: Any, **asked: Any) -> Job:
    """A small training of a family."""
    usual = {
        "positive": [conditioning(family), conditioning(family, 0.5)],
        "negative": conditioning(family, -1.0),
        "size": (128, 64),
        "objective": "repair",
        "cfg": 3.0,
        "dial": False,
        "pictures": 2,
        "at_once": 2,
        "steps": 8,
        "learning_rate": 0.02,
        "how": Drawing("euler", "normal", 2, 7),
    }
    return Job(**{**usual, **asked})


def rounded(family: Any) -> Any:
    """The cheap model of a family: weights rounded to a few values."""
    patcher = family.comfy()
    with torch.no_grad():
        for parameter in patcher.model.diffusion_model.parameters():
            if parameter.dim() > 1:
                step = parameter.abs().amax() / 3
                parameter.copy_((parameter / step).round() * step)
    return patcher


def repair(family: Any, **changes: Any) -> Job:
    """A small training of the rounded model of a family."""
    cheap = changes.pop("model", None) or rounded(family)
    return job(family, **{"model": cheap, "teacher": family.comfy(), **changes})
