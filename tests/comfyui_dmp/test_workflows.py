"""The example workflows: made by `workflows/make.py`, and true to the nodes' schemas."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.comfyui_dmp.wires import Box, behind, boxes_of, wires_of
from workflows import files, make
from workflows.nodes import DEFAULTS, NEWER, NODES, OTHER_PACKS

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
NAMES = sorted(make.WORKFLOWS)
_EXTRAS = ("sd3", "preview_any", "mask", "hooks", "images", "image_compare")


def flow_of(name: str) -> dict[str, Any]:
    return dict(json.loads((FOLDER / f"{name}.json").read_text("utf-8")))


def test_files_are_what_is_made():
    made = make.files()
    found = {*FOLDER.glob("*.json"), *FOLDER.glob("api/*.json")}
    assert found == set(made)
    for path, text in made.items():
        assert path.read_text("utf-8") == text, f"{path}: run python workflows/make.py"


@pytest.mark.parametrize("name", NAMES)
def test_links_agree(name):
    flow = flow_of(name)
    nodes = {node["id"]: node for node in flow["nodes"]}
    assert flow["last_node_id"] == max(nodes)
    for number, source, output, target, slot, kind in flow["links"]:
        out, into = nodes[source]["outputs"][output], nodes[target]["inputs"][slot]
        assert number in out["links"]
        assert into["link"] == number
        assert kind == out["type"]
        assert into["type"] in (kind, "*")


@pytest.mark.parametrize("name", NAMES)
def test_each_has_a_thumbnail(name):
    path = FOLDER / f"{name}.jpg"
    with Image.open(path) as image:
        assert image.size == (640, 395)
    assert path.stat().st_size < 100_000


@pytest.mark.parametrize("name", NAMES)
def test_nothing_hides_a_node_or_a_wire(name):
    flow = flow_of(name)
    boxes = list(boxes_of(flow).values())
    for i, (left, top, right, bottom) in enumerate(boxes):
        for other in boxes[i + 1 :]:
            beside = right <= other[0] or other[2] <= left
            assert beside or bottom <= other[1] or other[3] <= top, (boxes[i], other)
    assert not behind(boxes_of(flow), wires_of(flow))


def test_a_wire_behind_a_node_is_found():
    """Between its ends, above the straight line, and back through its own node."""
    boxes: dict[int, Box] = {1: (0, 0, 100, 100), 2: (200, 0, 300, 90), 3: (400, 0, 500, 400)}
    assert behind(boxes, [(1, 3, (91, 50), (410, 50))])[0].startswith("1 -> 3 runs behind 2 at ")
    assert behind(boxes, [(1, 3, (91, 50), (410, 200))])  # it leaves flatter than a straight line
    assert behind(boxes, [(3, 1, (491, 50), (10, 50))])
    boxes[2] = (200, 0, 300, 40)
    assert not behind(boxes, [(1, 3, (91, 50), (410, 50)), (1, 2, (91, 20), (210, 30))])


@pytest.mark.parametrize("name", NAMES)
def test_the_note_says_where_to_get_each_file_and_pack(name):
    """A model's loader says it too, in the form that ComfyUI's dialog of missing models reads."""
    flow = flow_of(name)
    (note,) = (
        node["widgets_values"][0] for node in flow["nodes"] if node["type"] == "MarkdownNote"
    )
    for node in flow["nodes"]:
        linked = node["properties"].get("models", [])
        for value in node["widgets_values"]:
            if not isinstance(value, str) or not value.endswith((".safetensors", ".gguf")):
                continue
            if value in files.PATCHES:
                assert f"**{value}** stands for a patch of yours: {files.PATCHES[value]}" in note
            else:
                folder, _, url = files.MODELS[value]
                assert f"**models/{folder}**: [{value}]({url})" in note
                assert linked == [{"name": value, "url": url, "directory": folder}]
                assert url.endswith(f"/{value}")  # or ComfyUI offers no download
        if node["type"] in OTHER_PACKS | NEWER:
            assert files.PACKS[node["type"]] in note
    assert "`" not in note  # Nodes 2.0 writes code in blue on a brown ground: hard to read
    for template in ("dmp-train-repair", "dmp-train-guidance"):
        assert template in NAMES


@pytest.fixture(scope="session")
def infos(comfyui_path: Path) -> dict[str, Any]:
    """What the server says about each node."""
    classes = dict(importlib.import_module("nodes").NODE_CLASS_MAPPINGS)
    for file in _EXTRAS:
        if importlib.util.find_spec(f"comfy_extras.nodes_{file}") is None:
            continue
        module = importlib.import_module(f"comfy_extras.nodes_{file}")
        if hasattr(module, "NODE_CLASS_MAPPINGS"):
            classes |= module.NODE_CLASS_MAPPINGS
        else:
            extension = asyncio.run(module.comfy_entrypoint())
            nodes = asyncio.run(extension.get_node_list())
            classes |= {node.GET_SCHEMA().node_id: node for node in nodes}
    extension = importlib.import_module("comfyui_dmp.nodes").Extension()
    nodes = asyncio.run(extension.get_node_list())
    classes |= {node.GET_SCHEMA().node_id: node for node in nodes}
    assert set(NODES) - OTHER_PACKS - NEWER <= set(classes)
    return {name: _inputs(classes[name]) for name in NODES if name in classes}


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
@pytest.mark.parametrize("kind", sorted(set(NODES) - OTHER_PACKS))
def test_table_of_nodes_is_comfyuis(infos, kind):
    """Versions may have more inputs and outputs: those of SaveImage and PreviewAny are new.

    Workflows keep the values of widgets by place, so new ones come last.
    """
    if kind not in infos:
        pytest.skip(f"needs a ComfyUI that has {kind}")
    sockets, widgets, outputs = NODES[kind]
    inputs, optional, found = infos[kind]
    known = [name for name, spec in inputs.items() if _is_widget(spec[0])]
    assert widgets == known[: len(widgets)]
    own = {name: str(spec[0]) for name, spec in inputs.items() if not _is_widget(spec[0])}
    assert sockets.items() <= own.items()
    drawn = {"compare_view"}  # the slider of ImageCompare, which has no value
    assert set(inputs) - set(sockets) - set(widgets) - drawn <= optional
    assert outputs == found[: len(outputs)]


@pytest.mark.host
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", sorted(kind for kind in DEFAULTS if kind.startswith("DMP_")))
def test_what_a_workflow_does_not_name_is_the_nodes_default(infos, kind):
    inputs, _, _ = infos[kind]
    for name, value in DEFAULTS[kind].items():
        choices, options = inputs[name]
        first = options.get("options", choices)[0]  # the default of a choice without one
        assert options.get("default", first) == value, name


@pytest.mark.host
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_values_are_allowed(infos, name):
    graph = json.loads((FOLDER / "api" / f"{name}.json").read_text("utf-8"))
    for node in graph.values():
        if node["class_type"] not in infos:
            assert node["class_type"] in OTHER_PACKS | NEWER
            continue
        inputs, optional, _ = infos[node["class_type"]]
        assert set(inputs) - optional <= set(node["inputs"]) <= set(inputs)
        for key, value in node["inputs"].items():
            kind, options = inputs[key][0], inputs[key][1] if len(inputs[key]) > 1 else {}
            choices = kind if isinstance(kind, list) else options.get("options")
            if isinstance(value, list):
                assert value[0] in graph
            elif value not in files.MODELS and value not in files.PATCHES and choices is not None:
                assert value in choices
            elif kind in ("INT", "FLOAT"):
                assert options["min"] <= value <= options.get("max", value)
