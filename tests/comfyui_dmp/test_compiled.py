"""Compiled graphs of calls with a patch, without a host: a model that reads it from its options."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from comfyui_dmp.compiled import own_graph
from dmp_common import PatchError


class Model(nn.Module):
    """Like ComfyUI's models: `forward` passes the options on, and the graph breaks below it."""

    def forward(self, x: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        return self._blocks(x, transformer_options=transformer_options)

    def _blocks(self, x: Tensor, *, transformer_options: dict[str, Any]) -> Tensor:
        torch._dynamo.graph_break()
        return x + transformer_options["added"]


def blind(guards: Any) -> list[bool]:
    """What ComfyUI's compile nodes do."""
    return ["transformer_options" not in guard.name for guard in guards]


@pytest.mark.skipif(torch.__version__ < (2, 8), reason="guards cannot be left out before")
def test_a_broken_graph_serves_no_other_patch() -> None:
    torch._dynamo.reset()
    model, x = Model(), torch.zeros(2)
    compiled = torch.compile(model, backend="eager", options={"guard_filter_fn": blind})
    seen = []
    for facts in (None, "one", "two", None, "one"):
        added = {None: 0.0, "one": 1.0, "two": 2.0}[facts]
        if facts is None:
            seen.append(compiled(x, {"added": added})[0].item())
            continue
        with own_graph(model, facts):
            seen.append(compiled(x, {"added": added})[0].item())
    torch._dynamo.reset()
    assert seen == [0.0, 1.0, 2.0, 0.0, 1.0]


def test_the_model_is_left_as_it_was() -> None:
    model = Model()
    other = MethodType(lambda self, x, **options: x - 1.0, model)
    model._blocks = other  # by another extension
    before = dict(vars(model))
    with own_graph(model, "one"), own_graph(model, "two"):
        assert model.forward.__func__.__code__.co_name == "forward 'one' 'two'"
        assert model(torch.zeros(1), {}).item() == -1.0
    assert vars(model) == before
    assert model._blocks is other


def test_a_forward_of_another_extension_is_refused() -> None:
    model = Model()
    model.forward = MethodType(lambda self, x: x, model)
    with pytest.raises(PatchError, match="compiled Model with its own forward"):  # noqa: SIM117
        with own_graph(model, "one"):
            pass
