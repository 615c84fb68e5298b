"""The example workflows in a real browser against a real server; see `conftest.py`.

They need playwright and COMFYUI_BROWSER, the path of a Chromium. With COMFYUI_SCREENSHOTS, a
folder, the screen is saved there after every run.
"""

from __future__ import annotations

import json
import os
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from dmp_common import Patch, bases, register_base
from tests.comfyui_dmp.server import ROOT, Server, linked, made, message_of, same, save_random
from tests.comfyui_dmp.wires import TITLE, behind, boxes_of
from tests.randomness import randomise
from workflows.nodes import NEWER

pytestmark = [pytest.mark.host, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

WORKFLOWS = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
CHECKPOINTS = {
    "v1-5-pruned-emaonly-fp16.safetensors": "sd15",
    "sd_xl_base_1.0.safetensors": "sdxl",
    "sd3.5_medium_incl_clips_t5xxlfp8scaled.safetensors": "sd3-whole",
}
SMALL = {
    "width": 128,
    "height": 128,
    "pictures": 2,
    "steps": 8,
    "batch_size": 1,
    "sampling_steps": 2,
}
GGUF = ("dmp-repair-quantised", "dmp-train-repair")  # they need ComfyUI-GGUF
BYPASS = 4  # a node's mode in LiteGraph
FIT = """() => {
    const nodes = app.graph._nodes, canvas = app.canvas;
    const left = Math.min(...nodes.map((n) => n.pos[0]));
    const top = Math.min(...nodes.map((n) => n.pos[1])) - 40;
    const right = Math.max(...nodes.map((n) => n.pos[0] + n.size[0]));
    const bottom = Math.max(...nodes.map((n) => n.pos[1] + n.size[1]));
    const scale = Math.min(1780 / (right - left), 900 / (bottom - top), 1.2);
    canvas.ds.scale = scale;
    canvas.ds.offset = [90 / scale - left, 90 / scale - top];
    canvas.setDirty(true, true);
}"""

# The boxes of nodes and the ends of wires, in the units of a workflow. Nodes in HTML are measured.
PLACES = """() => {
    const { scale, offset } = app.canvas.ds, boxes = {};
    for (const node of app.graph._nodes) {
        const [x, y, width, height] = node.boundingRect;
        boxes[node.id] = [x, y, x + width, y + height];
    }
    for (const element of document.querySelectorAll("[data-node-id]")) {
        const { left, top, right, bottom } = element.getBoundingClientRect();
        boxes[element.dataset.nodeId] = [
            left / scale - offset[0], top / scale - offset[1],
            right / scale - offset[0], bottom / scale - offset[1],
        ];
    }
    const links = app.graph.links, wires = [];
    for (const link of links.values ? links.values() : Object.values(links)) {
        const source = app.graph.getNodeById(link.origin_id);
        const target = app.graph.getNodeById(link.target_id);
        wires.push([
            Number(link.origin_id), Number(link.target_id),
            [...source.getOutputPos(link.origin_slot)], [...target.getInputPos(link.target_slot)],
        ]);
    }
    return [boxes, wires, document.querySelectorAll("[data-node-id]").length];
}"""


@pytest.fixture(scope="module")
def filled(server: Server) -> Server:
    """The server with models and patches under the names that the workflows use."""
    if server.pid is None:
        pytest.skip("needs a server that the tests start: set COMFYUI_PATH only")
    for name, kind in CHECKPOINTS.items():
        linked(made(kind), server.models / "checkpoints", name)
    small = register_base(bases.sd3("test-sd3", depth=2, width=128, dual=False, hub_id=None))
    folder = server.models / "dmp"
    for seed, name in enumerate(("sd15-patch", "sd15-other")):
        save_random(folder / f"{name}.safetensors", Patch.create("sd15"), seed)
    save_random(folder / "sdxl-patch.safetensors", Patch.create("sdxl"), 3)
    save_random(folder / "sd35-patch.safetensors", Patch.create(small), 4)
    save_random(folder / "sd15-guidance.safetensors", Patch.create("sd15", guidance=7.0), 5)
    if os.environ.get("COMFYUI_GGUF_PATH"):
        few = server.models / "unet" / "sd3.5_medium-Q4_0.gguf"
        types = write_few(made("sd3-whole"), few)
        use = {"objective": "distill", "cheap": {"types": types, "file": {"name": few.name}}}
        repairing = randomise(Patch.create(small, mix="modulate"), 6, 0.05)
        repairing.save(folder / "sd35-repair-q4_0.safetensors", {"dmp.use": json.dumps(use)})
    return server


def write_few(checkpoint: Path, path: Path) -> dict[str, int]:
    """Writes the transformer of an SD3 checkpoint as GGUF, its blocks' layers in Q4_0.

    Returns:
        For each type how many values have it.
    """
    import gguf

    writer, prefix = gguf.GGUFWriter(None, "sd3"), "model.diffusion_model."
    types: dict[str, int] = {}
    for name, tensor in load_file(checkpoint).items():
        if name.startswith(prefix):
            few = "joint_blocks" in name and tensor.dim() == 2
            kind = gguf.GGMLQuantizationType.Q4_0 if few else gguf.GGMLQuantizationType.F32
            data = gguf.quants.quantize(tensor.float().numpy(), kind)
            writer.add_tensor(name.removeprefix(prefix), data, raw_dtype=kind)
            types[kind.name] = types.get(kind.name, 0) + tensor.numel()
    path.parent.mkdir(parents=True, exist_ok=True)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return types


@pytest.fixture(scope="module")
def page(filled: Server) -> Iterator[Any]:
    """ComfyUI's page in a browser."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    browser_path = os.environ.get("COMFYUI_BROWSER", "")
    if not Path(browser_path).is_file():
        pytest.skip("needs a browser: set COMFYUI_BROWSER to the path of a Chromium")
    settings = {"Comfy.TutorialCompleted": True, "Comfy.VueNodes.Enabled": False}
    filled.post("/settings", settings)
    with playwright.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1900, "height": 1050})
        page.goto(filled.url, wait_until="domcontentloaded", timeout=120_000)
        page.wait_for_function(
            "() => window.app?.graph && window.app.graphToPrompt", timeout=120_000
        )
        time.sleep(5)
        page.keyboard.press("Escape")
        yield page
        browser.close()


def written(name: str, folder: str = "") -> dict[str, Any]:
    """The file of a workflow."""
    path = ROOT / "workflows" / folder / f"{name}.json"
    return dict(json.loads(path.read_text("utf-8")))


def opened(page: Any, name: str, **modes: int) -> dict[str, Any]:
    """Opens a workflow, small enough for a CPU, some of its nodes in another mode."""
    flow, api = written(name), written(name, "api")
    for node in flow["nodes"]:
        if node["type"] in ("EmptyLatentImage", "EmptySD3LatentImage"):
            node["widgets_values"][:2] = [128, 128]
        if node["type"] == "ConditioningSetArea":
            node["widgets_values"][:4] = [value // 4 for value in node["widgets_values"][:4]]
        if node["type"] == "KSampler":
            node["widgets_values"][2] = 2
        if node["type"] == "DMP_Prompts":
            node["widgets_values"][0] = "a cat in a garden\na red bicycle"
        if node["type"] == "DMP_Train":
            known = api[str(node["id"])]["inputs"].items()
            names = [name for name, value in known if not isinstance(value, list)]
            names.insert(names.index("seed") + 1, "")  # what happens to the seed
            values = zip(names, node["widgets_values"], strict=True)
            node["widgets_values"] = [SMALL.get(name, value) for name, value in values]
        node["mode"] = modes.get(node["type"], node.get("mode", 0))
    page.evaluate("async (flow) => { await app.loadGraphData(flow, true, true, 'flow'); }", flow)
    time.sleep(1)
    prompt: dict[str, Any] = page.evaluate("async () => (await app.graphToPrompt()).output")
    return prompt


def run(page: Any, server: Server) -> list[np.ndarray]:
    """Queues what the page shows, as its button does; the pictures by the number of their node."""
    known = set(server.get("/history"))
    page.evaluate("async () => { await app.queuePrompt(0); }")
    while not (new := set(server.get("/history")) - known):
        time.sleep(1)
    entry = server.get("/history")[new.pop()]
    assert entry["status"]["status_str"] == "success", message_of(entry)
    outputs = sorted(entry["outputs"].items(), key=lambda item: int(item[0]))
    return [server.picture(image) for _, output in outputs for image in output.get("images", [])]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflows_run_in_the_browser(page, filled, name):
    if name in GGUF and not os.environ.get("COMFYUI_GGUF_PATH"):
        pytest.skip("needs ComfyUI-GGUF: set COMFYUI_GGUF_PATH to its folder")
    flow, api = written(name), written(name, "api")
    absent = {node["type"] for node in flow["nodes"] if node["type"] in NEWER}
    absent -= set(filled.get("/object_info"))
    for node in (node for node in flow["nodes"] if node["type"] in absent):
        prompt = opened(page, name)
        assert node["type"] in page.locator("body").inner_text()
        # The page sends such a node without its type, so the server knows its number only.
        with pytest.raises(ValueError, match=f"'#{node['id']}'"):
            filled.start(prompt)
        page.keyboard.press("Escape")
    modes = dict.fromkeys(absent, BYPASS)  # Deleting them does the same.
    prompt = opened(page, name, **modes)
    assert values_of(api, absent).items() <= values_of(prompt, absent).items()
    made = run(page, filled)
    assert made
    assert page.evaluate("() => app.canvas.constructor.link_type_colors.DMP_PATCH") == "#00c2b2"
    screenshot(page, name)
    if not absent:
        nothing_is_hidden(page, flow, in_html=False)
    with nodes_in_html(page) as known:
        if known:
            opened(page, name, **modes)
            assert same(run(page, filled), made)  # from ComfyUI's cache
            screenshot(page, f"{name}-html")
            nothing_is_hidden(page, flow, in_html=True)


def values_of(prompt: dict[str, Any], absent: set[str]) -> dict[tuple[str, str], Any]:
    """Node, input and value of a workflow in API format, but for those that `opened` changes."""
    small = ("EmptyLatentImage", "EmptySD3LatentImage", "KSampler", "DMP_Prompts", "DMP_Train")
    small += ("ConditioningSetArea",)
    return {
        (node, key): value
        for node, entry in prompt.items()
        for key, value in entry["inputs"].items()
        if (key not in (*SMALL, "text", "x") or entry["class_type"] not in small)
        and key != "compare_view"  # It holds the pictures that the browser showed last.
        and entry["class_type"] not in absent
    }


def screenshot(page: Any, name: str) -> None:
    """Saves what the page shows, where COMFYUI_SCREENSHOTS asks for it."""
    page.evaluate(FIT)
    time.sleep(2)
    if folder := os.environ.get("COMFYUI_SCREENSHOTS"):
        page.screenshot(path=str(Path(folder) / f"{name}.png"))


@contextmanager
def nodes_in_html(page: Any) -> Iterator[bool]:
    """The page with nodes in HTML; gives whether this version of ComfyUI has them."""
    known = page.evaluate("() => 'Comfy.VueNodes.Enabled' in app.ui.settings.settingsLookup")
    switch = """async (on) => {
        await app.ui.settings.setSettingValueAsync("Comfy.VueNodes.Enabled", on);
    }"""
    try:
        if known:
            page.evaluate(switch, True)
        yield bool(known)
    finally:
        if known:
            page.evaluate(switch, False)


def nothing_is_hidden(page: Any, flow: dict[str, Any], in_html: bool) -> None:
    """Nodes are no larger than their file says, and no wire runs behind one.

    ComfyUI 0.8 draws nodes in HTML larger, but for their titles, and as much farther apart.
    """
    boxes, wires, elements = page.evaluate(PLACES)
    assert elements == (len(flow["nodes"]) if in_html else 0)
    found = {int(number): tuple(box) for number, box in boxes.items()}
    written = boxes_of(flow)
    assert set(found) == set(written)
    scale = (found[1][2] - found[1][0]) / (written[1][2] - written[1][0])
    assert scale == pytest.approx(1.0, abs=0.01) or (in_html and scale == pytest.approx(1.2, 0.01))
    for number, (left, top, right, bottom) in written.items():
        box = scale * left, scale * (top + TITLE) - TITLE, scale * right, scale * bottom
        assert found[number] == pytest.approx(box, abs=2.5), flow["nodes"][number - 1]["type"]
    assert len(wires) == len(flow["links"])
    assert not behind(found, [(one, two, tuple(a), tuple(b)) for one, two, a, b in wires])


@pytest.mark.parametrize("in_html", [False, True], ids=["canvas", "html"])
def test_the_button_lists_the_places_of_the_patch_before_it(page, filled, in_html):
    words = page.evaluate("async () => (await (await fetch('/dmp/places?patch=x')).json()).error")
    assert words.startswith("expected x in ")
    with nodes_in_html(page) if in_html else nullcontext(True) as known:
        if not known:
            pytest.skip("needs a ComfyUI with nodes in HTML")
        opened(page, "dmp-keyframes")
        values = page.evaluate(f"() => {GATE}.serialize().widgets_values")
        for times in (1, 2):
            press_button(page, in_html)
            menu = page.locator(".litecontextmenu")
            menu.get_by_text("all", exact=True).wait_for()
            assert menu.get_by_text("in.*", exact=True).count() == 1
            menu.get_by_text("all", exact=True).click()
            text = page.evaluate(
                f"() => {GATE}.widgets.find((w) => w.name == 'site_strengths').value"
            )
            assert text == "all: 1, in.1-3: 0.5" + ", all: 1" * times
        prompt = page.evaluate("async () => (await app.graphToPrompt()).output")
        (inputs,) = (n["inputs"] for n in prompt.values() if n["class_type"] == "DMP_GateStrength")
        assert inputs["site_strengths"] == text
        assert "add a place" not in inputs
        after = page.evaluate(f"() => {GATE}.serialize().widgets_values")
        assert after == [text if value == "all: 1, in.1-3: 0.5" else value for value in values]


TEXT = "'site_strengths'"
GATE = "app.graph._nodes.find((node) => node.type == 'DMP_GateStrength')"


def press_button(page: Any, in_html: bool) -> None:
    """Presses the button of DMP Gate Strength, as a user does."""
    page.evaluate(FIT)
    if in_html:
        node = page.locator("[data-node-id]", has_text="DMP Gate Strength")
        if node.get_by_text("Show advanced inputs").count():
            node.get_by_text("Show advanced inputs").click()
        node.get_by_text("add a place").click()
        return
    x, y = page.evaluate(
        f"""() => {{
            const node = {GATE}, {{ scale, offset }} = app.canvas.ds;
            const button = node.widgets.at(-1);
            return [
                (node.pos[0] + node.size[0] / 2 + offset[0]) * scale,
                (node.pos[1] + button.y + 10 + offset[1]) * scale,
            ];
        }}"""
    )
    page.mouse.click(x, y)


def test_bypassed_node_is_the_plain_model(page, filled):
    opened(page, "dmp-compare")
    first, second = run(page, filled)
    assert not same([first], [second])
    prompt = opened(page, "dmp-compare", DMP_Apply=BYPASS)
    assert "DMP_Apply" not in {entry["class_type"] for entry in prompt.values()}
    first, second = run(page, filled)
    assert same([first], [second])


def test_template_browser_lists_all_with_pictures(server):
    listed = {
        k: v for k, v in server.get("/workflow_templates").items() if set(WORKFLOWS) <= set(v)
    }
    assert len(listed) == 1
    pack = next(iter(listed))
    for name in WORKFLOWS:
        with urllib.request.urlopen(
            f"{server.url}/api/workflow_templates/{pack}/{name}.jpg"
        ) as file:
            assert file.read(2) == b"\xff\xd8"
