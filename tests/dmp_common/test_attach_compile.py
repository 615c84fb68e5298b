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
GUARDS_LITTLE = torch.__version__ >= (2, 7)  # 2.6 compiles anew for each strength
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
        if GUARDS_LITTLE:
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


@pytest.mark.skipif(not ONE_GRAPH, reason="before torch 2.4 guards do not tell marked modules")
@some(FAMILIES["sd3"], FLUX)
def test_a_model_in_several_graphs_that_was_compiled_before(tiny, dynamo):
    """Graphs of the plain model, and those of patches that are gone, are not used again.

    Hosts compile at each call, and attach for each picture. Their attention is not compiled, so a
    block is several graphs, and most of them have nothing to do with the timestep.
    """
    model = tiny.model()
    outputs = [site.name for site in tiny.base.outputs]
    first = make(tiny, 0, mix="modulate", sites=outputs[-2:])
    second = make(tiny, 1, sites=[tiny.base.sites[-1].name])
    base = tiny.run(model)
    for module in model.modules():
        if type(module).__name__.endswith("Attention"):
            module.register_forward_hook(torch._dynamo.disable(lambda *_: None))
    compiled = torch.compile(model, dynamic=False, backend="eager")

    def check() -> Tensor:
        expected = tiny.run(model)
        assert close(tiny.run(compiled), expected)
        return expected

    with torch.no_grad():
        assert close(check(), base)
        for _ in range(2):
            one = attach(model, first)
            alone = check()
            two = attach(model, second)
            both = check()
            one.remove()
            assert not close(check(), both, 1e-3)
            two.remove()
            assert close(check(), base)
            assert not close(alone, base, 1e-3) and not close(both, alone, 1e-3)


@some(DIT)
def test_a_forward_that_another_tool_sets_meanwhile_stays(tiny):
    """Tools that offload weights replace the `forward` of modules, before attaching or after."""
    model, patch = tiny.model(), make(tiny, mix="modulate")
    calls = []

    def replaced(module: torch.nn.Module) -> Callable[..., Tensor]:
        inner = module.forward
        return lambda *args, **kwargs: calls.append(module) or inner(*args, **kwargs)

    before, after = (model.transformer_blocks[n].attn1.to_q for n in (0, 1))
    before.forward = replaced(before)
    attachment = attach(model, patch)
    after.forward = replaced(after)
    attachment.remove()
    tiny.run(model)
    assert calls == [before, after]
    assert [m for m in model.modules() if "forward" in vars(m)] == [before, after]


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
