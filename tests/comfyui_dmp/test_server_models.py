"""Every family in a real server: full-size UNets, transformers with fewer blocks; `conftest.py`."""

from __future__ import annotations

from typing import Any

import pytest

from dmp_common import Base, Patch, bases, register_base
from tests.comfyui_dmp.graphs import Graph
from tests.comfyui_dmp.server import Server, same, save_random

pytestmark = [pytest.mark.host, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

# The same bases as in `pack/`, which the server loads.
TRANSFORMERS: dict[str, Base] = {
    base.name: register_base(base)
    for base in (
        bases.sd3("test-sd3", depth=2, width=128, dual=False, hub_id=None),
        bases.flux("test-flux", double=1, single=2, width=3072, hub_id=None),
        bases.pixart("test-pixart", depth=2, width=1152, hub_id=None),
    )
}
POOLED = {"test-sd3": 2048, "test-flux": 768, "test-pixart": 1}


def branches(server: Server, graph: Graph, base: str | Base, **variant: Any) -> None:
    """Zero patch, strength 0 and the branches of one workflow, then the plain one again."""
    name = base if isinstance(base, str) else base.name
    first, second, zero = (f"{name.replace('/', '-')}-{n}.safetensors" for n in ("a", "b", "zero"))
    folder = server.models / "dmp"
    save_random(folder / first, Patch.create(base, **variant), 1)
    save_random(folder / second, Patch.create(base, **variant), 2)
    Patch.create(base, **variant).save(folder / zero)
    graph.picture("plain", graph.plain)
    graph.picture("a", graph.patched(graph.plain, first))
    graph.picture("b", graph.patched(graph.plain, second))
    graph.picture("zero", graph.patched(graph.plain, zero))
    off = graph.strength(graph.load(first), strength=0.0)
    graph.picture("off", graph.add("off apply", "DMP_Apply", model=graph.plain, dmp_patch=off))
    pictures = server.run(graph.nodes)
    assert same(pictures["zero"], pictures["plain"])
    assert same(pictures["off"], pictures["plain"])
    assert not same(pictures["a"], pictures["plain"])
    assert not same(pictures["a"], pictures["b"])
    # The same again in another order, for the models are still loaded and the results are not.
    again = graph.add("again", "RepeatLatentBatch", samples=["latent", 0], amount=1)
    for branch, model in (("a", graph.patched(graph.plain, first)), ("plain", graph.plain)):
        graph.nodes = {k: v for k, v in graph.nodes.items() if v["class_type"] not in _OUTPUTS}
        graph.picture(branch, model, latent_image=again)
        assert same(server.run(graph.nodes)[branch], pictures[branch])


_OUTPUTS = ("SaveImage", "SaveLatent")


def test_sd21(server):
    graph = Graph(server.checkpoint_of("sd21", "checkpoints"), (64, 96))
    branches(server, graph, "sd21", prediction="v_prediction")
    epsilon = Patch.create("sd21", prediction="epsilon")
    epsilon.save(server.models / "dmp" / "sd21-epsilon.safetensors")
    graph.picture("wrong", graph.patched(graph.plain, "sd21-epsilon.safetensors"))
    with pytest.raises(RuntimeError, match="prediction type epsilon, found v_prediction"):
        server.run(graph.nodes)


def test_sdxl(server):
    branches(server, Graph(server.checkpoint_of("sdxl", "checkpoints"), (64, 96)), "sdxl")
    server.free()


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("dtype", ["default", "fp8_e4m3fn"])
def test_transformers(server, name, dtype):
    file = server.checkpoint_of(name.removeprefix("test-"), "diffusion_models")
    channels = 4 if name == "test-pixart" else 16
    size = (384, 448) if channels == 4 else (64, 96)  # ComfyUI's PixArt divides by zero below
    graph = Graph.of_transformer(
        file, channels=channels, pooled=POOLED[name], dtype=dtype, size=size
    )
    branches(server, graph, TRANSFORMERS[name])


@pytest.mark.parametrize("name", ["test-sd3", "test-flux"])
def test_compiled(server, name):
    """Branches of a compiled model, whose compile node stands before ours or after it."""
    file = server.checkpoint_of(name.removeprefix("test-"), "diffusion_models")
    patch = f"{name}-compiled.safetensors"
    save_random(server.models / "dmp" / patch, Patch.create(TRANSFORMERS[name]), 3)
    graph = Graph.of_transformer(file, channels=16, pooled=POOLED[name])
    compiled = graph.add("compile", "TorchCompileModel", model=graph.plain, backend="inductor")
    patched = graph.patched(graph.plain, patch)
    after = graph.add("compile after", "TorchCompileModel", model=patched, backend="inductor")
    graph.picture("eager", graph.plain)
    graph.picture("eager patched", patched)
    graph.picture("plain", compiled)
    graph.picture("before", graph.patched(compiled, patch))
    graph.picture("after", after)
    found = {name: latents[0] for name, latents in server.run(graph.nodes).items()}
    scale = abs(found["eager"]).max()
    assert abs(found["plain"] - found["eager"]).max() < 1e-3 * scale
    for name in ("before", "after"):
        assert abs(found[name] - found["eager patched"]).max() < 1e-3 * scale
    assert abs(found["eager patched"] - found["eager"]).max() > 1e-2 * scale


def test_memory_stays_over_200_generations(server):
    """With two patches in turns; a fifth of the generations fills the host's own caches."""
    psutil = pytest.importorskip("psutil", reason="needs psutil to look at the server's memory")
    graph = Graph.of_transformer(
        server.checkpoint_of("sd3", "diffusion_models"), channels=16, pooled=2048
    )
    files = [f"test-sd3-memory-{n}.safetensors" for n in range(2)]
    for seed, file in enumerate(files):
        patch = Patch.create(TRANSFORMERS["test-sd3"])
        save_random(server.models / "dmp" / file, patch, seed)
    process, resident = psutil.Process(server.pid), []
    for turn in range(200):
        graph.nodes = {k: v for k, v in graph.nodes.items() if v["class_type"] not in _OUTPUTS}
        graph.picture("picture", graph.patched(graph.plain, files[turn % 2]), seed=turn)
        server.run(graph.nodes)
        resident.append(process.memory_info().rss / 1024**2)
    growth = resident[-1] - resident[40]
    assert growth < 50, f"{resident[40]:.0f} MB after 40 generations, {resident[-1]:.0f} after 200"


def test_dit_of_extramodels(server):
    if "DitCheckpointLoader" not in server.get("/object_info"):
        pytest.skip("needs ComfyUI_ExtraModels: set COMFYUI_EXTRAMODELS_PATH to its folder")
    graph = Graph(server.checkpoint, (256, 256))
    file = server.checkpoint_of("dit", "checkpoints")
    inputs = {"ckpt_name": file, "model": "S/2", "image_size": 256}
    graph.plain = graph.add("dit", "DitCheckpointLoader", **inputs)
    graph.sampling |= {
        "positive": graph.add("empty", "DiTCondLabelEmpty", model=graph.plain),
        "negative": graph.add("none", "DiTCondLabelEmpty", model=graph.plain),
    }
    branches(server, graph, "dit-s/2")
