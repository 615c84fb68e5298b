"""A patch made in a real server: trained, saved, loaded, interrupted, trained on; `conftest.py`."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from tests.comfyui_dmp.graphs import Graph
from tests.comfyui_dmp.server import Server, message_of

pytestmark = [pytest.mark.host, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

TRAINING = {
    "objective": "repair",
    "cfg": 3.0,
    "all_scales": False,
    "width": 96,
    "height": 64,
    "pictures": 16,
    "steps": 120,
    "seed": 7,
    "learning_rate": 0.0,
    "batch_size": 4,
    "sampler_name": "euler",
    "scheduler": "simple",
    "sampling_steps": 6,
}
SEEDS = range(1000, 1008)  # none of them is used in training


def training(server: Server, **changes: Any) -> tuple[Graph, list[Any]]:
    """A workflow that trains SD3 with two blocks in fp8; and the cheap model."""
    if server.pid is None:
        pytest.skip("needs a server that the tests start: set COMFYUI_PATH only")
    file = server.checkpoint_of("sd3", "diffusion_models")
    size = (TRAINING["width"], TRAINING["height"])
    graph = Graph.of_transformer(file, channels=16, pooled=2048, size=size, cfg=3.0, steps=6)
    few = graph.add("few", "UNETLoader", unet_name=file, weight_dtype="fp8_e4m3fn")
    patch = graph.add(
        "train",
        "DMP_Train",
        model=few,
        positive=["positive", 0],
        negative=["negative", 0],
        teacher_model=graph.plain,
        **{**TRAINING, **changes},
    )
    graph.add("loss", "PreviewImage", images=["train", 1])
    graph.add("save", "DMP_Save", dmp_patch=patch, filename_prefix="trained/sd3-fp8")
    return graph, few


def saved(entry: dict[str, Any]) -> str:
    """The name of the patch that a workflow saved."""
    assert entry["status"]["status_str"] == "success", message_of(entry)
    return str(entry["outputs"]["save"]["text"][0]).removeprefix("saved as ")


def shares(server: Server, graph: Graph, few: list[Any], *names: str) -> list[float]:
    """How far patched models draw from the full one, over the distance without a patch."""
    graph.nodes = {key: graph.nodes[key] for key in (*_MODELS, few[0])}
    for seed in SEEDS:
        graph.picture(f"full {seed}", graph.plain, seed=seed)
        graph.picture(f"cheap {seed}", few, seed=seed)
        for name in names:
            graph.picture(f"{name} {seed}", graph.patched(few, name), seed=seed)
    pictures = server.run(graph.nodes)

    def distance(name: str) -> float:
        pairs = ((pictures[f"{name} {s}"][0], pictures[f"full {s}"][0]) for s in SEEDS)
        return float(np.mean([np.square(one - two).mean() for one, two in pairs]))

    return [distance(name) / distance("cheap") for name in names]


_MODELS = ("model", "latent", "positive", "negative")


def test_a_repair_is_trained_interrupted_and_trained_on(server):
    """The latents of pictures from fresh noise, beside those of the full model."""
    process = pytest.importorskip("psutil").Process(server.pid)
    graph, few = training(server)
    began = process.cpu_times().user  # other processes may slow the clock
    whole = saved(server.wait(server.start(graph.nodes)))
    took = process.cpu_times().user - began

    graph, few = training(server, steps=400)
    prompt = server.start(graph.nodes)
    wait_for(server, prompt, "DMP: step 40 of 400")
    server.post("/interrupt", {})
    stopped = saved(server.wait(prompt))

    graph, few = training(server, steps=60)
    graph.nodes["train"]["inputs"]["dmp_patch"] = graph.load(stopped)
    further = saved(server.wait(server.start(graph.nodes)))

    left = shares(server, graph, few, whole, stopped, further)
    assert left[0] < 0.7, left
    assert left[1] < 1.0, left
    assert left[2] < left[1], left
    assert took < 60


def wait_for(server: Server, prompt: str, text: str) -> None:
    """Waits until the server's log has a text, while a workflow runs."""
    log = server.models.parent / "server.log"
    while text not in log.read_text("utf-8", "replace"):
        assert prompt not in server.get("/history")
        time.sleep(0.1)
