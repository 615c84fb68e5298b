"""The nodes in ComfyUI's own API: schemas, files, settings, pictures and messages."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import json
import os
import shutil
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
}


@pytest.fixture(scope="session")
def nodes(comfyui_path: Path) -> dict[str, Any]:
    """The node classes by id, through the pack's entry point, as ComfyUI gets them."""
    spec = importlib.util.spec_from_file_location("a.b_c-d/pack", ROOT / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    async def classes() -> list[Any]:
        extension = await module.comfy_entrypoint()
        return await extension.get_node_list()

    return {cls.GET_SCHEMA().node_id: cls for cls in asyncio.run(classes())}


@pytest.fixture
def folder(nodes, tmp_path, monkeypatch) -> Path:
    """A models/dmp folder of its own."""
    import folder_paths

    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "dmp", ([str(tmp_path)], {".safetensors"})
    )
    folder_paths.filename_list_cache.pop("dmp", None)
    return tmp_path


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


def test_folder_is_registered_with_a_filter(nodes, comfyui_path):
    import folder_paths

    paths, extensions = folder_paths.folder_names_and_paths["dmp"]
    assert os.path.join(folder_paths.models_dir, "dmp") in paths
    assert os.path.isdir(os.path.join(folder_paths.models_dir, "dmp"))
    assert extensions == {".safetensors"}


def test_folders_of_extra_model_paths_stay(nodes, tmp_path, monkeypatch):
    import folder_paths

    from comfyui_dmp import files

    extra = str(tmp_path / "elsewhere")
    monkeypatch.delitem(folder_paths.folder_names_and_paths, "dmp")
    folder_paths.add_model_folder_path("dmp", extra)
    files.register_folder()
    files.register_folder()
    paths, extensions = folder_paths.folder_names_and_paths["dmp"]
    assert paths == [extra, os.path.join(folder_paths.models_dir, "dmp")]
    assert extensions == {".safetensors"}


def test_files_in_subfolders_are_listed(nodes, folder, sd15):
    sd15.patch().save(folder / "a.safetensors")
    sd15.patch().save(folder / "deep" / "b.safetensors")
    (folder / "notes.txt").write_text("no")
    options = nodes["DMP_Load"].GET_SCHEMA().inputs[0].options
    assert options == ["a.safetensors", os.path.join("deep", "b.safetensors")]
    record = run_node(nodes["DMP_Load"], patch_name=options[1])
    assert record.loaded.path == folder / "deep" / "b.safetensors"
    assert (record.strength, record.start, record.end) == (1.0, 0.0, 1.0)


def test_a_replaced_file_is_read_again(nodes, folder, sd15):
    load, path = nodes["DMP_Load"], folder / "p.safetensors"
    sd15.patch(1).save(path)
    mark = load.fingerprint_inputs(patch_name="p.safetensors")
    first = run_node(load, patch_name="p.safetensors").loaded
    assert run_node(load, patch_name="p.safetensors").loaded is first  # not read twice
    assert load.fingerprint_inputs(patch_name="p.safetensors") == mark
    sd15.patch(2).save(path)
    assert load.fingerprint_inputs(patch_name="p.safetensors") != mark
    second = run_node(load, patch_name="p.safetensors").loaded
    assert not torch.equal(
        second.patch.tensors()["prompts.in.1"], first.patch.tensors()["prompts.in.1"]
    )
    assert load.fingerprint_inputs(patch_name="gone.safetensors") == ""


def test_a_workflow_with_a_missing_file_says_which_and_what_to_do(nodes, folder, monkeypatch):
    """Through ComfyUI's own check of a workflow, which would name no remedy."""
    import execution
    import nodes as core

    monkeypatch.setattr(core, "NODE_CLASS_MAPPINGS", core.NODE_CLASS_MAPPINGS | nodes)
    (folder / "here.safetensors").write_text("its content is read at the run")

    def told(kind: str, **inputs: Any) -> str:
        graph = {"1": {"class_type": kind, "inputs": inputs}}
        valid, errors, _ = asyncio.run(execution.validate_inputs("id", graph, "1", {}))
        assert valid is not bool(errors)
        return " ".join(error["details"] for error in errors)

    assert told("DMP_Load", patch_name="here.safetensors") == ""
    text = told("DMP_Load", patch_name="../gone.safetensors")
    for part in ("../gone.safetensors", str(folder), "found here.safetensors", "TRAINING.md"):
        assert part in text
    assert nodes["DMP_LoadApply"].validate_inputs() is True  # another node gives the name
    rows = dict.fromkeys(("patch_1", "patch_2", "patch_3", "patch_4"), "None")
    validate = nodes["DMP_Stack"].validate_inputs
    assert validate(**rows) is True
    rows |= {"patch_2": "a.safetensors", "patch_4": "b.safetensors"}
    assert "expected a.safetensors and b.safetensors in" in validate(**rows)


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


def test_heat_map_shows_the_timesteps_of_the_scheduler(host, run, sd15):
    patcher, record = sd15.comfy(), run.record(sd15.patch())
    e, timesteps = host.gate_embedding(patcher, record, "karras", 10, 0)
    assert timesteps.shape == (10,)
    assert timesteps[0] == 999
    assert timesteps.diff().max() < 0
    mlp = patcher.model.diffusion_model.time_embed
    from dmp_common.bases.timesteps import sinusoid

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


def test_bad_files_are_refused_with_a_message(nodes, folder, sd15):
    import safetensors.torch

    good = folder / "good.safetensors"
    sd15.patch().save(good)
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "cut.safetensors").write_bytes(good.read_bytes()[:-100])
    (folder / "text.safetensors").write_text("hello, this is no safetensors file")
    safetensors.torch.save_file({"lora_up": torch.zeros(2)}, folder / "lora.safetensors")
    for name in ("empty", "cut", "text", "lora"):
        with pytest.raises(PatchError, match=rf"{name}\.safetensors: expected .* found "):
            run_node(nodes["DMP_Load"], patch_name=f"{name}.safetensors")
    run_node(nodes["DMP_Load"], patch_name="good.safetensors")


def test_copied_files_are_not_mapped(nodes, folder, sd15, run):
    """A file that shrinks while it is in use must not kill the server."""
    path = folder / "p.safetensors"
    sd15.patch().save(path)
    record = run_node(nodes["DMP_Load"], patch_name="p.safetensors")
    shutil.copy(path, folder / "kept.safetensors")
    with path.open("r+b") as file:
        file.truncate(10)
    patched = run_node(nodes["DMP_Apply"], model=sd15.comfy(), dmp_patch=record)
    assert run.call(patched, sd15, torch.tensor([2.0])).isfinite().all()


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
