"""Trains a patch in ComfyUI: first the exact model's predictions, then the cheap model."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from PIL import Image
from torch import Tensor

from comfyui_dmp import plots, trained
from comfyui_dmp.fitting import Recipe
from comfyui_dmp.gradients import usable
from comfyui_dmp.host import attach
from comfyui_dmp.jobs import REPAIR, Job, prepared_patch
from comfyui_dmp.progress import Progress
from comfyui_dmp.states import States, held_back
from comfyui_dmp.student import Learned, Student
from comfyui_dmp.teacher import draw
from dmp_common import Base, PatchError
from dmp_common.attach.record import LoadedPatch, PatchRecord

_log = logging.getLogger(__name__)
_WARMUP = 50  # steps, and at most a tenth of all


@dataclass(frozen=True)
class Outcome:
    """What the training made.

    Args:
        record: the patch, in a file of ComfyUI's temporary folder.
        curve: a picture of the loss.
        beside: the models' pictures side by side (1, H, W, 3).
        pictures: the same as a batch (3, h, w, 3): exact, cheap, cheap with the patch.
    """

    record: PatchRecord
    curve: Image.Image
    beside: Tensor
    pictures: Tensor


@dataclass
class _Drawn:
    """What the exact model drew: the states of each run, and a picture that is not trained on."""

    runs: list[States] = field(default_factory=list)
    noise: Tensor = field(default_factory=lambda: torch.zeros(0))
    latents: Tensor = field(default_factory=lambda: torch.zeros(0))


def train(job: Job, node: str | None = None) -> Outcome:
    """Trains a patch. An interrupt ends the training, and what is trained so far comes out.

    What comes out is never further from the exact model, at states that were not trained on, than
    what the training began with.

    Args:
        job: what is asked for.
        node: ComfyUI's id of the node, for its progress bar.

    Raises:
        PatchError: the inputs do not fit each other, or there is nothing to learn.
    """
    # ComfyUI runs nodes in inference mode, whose tensors cannot be trained.
    with torch.inference_mode(False):
        patch, before = prepared_patch(job)
    base = patch.base
    runs = job.runs
    drawings = range(len(runs) + (job.teacher is not None))
    progress = Progress(sum(job.how.steps_of(n) for n in drawings), job.steps, node)
    drawn = _drawn(job, base, runs, progress)
    drawn.runs = _own(drawn.runs, patch.variant.timesteps)
    if job.teacher is not None:
        comfy.model_management.unload_all_models()
    loaded = LoadedPatch(patch, trained.temporary(base.name, job.objective))
    conditionings, seed = [job.negative, *job.positive], job.how.seed % 2**63
    with torch.inference_mode(False):
        learned = Student(job.model, loaded, job.recompute).train(
            *held_back(drawn.runs, seed),
            [None if cond is None else usable(cond) for cond in conditionings],
            Recipe(job.steps, job.learning_rate, min(_WARMUP, job.steps // 10)),
            job.at_once,
            seed,
            progress.trained,
        )
        _say(learned, progress.done, job.steps)
        done = progress.done if learned.better else 0
        facts = trained.metadata(job, loaded.patch, before, done, learned.rate)
        record = trained.stored(loaded, facts)
    return Outcome(record, progress.curve(learned.left), *_beside(job, record, drawn))


def _own(runs: Sequence[States], timesteps: tuple[int, int]) -> list[States]:
    """Returns the states of each run at the timesteps of the patch.

    Raises:
        PatchError: there are none.
    """
    found = [own for run in runs if len(own := run.within(timesteps))]
    if not found:
        raise PatchError(
            f"expected noise levels at timesteps from {timesteps[0]} to {timesteps[1]}, those of "
            "the patch, found none among the steps of the sampler: raise sampling_steps."
        )
    return found


def _say(learned: Learned, done: int, steps: int) -> None:
    """Logs how a training ended."""
    if done < steps:
        _log.info("DMP: interrupted after %d of %d steps.", done, steps)
    _log.info(
        "DMP: learning rate %.2g; %.0f%% of the gap is left at noisy latents that were not "
        "trained on.",
        learned.rate,
        100 * learned.left,
    )
    if learned.better:
        _log.info("DMP: the patch that was trained comes out.")
    else:
        _log.warning(
            "DMP: the training made the patch no better than it was, so it comes out as it was "
            "before: train for more steps, draw more pictures, or lower the learning rate."
        )


def _drawn(job: Job, base: Base, runs: Sequence[tuple[int, int]], progress: Progress) -> _Drawn:
    """Lets the exact model draw pictures of every conditioning."""
    latent_format, drawn = job.exact.model.latent_format, _Drawn()
    # ComfyUI 0.8 does not know the ratio; there only the latents of Flux.2 have another.
    usual = 16 if latent_format.latent_channels == 128 else 8
    ratio = getattr(latent_format, "spacial_downscale_ratio", usual)
    width, height = (side // ratio for side in job.size)

    def drawing(n: int, number: int, count: int) -> tuple[list[States], Tensor, Tensor]:
        frames = () if job.length == 1 else (job.latent_frames,)
        empty = torch.zeros(count, latent_format.latent_channels, *frames, height, width)
        shape = tuple(comfy.sample.fix_empty_latent_channels(job.exact, empty).shape)
        return draw(
            job.exact,
            base,
            job.aim,
            job.how,
            job.positive[number - 1],
            job.negative,
            number,
            n,
            shape,
            lambda denoised: progress.drew(job.exact, denoised),
        )

    with torch.no_grad():
        for n, (number, count) in enumerate(runs):
            kept, noise, _ = drawing(n, number, count)
            drawn.runs.append(States.joined(kept))
        drawn.noise = torch.randn(noise[:1].shape, generator=job.how.source(len(runs)))
        if job.teacher is not None:
            _, drawn.noise, drawn.latents = drawing(len(runs), 1, 1)
    return drawn


def _beside(job: Job, record: PatchRecord, drawn: _Drawn) -> tuple[Tensor, Tensor]:
    """Draws a picture from fresh noise with both models, without and with the patch.

    Returns:
        The pictures side by side with labels, and as a batch.
    """
    nothing = plots.as_tensor(Image.new("RGB", (64, 64), (255, 255, 255)))
    if job.vae is None:
        return nothing, nothing
    cfg = job.cfg if job.objective == REPAIR else 1.0
    patched = attach(job.model, record)
    try:
        if job.teacher is None:
            panels = [_picture(job, "CFG", job.model, job.cfg, drawn.noise)]
        else:
            panels = [(f"full, {_calls(job.cfg)}", drawn.latents)]
        panels.append(_picture(job, "cheap", job.model, cfg, drawn.noise))
        panels.append(_picture(job, "patch", patched, cfg, drawn.noise))
        pictures = [plots.one_picture(job.vae.decode(x)) for _, x in panels]
        labels = [label for label, _ in panels]
        return plots.side_by_side(list(zip(labels, pictures, strict=True))), torch.cat(pictures)
    except comfy.model_management.InterruptProcessingException:
        _log.info("DMP: interrupted; the pictures side by side are left out, not the patch.")
        return nothing, nothing


def _picture(job: Job, name: str, model: Any, cfg: float, noise: Tensor) -> tuple[str, Tensor]:
    """Draws a picture; returns its label, with calls a step and seconds, and its latents."""
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(
        sampling, job.how.scheduler, job.how.steps_of(len(job.runs))
    )
    comfy.model_management.load_models_gpu([model])  # The time is that of drawing alone.
    began = time.monotonic()
    latents = comfy.sample.sample_custom(
        model,
        noise,
        cfg,
        comfy.samplers.sampler_object(job.how.sampler),
        sigmas,
        job.positive[0],
        job.positive[0] if job.negative is None else job.negative,
        torch.zeros_like(noise),
        disable_pbar=True,
        seed=job.how.seed,
    )
    return f"{name}, {_calls(cfg)}, {time.monotonic() - began:.1f} s", latents


def _calls(cfg: float) -> str:
    return "1 call a step" if cfg == 1 else "2 calls a step"
