"""Grids of the inputs' own size (grid scope site): coarser sites have fewer prompts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dmp_common import Patch, PatchError, attach
from dmp_common.tools.heatmap import gate_values, save_heatmap
from tests.tiny import FAMILIES

SD = FAMILIES["sd15"]


def patch_of(**variant: object) -> Patch:
    """A random patch for the tiny SD 1.5 whose grid is that of its latent of 8 x 8."""
    torch.manual_seed(3)
    patch = Patch.create(SD.base, grid=8, grid_scope="site", sites="all", **variant)
    for parameter in patch.parameters():
        torch.nn.init.normal_(parameter)
    return patch.eval()


def restated(patch: Patch, name: str, e: Tensor) -> Tensor:
    """The field (T, D, rows, columns) of a site: softmax(G([e ; i])) p at the site's own size."""
    t, site = patch.tensors(), patch.sites[name]
    depth = torch.full((len(e), 1), float(patch.base.depths[name]))
    logits = (torch.cat([e, depth], 1) @ t["gate.weight"].T + t["gate.bias"]).reshape(-1, 8, 8)
    side = 8 // site.stride
    own = torch.stack([
        logits[:, r * site.stride : (r + 1) * site.stride, c * site.stride : (c + 1) * site.stride]
        .mean((1, 2))
        for r in range(side) for c in range(side)
    ], 1)  # fmt: skip
    field = own.softmax(1)[:, :, None] * t[f"prompts.{name}"][0]  # (T, N, D)
    return field.transpose(1, 2).reshape(len(e), site.width, side, side)


def test_full_size_of_stable_diffusion() -> None:
    with torch.device("meta"):
        patch = Patch.create("sd15", grid=64, grid_scope="site")
    counts = [patch.pool(name).prompts.shape[1] for name in patch.sites]
    assert counts == [4096] * 3 + [1024] * 3 + [256] * 3 + [64] * 3
    assert patch.saved_parameters == 11_886_592
    assert patch.variant.shapes()["prompts.mid"] == (1, 64, 1280)


def test_each_site_adds_its_prompts_unresized() -> None:
    patch, e = patch_of(), torch.randn(2, SD.base.embedding)
    assert len({site.stride for site in patch.sites.values()}) > 1
    for name, site in patch.sites.items():
        side = 8 // site.stride
        x = torch.randn(2, site.width, side, side)
        expected = x + 0.5 * restated(patch, name, e)
        torch.testing.assert_close(patch(x, name, e, 0.5), expected)


@pytest.mark.parametrize("gate", ["linear", "attention", "none"])
def test_attached_model_computes_the_formula(gate: str) -> None:
    patch, model = patch_of(gate=gate), SD.model()
    plain = SD.run(model)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    with attach(model, patch) as attachment:
        changed = SD.run(model)
        assert not torch.equal(changed, plain)
        attachment.strength = 0.0
        assert torch.equal(SD.run(model), plain)
    assert torch.equal(SD.run(model), plain)
    e = torch.randn(3, SD.base.embedding)
    weights = patch.gate_weights(e)
    for column, (name, site) in enumerate(patch.sites.items()):
        x = torch.zeros(3, site.width, 8 // site.stride, 8 // site.stride)
        context = patch.runtime.prepare(e)
        seen[name] = context.add(name, x), patch(x, name, e)
        torch.testing.assert_close(*seen[name])
        total = weights[:, column].sum(1)
        expected = 64.0 if gate == "none" else float(site.stride**2)  # each weight of its cells
        torch.testing.assert_close(total, torch.full((3,), expected))


def test_file_is_of_version_2_and_exact(tmp_path: Path) -> None:
    patch = patch_of()
    patch.save(tmp_path / "patch.safetensors")
    loaded = Patch.load(tmp_path / "patch.safetensors")
    assert loaded.variant == patch.variant
    assert patch.variant.format_version == "2"
    assert Patch.create(SD.base).variant.format_version == "1"
    assert "grid_scope" not in Patch.create(SD.base).variant.to_json()
    for name, value in patch.tensors().items():
        assert torch.equal(loaded.tensors()[name], value)


def test_heat_map_is_drawn(tmp_path: Path) -> None:
    t = torch.tensor([10.0, 500.0, 900.0])
    _, values = gate_values(patch_of(), t, torch.randn(3, SD.base.embedding))
    assert values.mean(-1) == pytest.approx(1.0)  # at every site
    save_heatmap(tmp_path / "gate.png", patch_of(), t, torch.randn(3, SD.base.embedding))
    assert (tmp_path / "gate.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("base", "options", "message"),
    [
        ("dit-b/2", {"grid": 16}, "sites of several sizes for grid scope site, found dit-b/2"),
        ("sd15", {"grid": 20}, "divisible by 8 for grid scope site, found grid"),
        ("sd15", {"grid": 8, "grids": 2}, "found mix add, 2 grids"),
        ("sd15", {"grid": 8, "selection": "hard"}, "selection hard: use grid scope patch"),
        ("dit-b/2", {"mix": "prepend"}, "found mix prepend"),
    ],
)
def test_what_is_not_possible_is_refused(
    base: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(PatchError, match=message), torch.device("meta"):
        Patch.create(base, grid_scope="site", **options)
