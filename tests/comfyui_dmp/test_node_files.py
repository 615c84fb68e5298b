"""The nodes and the patch files that they load: folders, lists, messages about bad files."""

from __future__ import annotations

import asyncio
import os
import shutil
from typing import Any

import pytest
import torch

from dmp_common import PatchError

pytestmark = [pytest.mark.host, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def sd15(real):
    return real.FAMILIES["sd15"]


def run_node(cls: Any, **inputs: Any) -> Any:
    return cls.execute(**inputs)[0]


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
    for part in ("../gone.safetensors", str(folder), "found here.safetensors", "dmp-train-repair"):
        assert part in text
    assert nodes["DMP_LoadApply"].validate_inputs() is True  # another node gives the name
    rows = dict.fromkeys(("patch_1", "patch_2", "patch_3", "patch_4"), "None")
    validate = nodes["DMP_Stack"].validate_inputs
    assert validate(**rows) is True
    rows |= {"patch_2": "a.safetensors", "patch_4": "b.safetensors"}
    assert "expected a.safetensors and b.safetensors in" in validate(**rows)


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
