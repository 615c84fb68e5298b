"""Attaching a patch: gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn as nn

from dmp_common import PatchError, Schedule, attach
from dmp_common.bases.base import find_module
from tests.dmp_common.attaching import (
    DIT,
    FLUX,
    REPRESENTATIVES,
    SD15,
    checkpoint,
    close,
    gradients,
    make,
    same_gradients,
    some,
)
from tests.tiny import FAMILIES, Tiny


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_second_forward_before_backward(kind, train):
    model, patch = kind.model(), make(kind, sites="all").train(train)
    same_gradients(gradients(kind, model, patch, between=True), gradients(kind, model, patch))


@some(SD15, DIT)
def test_gradients_are_the_derivative(tiny):
    """Central differences along a random direction, in a float64 model."""
    model, patch = tiny.model(dtype=torch.float64), make(tiny, sites="all")
    found = gradients(tiny, model, patch, dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)

    def loss(sign: float) -> float:
        moved = copy.deepcopy(patch)
        generator.manual_seed(3)
        with torch.no_grad():
            for parameter in moved.parameters():
                scale = parameter.std()
                step = torch.randn(parameter.shape, generator=generator)
                parameter.add_(sign * 1e-3 * scale * step)
        with attach(model, moved), torch.no_grad():
            return tiny.run(model, dtype=torch.float64).square().mean().item()

    expected = (loss(1.0) - loss(-1.0)) / 2e-3
    generator.manual_seed(3)
    slope = sum(
        (found[f"0.{name}"] * torch.randn(p.shape, generator=generator) * p.std()).sum().item()
        for name, p in patch.named_parameters()
    )
    assert slope == pytest.approx(expected, rel=1e-2, abs=1e-5)


@contextmanager
def counted(tiny: Tiny, model: nn.Module) -> Iterator[list[int]]:
    """How often a checkpointed block runs; twice when it is recomputed."""
    path = list(make(tiny).sites.values())[0].paths["diffusers"]
    calls: list[int] = []
    handle = find_module(model, path).register_forward_pre_hook(lambda *_: calls.append(1))
    yield calls
    handle.remove()


@pytest.mark.parametrize("when", ["before", "after", "between-patches"])
def test_gradient_checkpointing_gives_the_same_gradients(kind, when):
    """Enabled before or after attaching; with a second forward before backward and without."""
    model = kind.model()
    patches = [make(kind, 1, sites="all").train(when != "after")]
    if when == "between-patches":
        patches.append(make(kind, 2))
    expected = gradients(kind, model, *patches)
    if when == "before":
        checkpoint(model)
    attachments = [attach(model, patches[0])]
    if when != "before":
        checkpoint(model)
    attachments += [attach(model, patch) for patch in patches[1:]]
    with counted(kind, model) as calls:
        found = gradients(kind, model, *patches, attached=True, between=True)
    assert len(calls) == 4, "three forwards, and one block recomputed"
    same_gradients(found, expected)
    same_gradients(gradients(kind, model, *patches, attached=True), expected)
    attachments[0].remove()
    attachments[0].remove()
    if len(patches) == 2:
        alone = gradients(kind, model, patches[1], attached=True, between=True)
        attachments[1].remove()
        same_gradients(alone, gradients(kind, kind.model(), patches[1]))
    model.disable_gradient_checkpointing()
    assert torch.equal(kind.run(model), kind.run(kind.model()))


@some(*REPRESENTATIVES)
def test_checkpointing_of_a_schedule_and_of_prompt_tuning(tiny):
    schedule = Schedule(curve=((0.0, 0.3), (1000.0, 1.0)))
    for variant in ({"gate": "none"}, {"gate": "attention"}, {"selection": "hard"}):
        patch = make(tiny, std=0.01 if variant == {"gate": "none"} else 0.5, **variant)
        found = []
        for checkpointing in (False, True):
            model = tiny.model()
            if checkpointing:
                checkpoint(model)
            with attach(model, patch, schedule=schedule):
                found.append(gradients(tiny, model, patch, attached=True, between=checkpointing))
        same_gradients(*found)


@some(*REPRESENTATIVES)
def test_backward_after_remove_is_right_or_refused(tiny):
    """Recomputation without the patch would give other activations than the forward had."""
    model, patch = tiny.model(), make(tiny, sites="all")
    expected = gradients(tiny, model, patch)
    checkpoint(model)
    patch.zero_grad(set_to_none=True)
    with attach(model, patch):
        loss = tiny.run(model).square().mean()
    try:
        loss.backward()
    except (PatchError, torch.utils.checkpoint.CheckpointError):
        return
    for name, parameter in patch.named_parameters():
        assert close(parameter.grad, expected[f"0.{name}"], 1e-6), name


@some(FAMILIES["pixart"], FLUX)
def test_checkpointing_by_any_diffusers_is_right_or_refused(tiny):
    """Before 0.33 the recomputation cannot be told its timestep: an error, never a wrong gradient.

    Old releases checkpoint in training mode only.
    """
    model, patch = tiny.model().train(), make(tiny, sites="all")
    expected = gradients(tiny, model, patch)
    model.enable_gradient_checkpointing()
    if any(hasattr(module, "_gradient_checkpointing_func") for module in model.modules()):
        same_gradients(gradients(tiny, model, patch, between=True), expected)
    else:
        with pytest.raises(PatchError, match="outside of a forward call"):
            gradients(tiny, model, patch, between=True)


def test_checkpointing_function_of_the_user_is_given_back(kind):
    model, patch = kind.model(), make(kind)
    calls = []

    def own(module, *args, **kwargs):
        calls.append(module)
        return torch.utils.checkpoint.checkpoint(module, *args, use_reentrant=False, **kwargs)

    expected = gradients(kind, model, patch)
    checkpoint(model)
    model.enable_gradient_checkpointing(gradient_checkpointing_func=own)
    same_gradients(gradients(kind, model, patch, between=True), expected)
    assert calls
    parts = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    assert parts
    assert all(m._gradient_checkpointing_func is own for m in parts)
