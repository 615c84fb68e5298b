"""Import of official checkpoints: the right numbers, and the right questions."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dmp_common import Patch, PatchError
from dmp_common.patch.file import file_hash
from dmp_common.tools.convert import convert_official
from tests.official import COUNT, DEPTH, SIDE, SIZE, TWINS, WIDTH, learned, official, save


def official_field(state: dict[str, Tensor], c: Tensor, block: int) -> Tensor:
    """What the official code adds at a block, stated plainly: (T, N, D)."""
    depth = torch.full((len(c), 1), float(block))
    inputs = torch.cat([c, depth], dim=1)
    gates = torch.softmax(inputs @ state["gate.weight"].T + state["gate.bias"], dim=1)
    return state["prompt_embeddings"][block] * gates[:, :, None]


def added(patch: Patch, c: Tensor, site: str, x: Tensor) -> Tensor:
    """What our patch adds at a site."""
    with torch.no_grad():
        return patch.prepare(c, (SIZE * SIDE, SIZE * SIDE)).add(site, x) - x


@pytest.fixture
def hydra_config(monkeypatch: pytest.MonkeyPatch) -> object:
    """An object like omegaconf's DictConfig: its class is needed to unpickle it, and is gone."""
    module = types.ModuleType("omegaconf")

    class DictConfig:
        def __init__(self) -> None:
            self.__dict__["_content"] = {"vp": {"type": "add"}, "self": self}

        def __setstate__(self, state: object) -> None:
            raise AssertionError("unpickled the configuration")

    DictConfig.__module__, DictConfig.__qualname__ = "omegaconf", "DictConfig"
    module.DictConfig = DictConfig  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "omegaconf", module)
    return DictConfig()


def checkpoint(path: Path, state: dict[str, Tensor], config: object) -> Path:
    """As the official train.py saves it."""
    moments = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3), "seen": torch.arange(3)}
    optimizer = {"state": {0: moments}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999)}]}
    return save(path, {"model": state, "opt": optimizer, "config": config})


def test_converted_patch_adds_what_the_official_code_adds(
    tmp_path: Path, hydra_config: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = official()
    path = checkpoint(tmp_path / "0010000.pt", state, hydra_config)
    monkeypatch.delitem(sys.modules, "omegaconf")
    converted = convert_official(path, tmp_path / "out" / "patch.safetensors")
    assert "omegaconf" not in sys.modules
    c = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))
    x = torch.zeros(3, COUNT, WIDTH)
    for patch in (converted, Patch.load(tmp_path / "out" / "patch.safetensors")):
        assert not patch.training
        variant = patch.variant
        assert (variant.base, variant.condition, variant.gate) == ("convert-dit", "t+y", "linear")
        assert (variant.grid, variant.selection, variant.mix) == ((SIDE, SIDE), "soft", "add")
        assert (variant.frequency_shift, variant.prediction) == (0.0, "epsilon")
        assert patch.metadata["dmp.converted_from"] == "0010000.pt"
        assert patch.metadata["dmp.converted_hash"] == file_hash(path)
        for block, site in enumerate(patch.sites):
            torch.testing.assert_close(added(patch, c, site, x), official_field(state, c, block))


def test_only_prompts_and_gate_are_taken(tmp_path: Path) -> None:
    state = official()
    path = checkpoint(tmp_path / "x.pt", state, None)
    tensors = convert_official(path).tensors()
    prompts = {f"prompts.block.{i}" for i in range(DEPTH)}
    assert set(tensors) == prompts | {"gate.weight", "gate.bias"}
    for i in range(DEPTH):
        assert torch.equal(tensors[f"prompts.block.{i}"], state["prompt_embeddings"][i][None])
    assert torch.equal(tensors["gate.weight"], state["gate.weight"])


def test_bare_state_dict_prefixes_parameters_and_half_precision(tmp_path: Path) -> None:
    state = {f"_orig_mod.module.{name}": value.half() for name, value in official().items()}
    key = "_orig_mod.module.prompt_embeddings"
    values = state[key].clone()
    # A parameter that is a slice and not contiguous has an offset and strides of its own.
    padded = torch.stack([torch.zeros_like(values), values]).transpose(2, 3).contiguous()
    state[key] = torch.nn.Parameter(padded[1].transpose(1, 2))
    assert state[key].storage_offset()
    assert not state[key].is_contiguous()
    patch = convert_official(save(tmp_path / "bare.pt", state))
    for i in range(DEPTH):
        prompts = patch.tensors()[f"prompts.block.{i}"]
        assert prompts.dtype == torch.float32
        assert torch.equal(prompts[0], values[i].float())


def test_first_blocks_and_prompts_that_are_never_read(tmp_path: Path) -> None:
    fewer = convert_official(save(tmp_path / "fewer.pt", official(blocks=2)))
    assert list(fewer.sites) == ["block.0", "block.1"]
    state = official(blocks=DEPTH + 3)
    more = convert_official(save(tmp_path / "more.pt", state))
    assert list(more.sites) == [f"block.{i}" for i in range(DEPTH)]
    last = more.tensors()[f"prompts.block.{DEPTH - 1}"]
    assert torch.equal(last[0], state["prompt_embeddings"][DEPTH - 1])


def test_without_gate_it_is_prompt_tuning(tmp_path: Path) -> None:
    state = official(gate=False)
    patch = convert_official(save(tmp_path / "pt.pt", {"model": state}))
    assert (patch.variant.gate, patch.variant.condition) == ("none", "t")
    c, x = torch.randn(2, WIDTH), torch.zeros(2, COUNT, WIDTH)
    expected = state["prompt_embeddings"][1].expand(2, -1, -1)
    torch.testing.assert_close(added(patch, c, "block.1", x), expected)


def test_prepended_prompts_see_the_timestep_only(tmp_path: Path) -> None:
    patch = convert_official(save(tmp_path / "p.pt", official(count=50)))
    assert (patch.variant.mix, patch.variant.condition) == ("prepend", "t")
    assert (patch.variant.grid, patch.variant.prompts) == (None, 50)
    # As many prompts as tokens: the file looks like adding, and the caller knows better.
    asked = convert_official(save(tmp_path / "q.pt", official()), mix="prepend")
    assert (asked.variant.mix, asked.variant.prompts) == ("prepend", COUNT)


def test_a_square_number_that_is_not_the_tokens_was_prepended(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", official(count=COUNT, side=SIDE + 1))
    assert convert_official(path).variant.mix == "prepend"
    with pytest.raises(PatchError, match="one prompt for each of 25 tokens"):
        convert_official(path, mix="add")


def test_mix_without_the_backbone(tmp_path: Path) -> None:
    def given(count: int) -> Path:
        return save(tmp_path / f"{count}.pt", learned(official(count=count)))

    assert convert_official(given(256)).variant.grid == (16, 16)  # 256 pixels
    assert convert_official(given(1024)).variant.grid == (32, 32)  # 512 pixels
    assert convert_official(given(50)).variant.mix == "prepend"
    with pytest.raises(PatchError, match=r'49\.pt.*256 or 1024.*49.*mix="add" or mix="prepend"'):
        convert_official(given(49))
    assert convert_official(given(49), mix="add").variant.grid == (7, 7)
    with pytest.raises(PatchError, match="a square of tokens"):
        convert_official(given(50), mix="add")
    with pytest.raises(PatchError, match="found 'both'"):
        convert_official(given(50), mix="both")  # type: ignore[arg-type]


def test_prepended_prompts_without_gate_do_not_exist(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", official(count=50, gate=False))
    with pytest.raises(PatchError, match=r"x\.pt.*a gate.*50 prompts a block and no gate"):
        convert_official(path)


def test_base_from_the_backbone_or_asked_for(tmp_path: Path) -> None:
    for twin in TWINS:
        state = official(blocks=3, base=twin)
        path = save(tmp_path / "whole.pt", state)
        assert convert_official(path).base is twin
    state = official(blocks=3, count=256, base=TWINS[0])
    path = save(tmp_path / "prompts.pt", learned(state))
    with pytest.raises(PatchError, match=r"prompts\.pt.*base=.*convert-dit/2, convert-dit/4"):
        convert_official(path)
    assert convert_official(path, base="convert-dit/4").base is TWINS[1]
    assert convert_official(path, base=TWINS[0]).base is TWINS[0]


def test_wrong_and_unknown_bases(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", official())
    for wrong in ("dit-b/2", "convert-dit/2", "sd15"):
        with pytest.raises(PatchError, match=rf"x\.pt: expected .* base {wrong}.*depth 4, patch"):
            convert_official(path, base=wrong)
    with pytest.raises(PatchError, match="known bases"):
        convert_official(path, base="dit-q/2")
    strange = official()
    strange["x_embedder.proj.weight"] = torch.zeros(WIDTH, 4, 3, 3)
    with pytest.raises(PatchError, match=r"x\.pt.*known DiT.*patch size 3.*register_base"):
        convert_official(save(path, strange))
    deep = learned(official(blocks=DEPTH + 1, count=256))
    with pytest.raises(PatchError, match="known DiT"):
        convert_official(save(path, deep))


def _changed(**changes: object) -> dict[str, object]:
    state: dict[str, object] = {**official(), **changes}
    return {name: value for name, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("contents", "found"),
    [
        ({"model": {"blocks.0.mlp.fc1.weight": torch.zeros(2)}}, "blocks.0.mlp.fc1.weight and no"),
        ({"model": None}, "no tensors and no prompts"),
        ([1, 2], "no tensors and no prompts"),
        (_changed(prompt_embeddings=torch.zeros(4, 5)), r"of shape \(4, 5\)"),
        (_changed(prompt_embeddings=torch.zeros(0, 16, WIDTH)), r"of shape \(0, 16"),
        (_changed(**{"gate.bias": None}), "with {'gate.weight'"),
        (_changed(**{"gate.weight": torch.zeros(COUNT, WIDTH)}), r"'gate.weight': \(16, 24\)"),
        (_changed(prompt_embeddings=torch.full((4, 16, WIDTH), torch.nan)), "NaN or infinity in p"),
        (_changed(prompt_embeddings=torch.zeros(4, 16, WIDTH).long()), "no floating point"),
    ],
)
def test_other_contents_are_refused(tmp_path: Path, contents: object, found: str) -> None:
    target = tmp_path / "out.safetensors"
    with pytest.raises(PatchError, match=rf"x\.pt: expected .*found .*{found}"):
        convert_official(save(tmp_path / "x.pt", contents), target)
    assert not target.exists()
