"""The nodes in ComfyUI's own API: schemas, files, settings, pictures and messages."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dmp_common import PatchError

pytestmark = [pytest.mark.host, pytest.mark.filterwarnings("ignore")]

ROOT = Path(__file__).resolve().parents[2]
NAMES = {
    "DMP_Load": "Load DMP Patch",
    "DMP_Apply": "Apply DMP",
    "DMP_GateStrength": "DMP Gate Strength",
    "DMP_LoadApply": "Load & Apply DMP",
    "DMP_GateHeatmap": "DMP Gate Heatmap",
    "DMP_PatchInfo": "DMP Patch Info",
    "DMP_Stack": "Stack DMP Patches",
    "DMP_CreateHook": "Create Hook DMP",
    "DMP_Prompts": "DMP Prompt List",
    "DMP_Train": "Train DMP Patch",
    "DMP_Save": "Save DMP Patch",
}


@pytest.fixture
def sd15(real):
    return real.FAMILIES["sd15"]


def run_node(cls: Any, **inputs: Any) -> Any:
    return cls.execute(**inputs)[0]


def test_ids_and_display_names_are_permanent(nodes):
    assert {key: cls.GET_SCHEMA().display_name for key, cls in nodes.items()} == NAMES
    assert list(nodes) == list(NAMES)


def test_entry_leaves_no_path_behind(nodes):
    assert not [p for p in sys.path if p and Path(p) == ROOT / "comfyui_dmp"]
    assert sys.modules["comfyui_dmp"].__file__ == str(ROOT / "comfyui_dmp" / "__init__.py")


def test_everything_is_described(nodes, folder):
    for name, cls in nodes.items():
        schema = cls.GET_SCHEMA()
        assert schema.description.endswith("."), name
        for port in (*schema.inputs, *schema.outputs):
            assert port.tooltip, f"{name}: {port.id}"
        json.dumps(cls.GET_NODE_INFO_V1())


def test_translations_have_every_input(nodes, folder):
    """The English ones say what the schemas say; ComfyUI shows them in its place."""
    english, chinese = (
        json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text("utf-8"))
        for language in ("en", "zh")
    )
    assert list(english) == list(chinese)
    for name, cls in nodes.items():
        schema, told = cls.GET_SCHEMA(), english[name]
        assert (told["display_name"], told["description"]) == (NAMES[name], schema.description)
        tooltips = {port.id: port.tooltip for port in schema.inputs}
        assert {key: text["tooltip"] for key, text in told["inputs"].items()} == tooltips
        assert set(chinese[name]["inputs"]) == set(tooltips)


def test_help_pages_have_every_input_and_output(nodes, folder):
    """Several inputs of one meaning share a row."""
    for name, cls in nodes.items():
        schema = cls.GET_SCHEMA()
        page = (ROOT / "comfyui_dmp" / "web" / "docs" / f"{name}.md").read_text("utf-8")
        assert page.startswith(f"# {NAMES[name]}\n")
        told = {
            kind: re.findall(r"^\| (.*?) \|", rows, re.MULTILINE)
            for kind, rows in re.findall(r"\| (\w+) \| Meaning \|\n\|.*\n((?:\|.*\n?)+)", page)
        }
        inputs = [each for row in told["Input"] for each in _names_of(row)]
        assert sorted(inputs) == sorted(port.id for port in schema.inputs), name
        assert told["Output"] == [port.display_name for port in schema.outputs], name


def _names_of(row: str) -> list[str]:
    """The inputs that a row of a help page names: `a, b`, or `a_1 ... a_4`."""
    if found := re.fullmatch(r"(\w+_)1 \.\.\. \1(\d)", row):
        return [f"{found[1]}{number}" for number in range(1, int(found[2]) + 1)]
    return row.split(", ")


def test_a_search_finds_the_nodes(nodes, folder):
    """ComfyUI 0.8 has no aliases: there the schemas leave them out."""
    found = {name: cls.GET_NODE_INFO_V1().get("search_aliases") for name, cls in nodes.items()}
    if not hasattr(nodes["DMP_Load"].GET_SCHEMA(), "search_aliases"):
        assert set(found.values()) == {None}
        return
    for name in ("DMP_Load", "DMP_LoadApply", "DMP_Stack"):
        assert {"lora", "load patch"} <= set(found[name])
    assert all("dmp" in aliases for aliases in found.values())


def test_rare_inputs_are_advanced(nodes, folder):
    info = nodes["DMP_GateStrength"].INPUT_TYPES()
    rare = {
        name
        for inputs in info.values()
        for name, (_, options) in inputs.items()
        if options.get("advanced")
    }
    assert {"start_percent", "early", "temperature", "sites", "keyframes"} <= rare
    assert not {"dmp_patch", "strength", "mask"} & rare


def test_load_and_apply_is_both_in_one(nodes, folder, sd15, run):
    sd15.patch().save(folder / "p.safetensors")
    plain, sigmas = sd15.comfy(), torch.tensor([2.0])
    record = run_node(nodes["DMP_Load"], patch_name="p.safetensors")
    one = run_node(nodes["DMP_Apply"], model=plain, dmp_patch=record)
    both = nodes["DMP_LoadApply"]
    two = run_node(both, model=plain, patch_name="p.safetensors", strength=1.0)
    out = run.call(one, sd15, sigmas)
    assert torch.equal(run.call(two, sd15, sigmas), out)
    off = run_node(both, model=plain, patch_name="p.safetensors", strength=0.0)
    alone = run.call(plain, sd15, sigmas)
    assert torch.equal(run.call(off, sd15, sigmas), alone)
    values = {"model": plain, "patch_name": "p.safetensors", "strength": 1.0}
    late = run_node(both, **values, start_percent=0.8)
    assert torch.equal(run.call(late, sd15, sigmas), alone)
    assert torch.equal(run.call(run_node(both, **values, end_percent=0.9), sd15, sigmas), out)


def test_a_stack_is_the_nodes_one_after_the_other(nodes, folder, sd15, run):
    for name, seed in (("a", 1), ("b", 2)):
        sd15.patch(seed).save(folder / f"{name}.safetensors")
    plain, sigmas, stack = sd15.comfy(), torch.tensor([2.0]), nodes["DMP_Stack"]
    rows = {
        f"{key}_{row}": value
        for row in range(1, 5)
        for key, value in {"on": True, "patch": "None", "strength": 1.0}.items()
    }
    assert run_node(stack, model=plain, **rows) is plain
    rows |= {"patch_1": "a.safetensors", "patch_3": "b.safetensors", "strength_3": 0.5}
    mark = stack.fingerprint_inputs(**rows)
    both = nodes["DMP_LoadApply"]
    chained = run_node(both, model=plain, patch_name="a.safetensors", strength=1.0)
    one = run.call(chained, sd15, sigmas)
    chained = run_node(both, model=chained, patch_name="b.safetensors", strength=0.5)
    out = run.call(run_node(stack, model=plain, **rows), sd15, sigmas)
    assert torch.equal(out, run.call(chained, sd15, sigmas))
    rows["on_3"] = False
    assert torch.equal(run.call(run_node(stack, model=plain, **rows), sd15, sigmas), one)
    sd15.patch(3).save(folder / "b.safetensors")
    assert stack.fingerprint_inputs(**rows) != mark


def test_gate_strength_sets_what_it_says(nodes, run, sd15):
    record = run.record(sd15.patch(sites="all"))
    settings = dict(
        strength=0.5,
        start_percent=0.1,
        end_percent=0.9,
        early=1.0,
        middle=0.5,
        late=0.0,
        temperature=2.0,
        sites="encoder",
    )
    changed = run_node(nodes["DMP_GateStrength"], dmp_patch=record, **settings)
    assert changed.loaded is record.loaded
    assert (changed.strength, changed.start, changed.end) == (0.5, 0.1, 0.9)
    assert (changed.curve, changed.temperature) == ((1.0, 0.5, 0.0), 2.0)
    assert changed.sites == frozenset(sd15.base.site_sets["encoder"])
    assert record.strength == 1.0  # the wire's own record is as it was
    every = run_node(nodes["DMP_GateStrength"], dmp_patch=record, **{**settings, "sites": "all"})
    assert every.sites is None
    with pytest.raises(PatchError, match="expected sites of this patch"):
        run_node(nodes["DMP_GateStrength"], dmp_patch=record, **{**settings, "sites": "nowhere"})
    plain = dict.fromkeys(("early", "middle", "late"), 1.0)
    texts = {"keyframes": "0: 1, 1: 0", "site_strengths": "IN.1: 0.5", "mask": torch.ones(1, 8, 8)}
    told = run_node(nodes["DMP_GateStrength"], dmp_patch=record, **{**settings, **plain, **texts})
    assert told.keyframes == ((0.0, 1.0), (1.0, 0.0))
    assert told.site_strengths == (("in.1", 0.5),)
    assert told.mask is texts["mask"]
    with pytest.raises(PatchError, match=r"test.safetensors.*either keyframes or the factors"):
        run_node(nodes["DMP_GateStrength"], dmp_patch=record, **settings, keyframes="0: 1")
    with pytest.raises(PatchError, match=r"test.safetensors.*start <= end"):
        run_node(nodes["DMP_GateStrength"], dmp_patch=record, **{**settings, "start_percent": 0.95})


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "pixart"])
def test_heat_map(nodes, run, real, name):
    family = real.FAMILIES[name]
    image = run_node(
        nodes["DMP_GateHeatmap"],
        dmp_patch=run.record(family.patch()),
        model=family.comfy(dtype=torch.float16),
        scheduler="normal",
        steps=8,
        sites="first, last",
        scale="per-panel",
        class_label=0,
    )
    assert image.shape[0] == 1
    assert image.shape[3] == 3
    assert image.dtype == torch.float32
    assert 0.0 <= image.min() < image.max() <= 1.0


def test_heat_map_shows_the_timesteps_of_the_scheduler(run, sd15):
    from comfyui_dmp import heatmaps
    from dmp_common.bases.timesteps import sinusoid

    patcher, record = sd15.comfy(), run.record(sd15.patch())
    e, timesteps = heatmaps.gate_embedding(patcher, record, "karras", 10, 0)
    assert timesteps.shape == (10,)
    assert timesteps[0] == 999
    assert timesteps.diff().max() < 0
    mlp = patcher.model.diffusion_model.time_embed
    torch.testing.assert_close(e, mlp(sinusoid(timesteps, 32)))


def test_info(nodes, folder, sd15):
    path = folder / "p.safetensors"
    digest = sd15.patch().save(path, metadata={"ss_steps": "1234"})
    record = run_node(nodes["DMP_Load"], patch_name="p.safetensors")
    out = nodes["DMP_PatchInfo"].execute(dmp_patch=record)
    for word in ("comfy-sd15", digest, "1234", "in.1"):
        assert word in out[0]
    assert out.ui == {"text": (out[0],)}


def test_nodes_know_modulating_patches(nodes, folder, sd15):
    """Their description is short, the heat map draws them, and sets of outputs are named."""
    patch = sd15.patch(mix="modulate", sites="modulated", guidance=4.5)
    patch.save(folder / "m.safetensors", metadata={"dmp.use": '{"objective": "distill"}'})
    record = run_node(nodes["DMP_Load"], patch_name="m.safetensors")
    text = nodes["DMP_PatchInfo"].execute(dmp_patch=record)[0]
    for words in ("distill", "strength 1 stands for scale 4.5; use CFG 1", "(modulated)"):
        assert words in text
    assert len(text.splitlines()) < 60
    values = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, "temperature": 1.0}
    curve = {"early": 1.0, "middle": 1.0, "late": 1.0, "sites": "linear"}
    record = run_node(nodes["DMP_GateStrength"], dmp_patch=record, **values, **curve)
    assert record.sites == frozenset(sd15.base.output_sets["linear"])
    image = run_node(
        nodes["DMP_GateHeatmap"],
        dmp_patch=record,
        model=sd15.comfy(),
        scheduler="normal",
        steps=4,
        sites="first, last",
        scale="shared",
    )
    assert image.dim() == 4
    assert image.min() < image.max()


def test_root_module_is_harmless_without_comfyui(monkeypatch):
    spec = importlib.util.spec_from_file_location("pack", ROOT / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    before = list(sys.path)
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert asyncio.iscoroutinefunction(module.comfy_entrypoint)
    assert (ROOT / module.WEB_DIRECTORY).resolve().parent == ROOT / "comfyui_dmp"
    assert sys.path == before
