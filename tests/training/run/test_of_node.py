"""ComfyUI's training node and the trainer make the same patch."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor

from comfyui_dmp.fitting import Recipe, fit
from comfyui_dmp.states import States
from dmp_common import attach
from tests.training.conftest import Start
from training.run.loop import Events, _batches
from training.run.loop import train as run_training
from training.run.parts import Run

OPTIONS = {
    "objective": "distill", "states": "teacher", "trajectories": 16, "state_steps": 3,
    "train_batch_size": 8, "max_train_steps": 6, "lr_warmup_steps": 2, "lr_scheduler": "cosine",
}  # fmt: skip
PURPOSES = {
    "repair": {"recipe": "repair", "student_quantization": "rtn2"},
    "guidance": {"recipe": "guidance", "teacher_guidance_scale": "1:3"},
}


def states_of(run: Run, steps: int) -> tuple[States, list[dict[str, Tensor]]]:
    """The states that the trainer's steps see, one after the other, and their conditions."""
    parts, conditions = [], []
    for batch in itertools.islice(_batches(run), steps):
        aim = run.aims.aim(batch, [])
        for row in range(len(aim.noisy)):
            conditions.append({name: value[row, None] for name, value in aim.given.items()})
        number = torch.arange(len(aim.noisy)) + len(conditions) - len(aim.noisy)
        strengths = aim.strengths
        parts.append(States(aim.noisy, aim.t.float(), aim.t, aim.target, number, strengths))
    return States.joined(parts), conditions


@pytest.mark.parametrize("purpose", PURPOSES)
def test_both_make_the_same_patch_of_the_same_states(start: Start, purpose: str) -> None:
    run, _ = start(**OPTIONS, **PURPOSES[purpose])
    steps, size = 6, 8
    assert run.total == steps
    states, conditions = states_of(run, steps)
    run.method.remove()
    patch = copy.deepcopy(run.method.patch).train()
    frozen = run.frozen
    with attach(frozen.model, patch) as attachment:

        def predict(number: int, own: States) -> Tensor:
            attachment.item_strengths = own.strengths
            output = frozen.family.predict(
                frozen.model, own.noisy, own.t.long(), conditions[number]
            )
            return output[:, : own.noisy.shape[1]]

        weights = run.student.relative
        assert weights is not None
        recipe = Recipe(steps, run.config.learning_rate, 2)
        rows = torch.arange(steps * size).split(size)
        losses: list[float] = []

        def told(step: int, loss: float) -> bool:
            losses.append(loss)
            return True

        fit(patch, predict, states, rows, recipe, weights, told)
    # The other way: the trainer goes on from its beginning with its patch on the model again.
    run.method.attachment = attach(frozen.model, run.method.patch)
    run_training(run, Events())
    run.method.remove()
    theirs, ours = run.method.patch.tensors(), patch.tensors()
    assert any(bool((value != 0).any()) for value in ours.values())
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=1e-4, rtol=1e-4)
    assert len(losses) == steps
