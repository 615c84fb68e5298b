"""Attaching a patch: torch.compile."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dmp_common import Patch, PatchError, Schedule, attach
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
from tests.tiny import FAMILIES, Tiny


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Older compilers do not know all that hooks do; they fall back to several graphs.
ONE_GRAPH = torch.__version__ >= (2, 4)
COMPILED = [small_unet(), *(FAMILIES[n] for n in ("dit", "sd3", "flux"))]


def check_compiled(tiny: Tiny, backend: str, fullgraph: bool, size: tuple[int, int]) -> None:
    model, patch = tiny.model(), make(tiny, sites="all")
    base = tiny.run(model, size=size)
    other = dict(timesteps=(500.0, 20.0), size=size, seed=4)
    schedule = Schedule(first=950.0, curve=((0.0, 0.4), (1000.0, 1.2)))
    with attach(model, patch, strength=0.7, schedule=schedule), torch.no_grad():
        expected, second = tiny.run(model, size=size), tiny.run(model, **other)
    attachment = attach(model, patch, strength=0.7, schedule=schedule)
    compiled = torch.compile(model, dynamic=False, fullgraph=fullgraph, backend=backend)
    with torch.no_grad():
        assert close(tiny.run(compiled, size=size), expected)
        assert attachment.calls == 1
        assert close(tiny.run(compiled, **other), second)  # the graph holds no weights of a step
        with torch.no_grad():
            patch.pool(next(iter(patch.sites))).prompts.mul_(-2.0)
        with_change = tiny.run(compiled, **other)
        assert close(with_change, _eager(tiny, patch, other, schedule))
        assert not close(with_change, second, 1e-3)
        attachment.remove()
        assert close(tiny.run(compiled, size=size), base)
        assert torch.equal(tiny.run(model, size=size), base)


def _eager(tiny: Tiny, patch: Patch, run: dict, schedule: Schedule) -> Tensor:
    model = tiny.model()
    with attach(model, copy.deepcopy(patch), strength=0.7, schedule=schedule):
        return tiny.run(model, **run)


@pytest.mark.slow
@some(*COMPILED)
def test_compile_after_attach(tiny, dynamo):
    # What the backend makes of a graph is the same for all families: one of them takes longer.
    backend = "aot_eager" if tiny is DIT else "eager"
    check_compiled(tiny, backend, fullgraph=ONE_GRAPH and tiny is not FLUX, size=(8, 8))


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
