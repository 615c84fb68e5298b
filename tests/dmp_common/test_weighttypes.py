"""Types of weights as each library and host shows them."""

from __future__ import annotations

from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn as nn

from dmp_common.tools.weighttypes import weight_types


class Kind(IntEnum):
    """As the package gguf has it."""

    F16 = 1
    Q4_0 = 2


class Q4_0:  # noqa: N801 - the name that Forge's package has
    """A class of Forge's package gguf."""


def parameter(values: torch.Tensor, **attributes: Any) -> nn.Parameter:
    """A parameter with what a library says of it."""
    made = nn.Parameter(values, requires_grad=False)
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


BYTES, SHAPE = torch.zeros(4, 18, dtype=torch.uint8), torch.Size((4, 32))


@pytest.mark.parametrize(
    ("weight", "kind"),
    [
        (parameter(torch.zeros(4, 32)), "F32"),
        (parameter(torch.zeros(4, 32, dtype=torch.bfloat16)), "BF16"),
        (parameter(torch.zeros(4, 32).to(torch.float8_e4m3fn)), "F8_E4M3"),
        (parameter(BYTES, quant_type=Kind.Q4_0, quant_shape=SHAPE), "Q4_0"),
        (parameter(BYTES, tensor_type=Kind.Q4_0, tensor_shape=SHAPE), "Q4_0"),
        (parameter(torch.zeros(4, 32), tensor_type=None), "F32"),
        (parameter(BYTES, gguf_cls=Q4_0, real_shape=SHAPE), "Q4_0"),
        (parameter(BYTES, gguf_cls=Q4_0, gguf_real_shape=SHAPE), "Q4_0"),
        (parameter(torch.zeros(4, 32), gguf_cls=None), "F32"),
        (
            parameter(
                BYTES, quant_type="nf4", quant_state=SimpleNamespace(quant_type="nf4", shape=SHAPE)
            ),
            "NF4",
        ),
        (parameter(torch.zeros(4, 32), storage_dtype=torch.float8_e4m3fn), "F8_E4M3"),
        (parameter(torch.zeros(4, 32), qdata=torch.zeros(4, 32, dtype=torch.int8)), "INT8"),
    ],
)  # fmt: skip
def test_values_are_counted_by_their_type(weight: nn.Parameter, kind: str) -> None:
    layer = nn.Linear(32, 4, device="meta")
    layer.weight, layer.bias = weight, nn.Parameter(torch.zeros(4, dtype=torch.float16))
    assert weight_types(layer) == {kind: 128, "F16": 4}
