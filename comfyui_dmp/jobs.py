"""What the training node is asked for: checked, with the patch that it begins with."""

from __future__ import annotations

import copy
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from comfyui_dmp.checks import require_fitting
from comfyui_dmp.model import denoiser_of, time_embedding
from comfyui_dmp.teacher import Aim, Drawing
from comfyui_dmp.trained import file_of
from dmp_common import Base, Patch, PatchError, detect_base
from dmp_common.attach.record import LoadedPatch, PatchRecord
from dmp_common.bases.detect import prediction_of
from dmp_common.bases.schedule import EVERYWHERE
from dmp_common.bases.timesteps import frequency_shift
from dmp_common.bases.wan import FRAME_STRIDE, nearest_frames

REPAIR, GUIDANCE, BOTH = "repair", "guidance", "repair and guidance"
OBJECTIVES = [REPAIR, GUIDANCE, BOTH]
AUTO, NONE = "auto", "none"
EXPERTS = [AUTO, NONE, "high", "low"]
_NAMED = re.compile(r"(high|low)[-_ ]?noise", re.IGNORECASE)  # in names of files
_VIDEO = "wan"  # the architecture whose models draw videos
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What the node is asked for.

    Args:
        model: ComfyUI's `ModelPatcher` of the cheap model.
        teacher: of the exact one; None where the cheap model lacks guidance alone.
        positive: one conditioning or more.
        negative: None where no call is guided.
        size: width and height in pixels.
        objective: one of `OBJECTIVES`.
        cfg: the guidance scale.
        dial: whether the strength of a guidance patch stands for all scales up to that one.
        pictures: how many the exact model draws.
        at_once: pictures and states of a call.
        steps, learning_rate: of the training; a rate of 0 is the one that suits the gap.
        how: of the drawing.
        start: a patch to go on with; None for a new one.
        vae: for pictures of the models side by side; None without them.
        recompute: whether the backward pass recomputes the model's blocks, to need less memory.
        expert: one of `EXPERTS`, for bases of two models.
        length: frames of a video; 1 for pictures.
    """

    model: Any
    teacher: Any | None
    positive: list[Any]
    negative: Any | None
    size: tuple[int, int]
    objective: str
    cfg: float
    dial: bool
    pictures: int
    at_once: int
    steps: int
    learning_rate: float
    how: Drawing
    start: PatchRecord | None = None
    vae: Any | None = None
    recompute: bool = True
    expert: str = AUTO
    length: int = 1

    @property
    def exact(self) -> Any:
        """The model whose predictions are learned."""
        return self.model if self.teacher is None else self.teacher

    @property
    def aim(self) -> Aim:
        """What is learned of it."""
        if self.objective == REPAIR:
            return Aim(None, False, self.cfg)
        return Aim(self.cfg, self.dial and self.objective == GUIDANCE, self.cfg)

    @property
    def latent_frames(self) -> int:
        """Frames of the latent of a video."""
        return (self.length - 1) // FRAME_STRIDE + 1

    @property
    def runs(self) -> list[tuple[int, int]]:
        """Returns for each drawing the number of its conditioning, from 1, and its pictures."""
        runs = []
        for n in range(len(self.positive)):
            count = self.pictures // len(self.positive) + (n < self.pictures % len(self.positive))
            for start in range(0, count, self.at_once):
                runs.append((n + 1, min(self.at_once, count - start)))
        return runs


def prepared_patch(job: Job) -> tuple[Patch, int]:
    """Returns the patch to train, and how many steps it was trained before.

    Raises:
        PatchError: the inputs do not fit each other; all that is wrong is told at once.
    """
    wrong = _wrong_inputs(job)
    if job.start is not None:
        wrong += _wrong_start(job, job.start)
    try:
        base = detect_base(denoiser_of(job.model.model))
        wrong += _wrong_for_base(job, base)
    except PatchError as error:
        wrong.append(f"MODEL: {error}")
    if wrong:
        raise PatchError("\n".join(wrong))
    if job.start is not None:
        patch, metadata = copy.deepcopy(job.start.loaded.patch), job.start.loaded.patch.metadata
        assert isinstance(patch, Patch)
        steps = metadata.get("ss_steps", "0")
        record, before = job.start, int(steps) if steps.isdigit() else 0
    else:
        patch, before = new_patch(job.model, base, job.aim.guidance, _expert_of(job, base)), 0
        record = PatchRecord(LoadedPatch(patch, Path("the new patch")))
    for name, model in (("MODEL", job.model), ("TEACHER MODEL", job.teacher)):
        if model is not None:
            try:
                require_fitting(model.model, model.get_model_object("model_sampling"), record)
            except PatchError as error:
                wrong.append(f"{name}: {error}")
    if wrong:
        raise PatchError("\n".join(wrong))
    return patch, before


def _expert_of(job: Job, base: Base) -> str | None:
    """Which expert MODEL is, as chosen or as the name of its file says; None for neither."""
    if job.expert != AUTO:
        return None if job.expert == NONE else job.expert
    named = _NAMED.search(file_of(job.model) or "")
    if base.switch is None or named is None:
        return None
    expert = named[1].lower()
    _log.info(
        "DMP: the patch is for the expert for %s noise, as the name of the model's file says.",
        expert,
    )
    return expert


def new_patch(model: Any, base: Base, guidance: float | None, expert: str | None = None) -> Patch:
    """Returns a new patch for a model, of the form of the trainer's recipes repair and guidance.

    Args:
        model: ComfyUI's `ModelPatcher`.
        base: its base.
        guidance: the scale that strength 1 stands for; None for a patch that only repairs.
        expert: "high" or "low" for one of a base's two models, at whose timesteps alone the patch
            acts; None for a base of one.
    """
    patch = Patch.create(
        base,
        mix="modulate",
        sites="modulated",
        guidance=guidance,
        expert=expert,
        timesteps=EVERYWHERE if expert is None else base.timesteps_of(expert),
        prediction=prediction_of(model.get_model_object("model_sampling")),
        frequency_shift=frequency_shift(denoiser_of(model.model), base, "ldm"),
    )
    if patch.variant.gate_init == "stages":
        t = torch.linspace(0, 999, max(1000, 2 * base.embedding))
        device = next(denoiser_of(model.model).parameters()).device
        with torch.no_grad():
            patch.gate.begin_with_stages(time_embedding(model.model, base, t.to(device)).float())
    return patch


def _wrong_inputs(job: Job) -> list[str]:
    """Says what is wrong with the inputs, in sentences."""
    wrong = []
    if job.objective != GUIDANCE and job.teacher is None:
        wrong.append(
            f"expected a TEACHER MODEL for the objective {job.objective}, found none: connect the "
            "full model, which the cheap one shall equal."
        )
    if job.objective == GUIDANCE and job.teacher is not None:
        wrong.append(
            "expected no TEACHER MODEL for the objective guidance, which learns of MODEL itself, "
            f"found one: disconnect it, or choose {BOTH}."
        )
    if job.negative is None and (job.objective != REPAIR or job.cfg != 1):
        wrong.append(
            f"expected a negative CONDITIONING for a CFG of {job.cfg:g}, found none: connect one, "
            "or choose repair with a CFG of 1."
        )
    if job.objective != REPAIR and job.cfg <= 1:
        wrong.append(
            f"expected a CFG above 1 for the objective {job.objective}, found {job.cfg:g}: give "
            "the one that you draw pictures with."
        )
    if job.pictures < len(job.positive):
        wrong.append(
            f"expected one picture or more for each of {len(job.positive)} conditionings, found "
            f"{job.pictures}: raise pictures, or give fewer prompts."
        )
    if any(side % 16 for side in job.size):
        wrong.append(
            f"expected a width and a height that are multiples of 16, found {job.size[0]} x "
            f"{job.size[1]}: change them."
        )
    return wrong


def _wrong_for_base(job: Job, base: Base) -> list[str]:
    """Says which inputs are not for a base, in sentences."""
    wrong = []
    if job.expert not in (AUTO, NONE) and base.switch is None:
        wrong.append(
            f"expected the expert {AUTO} or {NONE} for base {base.name}, which is one model, found "
            f"{job.expert}: change it."
        )
    own = None if job.start is None else job.start.loaded.patch.variant.expert
    if job.start is not None and job.expert != AUTO and (own or NONE) != job.expert:
        wrong.append(
            f"{job.start.loaded.name}: expected a patch for the expert {job.expert} to go on with, "
            f"found one for {own or NONE}: change expert, or begin a new patch."
        )
    if job.length > 1 and base.architecture != _VIDEO:
        wrong.append(
            f"expected a length of 1 for base {base.name}, which draws pictures, found "
            f"{job.length}: change it, or connect a model of videos (Wan)."
        )
    elif job.length != nearest_frames(job.length):
        wrong.append(
            f"expected a length of 1 and a multiple of {FRAME_STRIDE}, found {job.length}: the "
            f"nearest is {nearest_frames(job.length)}."
        )
    return wrong


def _wrong_start(job: Job, start: PatchRecord) -> list[str]:
    """Says why a patch cannot be trained on, in sentences."""
    wrong, own = [], start.loaded.patch.variant.guidance
    if start != PatchRecord(start.loaded) or start.mask is not None:
        wrong.append(
            f"{start.loaded.name}: expected a patch without settings to go on with, found changed "
            "ones: connect Load DMP Patch or Train DMP Patch directly."
        )
    if own != job.aim.guidance:
        names = ["no guidance" if w is None else f"guidance {w:g}" for w in (job.aim.guidance, own)]
        wrong.append(
            f"{start.loaded.name}: expected a patch for {names[0]} to go on with, as objective and "
            f"CFG say, found one for {names[1]}: change them, or begin a new patch."
        )
    return wrong
