"""The example workflows: made by `workflows/make.py`, and true to the nodes' schemas."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "workflows"


def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("workflows_make", FOLDER / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NAMES = sorted(maker().WORKFLOWS)
OTHER_PACKS = {"UnetLoaderGGUF"}  # of ComfyUI-GGUF


def test_files_are_what_is_made():
    files = maker().files()
    found = {*FOLDER.glob("*.json"), *FOLDER.glob("api/*.json")}
    assert found == set(files)
    for path, text in files.items():
        assert path.read_text("utf-8") == text, f"{path}: run python workflows/make.py"


@pytest.mark.parametrize("name", NAMES)
def test_links_agree(name):
    flow = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))
    nodes = {node["id"]: node for node in flow["nodes"]}
    assert flow["last_node_id"] == max(nodes)
    for number, source, output, target, slot, kind in flow["links"]:
        out, into = nodes[source]["outputs"][output], nodes[target]["inputs"][slot]
        assert number in out["links"]
        assert into["link"] == number
        assert kind == out["type"]
        assert into["type"] in (kind, "*")
    boxes = [(*node["pos"], *node["size"]) for node in flow["nodes"]]
    for i, (x, y, width, height) in enumerate(boxes):
        for other in boxes[i + 1 :]:
            apart = x + width <= other[0] or other[0] + other[2] <= x
            assert apart or y + height <= other[1] or other[1] + other[3] <= y


@pytest.mark.parametrize("name", [name for name in NAMES if "train" in name])
def test_no_wire_runs_behind_a_node(name):
    flow = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))
    nodes = {node["id"]: node for node in flow["nodes"]}
    for _, source, output, target, slot, _ in flow["links"]:
        ends = nodes[source], nodes[target]
        left, right = ends[0]["pos"][0] + ends[0]["size"][0], ends[1]["pos"][0]
        heights = [end["pos"][1] + 20 * n + 15 for end, n in zip(ends, (output, slot), strict=True)]
        for node in nodes.values():
            (x, y), (width, height) = node["pos"], node["size"]
            beside = x >= right or x + width <= left
            assert beside or y - 30 >= max(heights) or y + height <= min(heights), (ends, node)


@pytest.fixture(scope="session")
def infos(comfyui_path: Path) -> dict[str, Any]:
    """What the server says about each node."""
    classes = dict(importlib.import_module("nodes").NODE_CLASS_MAPPINGS)
    for file in ("nodes_sd3", "nodes_preview_any"):
        module = importlib.import_module(f"comfy_extras.{file}")
        if hasattr(module, "NODE_CLASS_MAPPINGS"):
            classes |= module.NODE_CLASS_MAPPINGS
        else:
            extension = asyncio.run(module.comfy_entrypoint())
            nodes = asyncio.run(extension.get_node_list())
            classes |= {node.GET_SCHEMA().node_id: node for node in nodes}
    extension = importlib.import_module("comfyui_dmp.nodes").Extension()
    nodes = asyncio.run(extension.get_node_list())
    classes |= {node.GET_SCHEMA().node_id: node for node in nodes}
    return {name: _inputs(classes[name]) for name in maker().NODES if name not in OTHER_PACKS}


def _inputs(cls: Any) -> tuple[dict[str, Any], set[str], list[tuple[str, str]]]:
    """Inputs by name, which of them may be left out, and the names and types of the outputs."""
    types = cls.INPUT_TYPES()
    optional = types.get("optional", {})
    names = getattr(cls, "RETURN_NAMES", None) or cls.RETURN_TYPES
    outputs = [(name, str(kind)) for name, kind in zip(names, cls.RETURN_TYPES, strict=True)]
    return {**types.get("required", {}), **optional}, set(optional), outputs


def _is_widget(kind: Any) -> bool:
    return isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


@pytest.mark.host
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", sorted(set(maker().NODES) - OTHER_PACKS))
def test_table_of_nodes_is_comfyuis(infos, kind):
    """Versions may have more inputs and outputs: those of SaveImage and PreviewAny are new.

    Workflows keep the values of widgets by place, so new ones come last.
    """
    sockets, widgets, outputs = maker().NODES[kind]
    inputs, optional, found = infos[kind]
    known = [name for name, spec in inputs.items() if _is_widget(spec[0])]
    assert widgets == known[: len(widgets)]
    own = {name: str(spec[0]) for name, spec in inputs.items() if not _is_widget(spec[0])}
    assert sockets.items() <= own.items()
    assert set(inputs) - set(sockets) - set(widgets) <= optional
    assert outputs == found[: len(outputs)]


@pytest.mark.host
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_values_are_allowed(infos, name):
    graph = json.loads((FOLDER / "api" / f"{name}.json").read_text("utf-8"))
    for node in graph.values():
        if node["class_type"] in OTHER_PACKS:
            continue
        inputs, optional, _ = infos[node["class_type"]]
        assert set(inputs) - optional <= set(node["inputs"]) <= set(inputs)
        for key, value in node["inputs"].items():
            kind, options = inputs[key][0], inputs[key][1] if len(inputs[key]) > 1 else {}
            choices = kind if isinstance(kind, list) else options.get("options")
            if isinstance(value, list):
                assert value[0] in graph
            elif key not in ("ckpt_name", "patch_name") and choices is not None:
                assert value in choices
            elif kind in ("INT", "FLOAT"):
                assert options["min"] <= value <= options.get("max", value)
