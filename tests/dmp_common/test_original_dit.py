"""Attaching to a DiT in the original naming, which hosts use (a stand-in of the same structure)."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from dmp_common import Patch, Schedule, attach, detect_base
from dmp_common.bases.timesteps import embed_timesteps
from tests.tiny import FAMILIES

BASE = FAMILIES["dit"].base  # 3 blocks of width 32, patch size 2


class TimestepEmbedder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        freqs = torch.exp(-math.log(10000) * torch.arange(128) / 128)
        angles = t[:, None].float() * freqs[None]
        return self.mlp(torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1))


class LabelEmbedder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(11, width)

    def forward(self, labels: Tensor, train: bool) -> Tensor:
        return self.embedding_table(labels)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix, self.condition = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return x + torch.tanh(self.mix(x) + self.condition(c)[:, None])


class PatchEmbed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(4, width, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class OriginalDiT(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.x_embedder = PatchEmbed(width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(x)
        c = self.t_embedder(t) + self.y_embedder(y, self.training)
        for block in self.blocks:
            x = block(x, c)
        return x


@pytest.fixture
def model() -> OriginalDiT:
    torch.manual_seed(0)
    return OriginalDiT().eval().requires_grad_(False)


X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
T, Y = torch.tensor([10, 700]), torch.tensor([3, 8])


def restated(model: OriginalDiT, patch: Patch, y: Tensor) -> Tensor:
    """Eq. 3 by hand; the gate sees t, or t + y."""
    x, t, label = model.x_embedder(X), model.t_embedder(T), model.y_embedder(y, False)
    seen = t + label if patch.variant.condition == "t+y" else t
    tensors = patch.tensors()
    for depth, block in enumerate(model.blocks):
        inputs = torch.cat([seen, torch.full((2, 1), float(depth))], dim=1)
        w = torch.softmax(inputs @ tensors["gate.weight"].T + tensors["gate.bias"], dim=-1)
        x = block(x + w[:, :, None] * tensors[f"prompts.block.{depth}"][0], t + label)
    return x


@pytest.mark.parametrize("condition", ["t", "t+y"])
def test_equation_holds_in_the_original_naming(model: OriginalDiT, condition: str) -> None:
    patch = FAMILIES["dit"].patch(condition=condition, frequency_shift=0.0)
    assert detect_base(model) is BASE
    plain = model(X, T, Y)
    for labels in (Y, torch.tensor([5, 5])):
        expected = restated(model, patch, labels)
        with attach(model, patch):
            torch.testing.assert_close(model(X, T, labels), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(model(X, T, Y), plain)


@pytest.mark.parametrize("labels", [None, Y])
def test_embedding_of_any_timestep(model: OriginalDiT, labels: Tensor | None) -> None:
    expected = model.t_embedder(T) + (0 if labels is None else model.y_embedder(labels, False))
    found = embed_timesteps(model, BASE, "ldm", T, labels)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_schedule_reads_the_timestep(model: OriginalDiT) -> None:
    patch = FAMILIES["dit"].patch(frequency_shift=0.0)
    plain = model(X, T, Y)
    with attach(model, patch, schedule=Schedule(first=600.0)):
        out = model(X, T, Y)
    assert torch.equal(out[1], plain[1])
    assert not torch.equal(out[0], plain[0])
