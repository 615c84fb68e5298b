"""Import of official checkpoints: the right numbers, and the right questions."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dmp_common import Patch, PatchError
from dmp_common.api import convert_official
from dmp_common.patch.file import file_hash
from tests.official import (
    COUNT,
    DEPTH,
    SIDE,
    SIZE,
    TWINS,
    WIDTH,
    checkpoint,
    config,
    learned,
    official,
    save,
)


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


def hydra(value: object, monkeypatch: pytest.MonkeyPatch) -> object:
    """A configuration pickled as omegaconf pickles it; its classes are needed and then gone.

    Containers keep entries in `_content`, leaves their value in `_val`, and both their parent.
    """
    module = types.ModuleType("omegaconf")

    class DictConfig:
        def __setstate__(self, state: object) -> None:
            raise AssertionError("unpickled the configuration")

    class AnyNode(DictConfig):
        pass

    def made(value: object, parent: object) -> object:
        node = DictConfig() if isinstance(value, dict) else AnyNode()
        node.__dict__.update(_metadata=None, _parent=parent)
        if isinstance(value, dict):
            node.__dict__["_content"] = {name: made(child, node) for name, child in value.items()}
        else:
            node.__dict__["_val"] = value
        return node

    for cls in (DictConfig, AnyNode):
        cls.__module__, cls.__qualname__ = "omegaconf", cls.__name__
        setattr(module, cls.__name__, cls)
    monkeypatch.setitem(sys.modules, "omegaconf", module)
    return made(value, None)


def trained(path: Path, state: dict[str, Tensor], configuration: object) -> Path:
    """As the official train.py saves it."""
    moments = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3), "seen": torch.arange(3)}
    optimizer = {"state": {0: moments}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999)}]}
    return save(path, {"model": state, "opt": optimizer, "config": configuration})


def test_converted_patch_adds_what_the_official_code_adds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = official()
    path = trained(tmp_path / "0010000.pt", state, hydra(config(), monkeypatch))
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
    path = trained(tmp_path / "x.pt", state, config())
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
    patch = convert_official(save(tmp_path / "bare.pt", state), mix="add")
    for i in range(DEPTH):
        prompts = patch.tensors()[f"prompts.block.{i}"]
        assert prompts.dtype == torch.float32
        assert torch.equal(prompts[0], values[i].float())


def test_first_blocks_and_prompts_that_are_never_read(tmp_path: Path) -> None:
    fewer = convert_official(save(tmp_path / "fewer.pt", official(blocks=2)), mix="add")
    assert list(fewer.sites) == ["block.0", "block.1"]
    state = official(blocks=DEPTH + 3)
    more = convert_official(save(tmp_path / "more.pt", state), mix="add")
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
    # As many prompts as tokens: only the configuration or the caller knows.
    path = save(tmp_path / "q.pt", official())
    with pytest.raises(PatchError, match=r'q\.pt.*added or prepended.*16 prompts.*mix="add"'):
        convert_official(path)
    for asked in (
        convert_official(path, mix="prepend"),
        convert_official(save(tmp_path / "r.pt", checkpoint(official(), type="prepend"))),
    ):
        assert (asked.variant.mix, asked.variant.prompts) == ("prepend", COUNT)


@pytest.mark.parametrize("stored", ["omegaconf", "plain"])
def test_options_are_read_from_the_configuration(
    tmp_path: Path, stored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def converted(state: dict[str, Tensor], **options: object) -> Patch:
        told = config(**options)
        path = trained(
            tmp_path / "x.pt", state, hydra(told, monkeypatch) if stored == "omegaconf" else told
        )
        return convert_official(path)

    assert converted(official()).variant.mix == "add"
    assert converted(official(), type="prepend").variant.mix == "prepend"
    assert converted(official(), topk=1).variant.prompt_init == "zero"
    random = converted(official(), init_type="random").variant
    assert (random.prompt_init, random.gate_init) == ("random", "random")
    alone = converted(official(gate=False), gate_type="PT", init_type="random").variant
    assert (alone.gate, alone.prompt_init, alone.gate_init) == ("none", "random", "zero")
    assert converted(official(blocks=2), pt_depth=2).variant.sites == ("block.0", "block.1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topk": 0.75}, "topk 0.75, whose softmax over 12 of 16 prompts no variant has"),
        ({"topk": 0.5}, "softmax over 8 of 16"),
        ({"topk": float("nan")}, "models.vp.topk"),
        ({"topk": "most"}, "models.vp.topk.*'most'"),
        ({"type": "multiply"}, "models.vp.type.*'multiply'"),
        ({"type": ["add"]}, "models.vp.type.*an object"),
        ({"num_tokens": 25}, r"25 prompts a block .*configuration in it says, found 16"),
        ({"num_tokens": 10**5000}, "models.vp.num_tokens"),
        ({"pt_depth": 2}, r"2 blocks with prompts .*found 4"),
        ({"gate_type": "PT"}, r"0 gate .*found 1"),
        ({"gate_type": "attention"}, "models.vp.gate_type"),
        ({"init_type": "\x1b[31m"}, r"init_type.*'\\x1b\[31m'"),
    ],
)
def test_options_that_no_patch_has_are_refused(
    tmp_path: Path, options: dict[str, object], message: str
) -> None:
    target = tmp_path / "out.safetensors"
    with pytest.raises(PatchError, match=rf"x\.pt: expected .*{message}"):
        convert_official(save(tmp_path / "x.pt", checkpoint(official(), **options)), target)
    assert not target.exists()


def test_the_caller_cannot_contradict_the_configuration(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", checkpoint(official()))
    assert convert_official(path, mix="add").variant.mix == "add"
    with pytest.raises(PatchError, match=r"x\.pt.*prompts to prepend.*says add"):
        convert_official(path, mix="prepend")
    state = learned(official(blocks=3, count=256, base=TWINS[0]))
    told = checkpoint(state, num_tokens=256, pt_depth=3)
    told["config"]["models"]["name"] = "Convert-DiT/4"  # type: ignore[index]
    path = save(tmp_path / "y.pt", told)
    assert convert_official(path).base is TWINS[1]
    with pytest.raises(PatchError, match=r"base convert-dit/2, found convert-dit/4 in its conf"):
        convert_official(path, base="convert-dit/2")


def test_prompts_prepended_to_the_first_blocks_alone_are_refused(tmp_path: Path) -> None:
    """The official code carries the outputs of these prompts on through the other blocks."""
    told = checkpoint(official(blocks=2, count=50), type="prepend", num_tokens=50, pt_depth=2)
    for contents in (told, official(blocks=2, count=50)):
        path = save(tmp_path / "x.pt", contents)
        with pytest.raises(PatchError, match=r"x\.pt.*all 4 blocks, found those of the first 2"):
            convert_official(path)


def test_gates_of_unpublished_versions_are_refused(tmp_path: Path) -> None:
    for name in ("gate.w_q.weight", "prompt_proj.weight"):
        state = {**official(gate=False), name: torch.zeros(WIDTH, WIDTH)}
        with pytest.raises(PatchError, match=rf"{name}, which the published code"):
            convert_official(save(tmp_path / "x.pt", state), mix="add")


def test_a_square_number_that_is_not_the_tokens_was_prepended(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", official(count=COUNT, side=SIDE + 1))
    assert convert_official(path).variant.mix == "prepend"
    with pytest.raises(PatchError, match="one prompt for each of 25 tokens"):
        convert_official(path, mix="add")


def test_mix_without_the_backbone(tmp_path: Path) -> None:
    def given(count: int) -> Path:
        return save(tmp_path / f"{count}.pt", learned(official(count=count)))

    for count, side in ((256, 16), (1024, 32), (49, 7)):
        with pytest.raises(PatchError, match=rf'{count}\.pt.*mix="add" or mix="prepend"'):
            convert_official(given(count))
        assert convert_official(given(count), mix="add").variant.grid == (side, side)
    assert convert_official(given(50)).variant.mix == "prepend"
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
        path = save(tmp_path / "whole.pt", checkpoint(state, pt_depth=3))
        assert convert_official(path).base is twin
    state = official(blocks=3, count=256, base=TWINS[0])
    path = save(tmp_path / "prompts.pt", learned(state))
    with pytest.raises(PatchError, match=r"prompts\.pt.*base=.*convert-dit/2, convert-dit/4"):
        convert_official(path)
    assert convert_official(path, base="convert-dit/4", mix="add").base is TWINS[1]
    assert convert_official(path, base=TWINS[0], mix="add").base is TWINS[0]


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
