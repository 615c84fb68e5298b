"""Attaching a patch: torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dmp_common import Attachment, PatchError, Schedule, attach
from tests.dmp_common.attaching import (
    DIT,
    FLUX,
    alone,
    close,
    gradients,
    make,
    same_gradients,
    small_unet,
    some,
)
from tests.tiny import FAMILIES


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Older compilers do not know all that hooks do; they fall back to several graphs.
ONE_GRAPH = torch.__version__ >= (2, 4)
COMPILED = [small_unet(), *(FAMILIES[n] for n in ("dit", "sd3", "flux"))]


@pytest.mark.slow
@some(*COMPILED)
def test_compile_after_attach(tiny, dynamo):
    """One graph serves all weights, strengths and schedules, and the base when all is removed."""
    model, patch = tiny.model(), make(tiny, sites="all")
    base = tiny.run(model)
    schedule = Schedule(first=950.0, curve=((0.0, 0.4), (1000.0, 1.2)))
    attachment = attach(model, patch, strength=0.7, schedule=schedule)
    fullgraph = ONE_GRAPH and tiny is not FLUX
    compiled = torch.compile(model, dynamic=False, fullgraph=fullgraph, backend="eager")

    def check(*timesteps: float) -> Tensor:
        found = tiny.run(compiled, timesteps)
        assert close(found, tiny.run(model, timesteps))
        return found

    with torch.no_grad():
        first = check(10.0, 900.0)
        # Compiled calls count as one, so that hosts do not warn; the second call was not compiled.
        assert attachment.calls == 2
        second = check(500.0, 20.0)  # the graph holds no weights of a step
        patch.pool(next(iter(patch.sites))).prompts.mul_(-2.0)
        assert not close(check(500.0, 20.0), second, 1e-3)
        if ONE_GRAPH:
            check_no_recompilation(attachment, check)
        attachment.remove()
        assert close(check(10.0, 900.0), base)
        assert not close(first, base, 1e-3)
        assert torch.equal(tiny.run(model), base)


def check_no_recompilation(attachment: Attachment, check: Callable[..., Tensor]) -> None:
    schedules = [
        [(0.0, 0.0), (1.0, 1.0)],
        [(0.0, 1.0), (0.5, 1.0), (0.5, 0.0), (1.0, 2.0)],  # with a step
        None,
    ]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for attachment.strength in (0.3, -1.0, 0.0, 1.0):
            check(10.0, 900.0)
        for attachment.schedule in schedules:
            check(10.0, 900.0)
        attachment.enabled = False
        check(10.0, 900.0)
        attachment.enabled = True


@pytest.mark.slow
@some(DIT)
def test_gradients_of_a_compiled_model(tiny, dynamo):
    model, patch = tiny.model(), make(tiny, sites="all").train()
    expected = gradients(tiny, model, patch)
    with attach(model, patch):
        compiled = torch.compile(model, dynamic=False, backend="aot_eager", fullgraph=ONE_GRAPH)
        same_gradients(gradients(tiny, compiled, patch, attached=True), expected)


@some(DIT)
def test_compiled_blocks_after_attach(tiny, dynamo):
    """Compiling block by block, as diffusers' `compile_repeated_blocks` does."""
    model, patch = tiny.model(), make(tiny)
    with attach(model, patch), torch.no_grad():
        expected = tiny.run(model)
        for block in model.transformer_blocks:
            block.compile(backend="eager", dynamic=False)
        assert close(tiny.run(model), expected)


@some(DIT)
def test_attach_to_a_compiled_model_is_refused(tiny, dynamo):
    model, patch = tiny.model(), make(tiny)
    compiled = torch.compile(model, backend="eager")
    for target in (compiled, SimpleNamespace(transformer=compiled)):
        with pytest.raises(PatchError, match="attach the patch first, then compile"):
            attach(target, patch)
    in_place = tiny.model()
    in_place.compile(backend="eager")
    with pytest.raises(PatchError, match="attach the patch first, then compile"):
        attach(in_place, patch)


@some(DIT)
def test_attach_to_compiled_blocks_acts_or_is_refused(tiny, dynamo):
    """A hook on a block that is compiled already is ignored without a word."""
    model, patch = tiny.model(), make(tiny)
    expected = alone(tiny, patch)
    for block in model.transformer_blocks:
        block.compile(backend="eager", dynamic=False)
    with torch.no_grad():
        tiny.run(model)
        try:
            attachment = attach(model, patch)
        except PatchError as error:
            assert "compile" in str(error)
            return
        assert close(tiny.run(model), expected)
        attachment.remove()
