"""The nodes in a real server: COMFYUI_URL's, or one started from COMFYUI_PATH.

COMFYUI_PATH=...   ComfyUI's folder; with COMFYUI_CHECKPOINT, an SD 1.5 file, else one with
                   random weights is made (two gigabytes, kept in the temporary folder).
COMFYUI_ARGS=...   of the server, "--cpu" unless set.
COMFYUI_URL=...    a running server; with COMFYUI_MODELS, its models folder, and
                   COMFYUI_CHECKPOINT, the name of an SD 1.5 checkpoint it has.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from dmp_common import Patch
from tests.comfyui_dmp.graphs import Graph
from tests.comfyui_dmp.server import Server, message_of, started

pytestmark = [pytest.mark.host, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def save_random(path: Path, seed: int, **variant: object) -> None:
    patch = Patch.create("sd15", **variant)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in patch.named_parameters():
            scale = 0.5 * 256 if name.startswith("pools") else 0.5
            parameter.normal_(0.0, scale, generator=generator)
    patch.save(path)


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("comfyui")
    if url := os.environ.get("COMFYUI_URL"):
        try:
            models, name = Path(os.environ["COMFYUI_MODELS"]), os.environ["COMFYUI_CHECKPOINT"]
        except KeyError as error:
            pytest.skip(f"needs {error} besides COMFYUI_URL")
        fill(models / "dmp")
        yield Server(url, models, name)
        return
    comfyui = Path(os.environ.get("COMFYUI_PATH", ""))
    if not (comfyui / "main.py").is_file():
        pytest.skip("needs a server: set COMFYUI_URL, or COMFYUI_PATH to ComfyUI's folder")
    checkpoint = Path(
        os.environ.get("COMFYUI_CHECKPOINT")
        or Path(tempfile.gettempdir()) / "dmp-sd15-random.safetensors"
    )
    if not checkpoint.is_file():
        maker = Path(__file__).parent / "checkpoints.py"
        subprocess.run([sys.executable, str(maker), str(checkpoint)], check=True)
    with started(comfyui, folder, checkpoint) as running:
        fill(running.models / "dmp")
        yield running


def fill(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_random(folder / "test-a.safetensors", 1)
    save_random(folder / "deep" / "test-b.safetensors", 2, sites="all")
    Patch.create("sd15").save(folder / "test-zero.safetensors")
    Patch.create("sdxl").save(folder / "test-sdxl.safetensors")
    Patch.create("sd15", prediction="v_prediction").save(folder / "test-v.safetensors")
    good = (folder / "test-a.safetensors").read_bytes()
    (folder / "test-cut.safetensors").write_bytes(good[:-1000])
    (folder / "test-text.safetensors").write_text("not a patch")


A, B = "test-a.safetensors", os.path.join("deep", "test-b.safetensors")


def same(one: list[np.ndarray], two: list[np.ndarray]) -> bool:
    return len(one) == len(two) and all(map(np.array_equal, one, two))


def test_nodes_and_help_are_there(server):
    for name in ("Load", "Apply", "GateStrength", "LoadApply", "GateHeatmap", "PatchInfo"):
        assert server.get(f"/object_info/DMP_{name}")
    assert "DMP_Apply" in server.get("/i18n")["zh"]["nodeDefs"]


@pytest.fixture(scope="module")
def branches(server) -> dict[str, list[np.ndarray]]:
    """Pictures of many branches of one workflow."""
    graph = Graph(server.checkpoint, (64, 96))
    graph.picture("plain", graph.plain)
    graph.picture("a", graph.patched(graph.plain, A))
    graph.picture("zero", graph.patched(graph.plain, "test-zero.safetensors"))
    off = graph.strength(graph.load(A), strength=0.0)
    graph.picture("off", graph.add("off apply", "DMP_Apply", model=graph.plain, dmp_patch=off))
    graph.picture("b", graph.patched(graph.plain, B))
    graph.picture("ab", graph.patched(graph.patched(graph.plain, A), B, "then b"))
    inputs = {"model": graph.plain, "patch_name": A, "strength": 1.0}
    graph.picture("both", graph.add("load and apply", "DMP_LoadApply", **inputs))
    return server.run(graph.nodes)


def test_zero_patch_and_strength_zero_are_pixel_identical(branches):
    assert same(branches["zero"], branches["plain"])
    assert same(branches["off"], branches["plain"])


def test_branches_differ(branches):
    names = ("plain", "a", "b", "ab")
    pairs = [(one, two) for one in names for two in names if one < two]
    assert not [pair for pair in pairs if same(branches[pair[0]], branches[pair[1]])]
    assert same(branches["both"], branches["a"])


def test_plain_and_patched_pictures_stay_after_unloading(server, branches):
    for name, file in (("plain", None), ("a", A), ("plain", None)):
        server.free()  # also forgets the results, or they would come from there
        graph = Graph(server.checkpoint, (64, 96))
        graph.picture(name, graph.plain if file is None else graph.patched(graph.plain, file))
        assert same(server.run(graph.nodes)[name], branches[name])


@pytest.mark.parametrize(
    "options", [{"batch": 2}, {"cfg": 1.0}, {"size": (128, 64)}, {"steps": 3}], ids=str
)
def test_samplings(server, options):
    graph = Graph(server.checkpoint, **options)
    graph.picture("plain", graph.plain)
    graph.picture("zero", graph.patched(graph.plain, "test-zero.safetensors"))
    graph.picture("a", graph.patched(graph.plain, A))
    pictures = server.run(graph.nodes)
    assert same(pictures["zero"], pictures["plain"])
    assert not same(pictures["a"], pictures["plain"])


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("test-cut.safetensors", "test-cut.safetensors: expected .* found "),
        ("test-text.safetensors", "test-text.safetensors: expected .* found "),
        ("test-sdxl.safetensors", "test-sdxl.safetensors: expected a model of base sdxl, found"),
        ("test-v.safetensors", "prediction type v_prediction, found epsilon"),
    ],
)
def test_errors_have_one_message_and_the_server_survives(server, branches, file, message):
    graph = Graph(server.checkpoint, (64, 96))
    graph.picture("bad", graph.patched(graph.plain, file))
    with pytest.raises(RuntimeError, match=message):
        server.run(graph.nodes)


def test_good_run_after_errors_and_an_interrupt(server, branches):
    graph = Graph(server.checkpoint, (64, 96), steps=50)
    graph.picture("long", graph.patched(graph.plain, A))
    prompt = server.start(graph.nodes)
    time.sleep(8)
    server.post("/interrupt", {})
    assert message_of(server.wait(prompt)) == "interrupted"
    graph = Graph(server.checkpoint, (64, 96))
    graph.picture("a", graph.patched(graph.plain, A))
    graph.picture("plain", graph.plain)
    pictures = server.run(graph.nodes)
    assert same(pictures["a"], branches["a"])
    assert same(pictures["plain"], branches["plain"])


def test_heat_map_and_info(server):
    graph = Graph(server.checkpoint)
    inputs = {"scheduler": "karras", "steps": 12, "sites": "first, last", "scale": "shared"}
    image = graph.add(
        "heatmap", "DMP_GateHeatmap", dmp_patch=graph.load(A), model=graph.plain, **inputs
    )
    graph.add("picture", "PreviewImage", images=image)
    graph.add("info", "DMP_PatchInfo", dmp_patch=graph.load(A))
    prompt = server.start(graph.nodes)
    entry = server.wait(prompt)
    assert entry["status"]["status_str"] == "success"
    assert "2,785,792" in entry["outputs"]["info"]["text"][0]
    assert server.picture(entry["outputs"]["picture"]["images"][0]).std() > 10


def test_beside_other_nodes_in_either_order(server):
    """LoRA, FreeU and deep shrink."""
    width, rank = 320, 4
    block = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    generator = torch.Generator().manual_seed(0)
    lora = {
        f"{block}.lora_up.weight": torch.randn(width, rank, generator=generator),
        f"{block}.lora_down.weight": torch.randn(rank, width, generator=generator),
    }
    (server.models / "loras").mkdir(exist_ok=True)
    safetensors.torch.save_file(lora, server.models / "loras" / "test.safetensors")
    shrink = {
        "block_number": 3,
        "downscale_factor": 2.0,
        "start_percent": 0.0,
        "end_percent": 1.0,
        "downscale_after_skip": True,
        "downscale_method": "bicubic",
        "upscale_method": "bicubic",
    }
    others = {
        "LoraLoaderModelOnly": {"lora_name": "test.safetensors", "strength_model": 1.0},
        "FreeU_V2": {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2},
        "PatchModelAddDownscale": shrink,
    }
    # FreeU_V2 makes NaN of maps of one pixel, as 64 pixels would give.
    graph = Graph(server.checkpoint, (128, 128), steps=1)
    for kind, inputs in others.items():
        other = graph.add(f"{kind} first", kind, model=graph.plain, **inputs)
        graph.picture(f"{kind} alone", other)
        graph.picture(f"{kind} before", graph.patched(other, A))
        patched = graph.patched(graph.plain, A)
        graph.picture(f"{kind} after", graph.add(f"{kind} last", kind, model=patched, **inputs))
    pictures = server.run(graph.nodes)
    for kind in others:
        assert same(pictures[f"{kind} before"], pictures[f"{kind} after"])
        assert not same(pictures[f"{kind} before"], pictures[f"{kind} alone"])


def test_hires_fix(server):
    graph = Graph(server.checkpoint, (64, 64), steps=1)
    for name, model in (
        ("plain", graph.plain),
        ("zero", graph.patched(graph.plain, "test-zero.safetensors")),
        ("a", graph.patched(graph.plain, A)),
    ):
        graph.picture(f"{name} low", model)
        upscale = {"upscale_method": "bilinear", "width": 96, "height": 128, "crop": "disabled"}
        low = [f"{name} low sampler", 0]
        large = graph.add(f"{name} large", "LatentUpscale", samples=low, **upscale)
        graph.picture(name, model, latent_image=large, denoise=0.6)
    pictures = server.run(graph.nodes)
    assert pictures["a"][0].shape == (128, 96, 3)
    assert same(pictures["zero"], pictures["plain"])
    assert not same(pictures["a"], pictures["plain"])
