"""Paper-exactness: eq. 3 restated in float64 by other means equals the attached model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from dmp_common import Patch, attach
from dmp_common.bases.timesteps import sinusoid
from dmp_common.patch.prompts import resize
from tests.tiny import FAMILIES

T = torch.tensor([3.0, 871.0])


def restated_embedding(model: nn.Module, mlp: nn.Module, channels: int, shift: int) -> Tensor:
    """Sinusoid and MLP of the time embedding, written out."""
    half = channels // 2
    exponents = torch.arange(half, dtype=torch.float64) / (half - shift)
    angles = T.double()[:, None] * 10000.0**-exponents
    features = torch.cat([angles.cos(), angles.sin()], dim=1)
    hidden = F.linear(features, mlp.linear_1.weight, mlp.linear_1.bias)
    return F.linear(hidden * hidden.sigmoid(), mlp.linear_2.weight, mlp.linear_2.bias)


def restated_weights(patch: Patch, e: Tensor, depth: int) -> Tensor:
    """softmax(G([e ; i])) (T, N)."""
    t = patch.tensors()
    joined = torch.cat([e, torch.full((len(e), 1), float(depth), dtype=torch.float64)], dim=1)
    return torch.softmax(joined @ t["gate.weight"].double().T + t["gate.bias"].double(), dim=1)


@contextmanager
def adding_by_hand(model: nn.Module, patch: Patch, e: Tensor, tokens: bool) -> Iterator[None]:
    """Replaces the forward of each block: nothing of `attach` or `Context` is used."""
    changed = []
    for name, site in patch.sites.items():
        module = model.get_submodule(site.paths["diffusers"])
        w = restated_weights(patch, e, patch.base.depths[name])
        prompts = patch.tensors()[f"prompts.{name}"][0].double()
        field = (w[:, :, None] * prompts).transpose(1, 2).unflatten(2, patch.variant.grid)

        def forward(
            x: Tensor,
            *args: object,
            original: object = module.forward,
            field: Tensor = field,
            width: int = site.width,
            **kwargs: object,
        ) -> object:
            if tokens:
                side = math.isqrt(x.shape[1])
                live = F.interpolate(field, (side, side), mode="bilinear", antialias=True)
                x = x + live.flatten(2).transpose(1, 2)
            else:
                live = F.interpolate(field, x.shape[2:], mode="bilinear", antialias=True)
                x = torch.cat([x[:, :width] + live, x[:, width:]], dim=1)
            return original(x, *args, **kwargs)  # type: ignore[operator]

        module.forward = forward
        changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


@pytest.mark.parametrize("size", [(8, 8), (16, 16)])
@pytest.mark.parametrize("family", ["dit", "sd15", "sdxl"])
def test_equation_3(family: str, size: tuple[int, int]) -> None:
    if family == "dit" and size == (16, 16):
        pytest.skip("a DiT of diffusers takes its own size only")
    tiny = FAMILIES[family]
    model = tiny.model(dtype=torch.float64)
    patch = tiny.patch(sites="all")
    if family == "dit":
        emb = model.transformer_blocks[0].norm1.emb
        e = restated_embedding(model, emb.timestep_embedder, 256, shift=1)
    else:
        e = restated_embedding(model, model.time_embedding, 16, shift=0)
    plain = tiny.run(model, T, size, torch.float64)
    with adding_by_hand(model, patch, e, tokens=family == "dit"):
        expected = tiny.run(model, T, size, torch.float64)
    with torch.no_grad(), attach(model, patch):
        found = tiny.run(model, T, size, torch.float64)
    assert float((expected - plain).abs().max()) > 0.1
    # Gates and fields are float32 whatever the model is: rounding of that size and no more.
    assert float((found - expected).abs().max()) < 2e-5 * float(expected.abs().max())


def test_equation_3_with_the_class_embedding() -> None:
    """Condition t+y: the gate sees the sum of both embeddings, as in the official code."""
    tiny = FAMILIES["dit"]
    model, patch = tiny.model(dtype=torch.float64), tiny.patch(condition="t+y")
    emb = model.transformer_blocks[0].norm1.emb
    time = restated_embedding(model, emb.timestep_embedder, 256, shift=1)
    labels = tiny.inputs(T, (8, 8), torch.float64, 1)["class_labels"]
    both = time + emb.class_embedder.embedding_table.weight[labels]
    outputs = []
    for e in (both, time):
        with adding_by_hand(model, patch, e, tokens=True):
            outputs.append(tiny.run(model, T, (8, 8), torch.float64))
    expected, without = outputs
    for _ in range(2):  # the second time from what is remembered
        with torch.no_grad(), attach(model, patch):
            found = tiny.run(model, T, (8, 8), torch.float64)
        assert float((found - expected).abs().max()) < 2e-5 * float(expected.abs().max())
    assert float((without - expected).abs().max()) > 1e-2


@pytest.mark.parametrize("half", [64, 128, 160])
@pytest.mark.parametrize("shift", [0, 1])
def test_sinusoid_is_that_of_the_models(half: int, shift: int) -> None:
    """Shift 0 is the original DiT's: exp(-ln(10000) k / half), cosines first."""
    t = torch.tensor([0.0, 1.0, 17.5, 999.0])
    freqs = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / (half - shift))
    angles = t[:, None] * freqs[None]
    expected = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
    assert torch.allclose(sinusoid(t, 2 * half, shift), expected, atol=1e-4)


@pytest.mark.parametrize("grid", [(16, 16), (4, 4), (3, 5), (1, 1)])
@pytest.mark.parametrize("size", [(16, 16), (64, 64), (8, 8), (2, 2), (1, 1), (12, 20), (7, 33)])
def test_resize_is_what_the_format_says(grid: tuple[int, int], size: tuple[int, int]) -> None:
    field = torch.randn(2, grid[0] * grid[1], 3, generator=torch.Generator().manual_seed(0))
    picture = field.transpose(1, 2).unflatten(2, grid)
    expected = F.interpolate(
        picture, size, mode="bilinear", align_corners=False, antialias=True
    ).permute(0, 2, 3, 1)
    assert torch.allclose(resize(field, grid, size), expected, atol=1e-5)
    if grid == size:
        assert torch.equal(resize(field, grid, size).flatten(1, 2), field)  # eq. 3 exactly


def test_at_the_papers_size_nothing_is_resized(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> Tensor:
        raise AssertionError("a matrix of the resize was asked for")

    monkeypatch.setattr("dmp_common.patch.prompts.resize_matrix", never)
    patch = Patch.create("dit-xl/2", gate_init="random", prompt_init="random").eval()
    e, x = torch.randn(1, 1152), torch.zeros(1, 256, 1152)
    for dtype in (torch.float32, torch.bfloat16):
        added = patch.prepare(e, (32, 32)).add("block.27", x.to(dtype))
        w = restated_weights(patch, e.double(), 27)
        expected = w[:, :, None] * patch.tensors()["prompts.block.27"][0].double()
        tolerance = 1e-6 if dtype == torch.float32 else 1e-2
        assert torch.allclose(added.double(), expected, atol=1e-7, rtol=tolerance)


E0 = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
DEPTHS = torch.arange(3, dtype=torch.float64)


def joined(e: Tensor) -> Tensor:
    """[e ; i] for every timestep and site (T, S, E + 1)."""
    e = e.double()
    return torch.cat(
        [e[:, None].expand(-1, 3, -1), DEPTHS[None, :, None].expand(len(e), -1, 1)], dim=2
    )


def gate(**variant: object) -> tuple[Patch, dict[str, Tensor]]:
    patch = FAMILIES["dit"].patch(**variant)
    return patch, {name: value.double() for name, value in patch.tensors().items()}


def test_linear_gate() -> None:
    patch, t = gate()
    expected = torch.softmax(joined(E0) @ t["gate.weight"].T + t["gate.bias"], dim=-1)
    assert torch.allclose(patch.gate_weights(E0).double(), expected, atol=1e-5)


def test_uniform_gate_does_not_see_the_depth() -> None:
    patch, t = gate(across_depth="uniform")
    expected = torch.softmax(E0.double() @ t["gate.weight"].T + t["gate.bias"], dim=-1)
    found = patch.gate_weights(E0).double()
    assert t["gate.weight"].shape == (16, 32)
    assert torch.allclose(found, expected[:, None].expand(-1, 3, -1), atol=1e-5)


def test_attention_gate_asks_every_prompt() -> None:
    patch, t = gate(gate="attention")
    query = joined(E0) @ t["gate.query"].T
    expected = torch.softmax(query @ t["gate.key"].T / 8.0, dim=-1)  # sqrt(64)
    assert torch.allclose(patch.gate_weights(E0).double(), expected, atol=1e-5)


def test_hard_gate_keeps_three_quarters() -> None:
    patch, t = gate(selection="hard")
    logits = joined(E0) @ t["gate.weight"].T + t["gate.bias"]
    kept = logits >= logits.sort(dim=-1, descending=True).values[..., 11:12]  # the 12th of 16
    found = patch.gate_weights(E0)
    assert torch.equal(found, kept.float())
    # Backward it is the softmax.
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(3))
    found.backward(upstream)
    soft, _ = gate()
    soft.gate_weights(E0).backward(upstream)
    assert torch.allclose(patch.gate.weight.grad, soft.gate.weight.grad, atol=1e-6)


def test_no_gate_is_prompt_tuning() -> None:
    patch, t = gate(gate="none")
    assert torch.equal(patch.gate_weights(E0), torch.ones(5, 3, 16))
    assert not any(name.startswith("gate") for name in t)


def test_temperature_divides_the_logits() -> None:
    patch, t = gate()
    logits = joined(E0) @ t["gate.weight"].T + t["gate.bias"]
    expected = torch.softmax(logits / 2.5, dim=-1)
    assert torch.allclose(patch.gate_weights(E0, 2.5).double(), expected, atol=1e-5)


def test_new_patches_weigh_all_prompts_alike() -> None:
    for kind in ("linear", "attention"):
        weights = FAMILIES["dit"].patch(None, gate=kind).gate_weights(E0)
        assert torch.equal(weights, torch.full_like(weights, 1 / 16))


@pytest.mark.parametrize(
    ("variant", "scale"),
    [
        ({}, 16.0),
        ({"selection": "hard"}, 16 / 12),
        ({"gate": "none"}, 1.0),
        ({"grids": 2}, 32.0),
        ({"gate": "attention"}, 16.0),
    ],
    ids=str,
)
def test_learning_scale_makes_the_mean_weight_one(variant: dict[str, object], scale: float) -> None:
    tiny = FAMILIES["dit"]
    model, patch = tiny.model(), tiny.patch(**variant)
    saved = {name: value.clone() for name, value in patch.tensors().items()}
    with torch.no_grad(), attach(model, patch):
        before = tiny.run(model)
        patch.scale_for_learning()
        after = tiny.run(model)
    assert patch.learning_scale == scale
    assert float((patch.gate_weights(E0).detach() * scale).mean()) == pytest.approx(1.0, abs=1e-5)
    assert torch.allclose(before, after, atol=1e-5)
    for name, value in patch.tensors().items():
        assert torch.allclose(value, saved[name], rtol=1e-6)


def test_grids_mix_in_the_place() -> None:
    """K grids: field = sum_k w[k, n] p[k, n]."""
    patch, t = gate(grids=3)
    w = patch.gate_weights(E0).double()[:, 1].unflatten(1, (3, 16))
    expected = (w[..., None] * t["prompts.block.1"]).sum(1)
    added = patch.prepare(E0, (8, 8)).add("block.1", torch.zeros(5, 16, 32))
    assert torch.allclose(added.double(), expected, atol=1e-4)
