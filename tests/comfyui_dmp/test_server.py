"""The nodes in a real server, on SD 1.5; see `conftest.py` for how it is found."""

from __future__ import annotations

import json
import os
import time

import numpy as np
import pytest

from dmp_common.patch.file import file_hash
from tests.comfyui_dmp.graphs import Graph
from tests.comfyui_dmp.server import ZERO, A, message_of, same

pytestmark = [pytest.mark.host, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


B = os.path.join("deep", "test-b.safetensors")


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
    graph.picture("zero", graph.patched(graph.plain, ZERO))
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


def test_a_saved_picture_names_its_patches(server, branches):
    """As readers find it: text entries of the PNG file, the hash as in the names of LoRAs."""
    graph = Graph(server.checkpoint, (64, 96))
    patch = graph.strength(graph.load(A), strength=0.5)
    graph.picture("said", graph.add("apply", "DMP_Apply", model=graph.plain, dmp_patch=patch))
    entry = server.wait(server.start(graph.nodes))
    (image,) = entry["outputs"]["said"]["images"]
    text = server.texts(image)
    digest, name = file_hash(server.models / "dmp" / A), A.removesuffix(".safetensors")
    assert json.loads(text["dmp"]) == [{"name": name, "hash": digest, "strength": 0.5}]
    assert json.loads(text["Hashes"]) == {f"dmp:{name}": digest}


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
    graph.picture("zero", graph.patched(graph.plain, ZERO))
    graph.picture("a", graph.patched(graph.plain, A))
    pictures = server.run(graph.nodes)
    assert same(pictures["zero"], pictures["plain"])
    assert not same(pictures["a"], pictures["plain"])


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("test-cut.safetensors", "test-cut.safetensors: expected .* found "),
        ("test-text.safetensors", "test-text.safetensors: expected .* found "),
        (
            "test-sdxl.safetensors",
            "test-sdxl.safetensors: expected a model of the patch's base sdxl, found one",
        ),
        (
            "test-prepend.safetensors",
            "expected a model of the patch's base dit-b/2, found one of base sd15",
        ),
        ("test-v.safetensors", "prediction type v_prediction, found epsilon"),
    ],
)
def test_errors_have_one_message_and_the_server_survives(server, branches, file, message):
    graph = Graph(server.checkpoint, (64, 96))
    graph.picture("bad", graph.patched(graph.plain, file))
    with pytest.raises(RuntimeError, match=message):
        server.run(graph.nodes)


def test_missing_file_is_named_before_anything_runs(server):
    graph = Graph(server.checkpoint, (64, 96))
    graph.picture("gone", graph.patched(graph.plain, "test-gone.safetensors"))
    (server.models / "dmp" / "test-gone.safetensors").unlink()
    with pytest.raises(ValueError, match="test-gone.safetensors"):
        server.run(graph.nodes)


def test_plain_pictures_stay_between_patched_ones(server, branches):
    """With the models still loaded, but no result remembered."""
    order = (("plain", None), ("a", A), ("plain", None), ("b", B), ("a", A), ("plain", None))
    latent = ["latent", 0]
    for turn, (name, file) in enumerate(order):
        graph = Graph(server.checkpoint, (64, 96))
        for number in range(turn + 1):  # copies of the empty latent: equal, and new to the cache
            latent = graph.add(f"copy {number}", "RepeatLatentBatch", samples=latent, amount=1)
        model = graph.plain if file is None else graph.patched(graph.plain, file)
        graph.picture(name, model, latent_image=latent)
        assert same(server.run(graph.nodes)[name], branches[name])
        latent = ["latent", 0]


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


@pytest.mark.parametrize(("file", "parameters"), [(A, "2,785,792"), (B, "5,411,848")])
def test_heat_map_and_info(server, file, parameters):
    graph = Graph(server.checkpoint)
    inputs = {"scheduler": "karras", "steps": 12, "sites": "first, last", "scale": "shared"}
    image = graph.add(
        "heatmap", "DMP_GateHeatmap", dmp_patch=graph.load(file), model=graph.plain, **inputs
    )
    graph.add("picture", "PreviewImage", images=image)
    graph.add("info", "DMP_PatchInfo", dmp_patch=graph.load(file))
    prompt = server.start(graph.nodes)
    entry = server.wait(prompt)
    assert entry["status"]["status_str"] == "success"
    assert parameters in entry["outputs"]["info"]["text"][0]
    assert server.picture(entry["outputs"]["picture"]["images"][0]).std() > 10


def test_hires_fix(server):
    graph = Graph(server.checkpoint, (64, 64), steps=1)
    for name, model in (
        ("plain", graph.plain),
        ("zero", graph.patched(graph.plain, ZERO)),
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
