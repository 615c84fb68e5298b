"""Patches on an SD 1.5 in Q4_0, loaded by ComfyUI-GGUF in a real server; see `conftest.py`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from tests.comfyui_dmp.graphs import Graph
from tests.comfyui_dmp.server import Server, linked, made
from tests.comfyui_dmp.test_server_models import branches

pytestmark = [pytest.mark.host, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

PREFIX = "model.diffusion_model."


def quantised(kind: str) -> Path:
    """The UNet of the checkpoint with random weights in a type of GGUF; made once."""
    tinyggufs = pytest.importorskip("tests.training.tinyggufs", reason="needs gguf")
    whole = made("sd15")
    path = whole.with_name(f"{whole.stem}-{kind}.gguf")
    if not path.is_file():
        with safe_open(whole, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(PREFIX)]  # noqa: SIM118
            tensors = {name.removeprefix(PREFIX): file.get_tensor(name) for name in names}
        tinyggufs.write_gguf(path, tensors, kind)
    return path


@pytest.mark.parametrize("variant", [{}, {"mix": "modulate"}], ids=["add", "modulate"])
def test_q4_0(server: Server, variant: dict[str, Any]) -> None:
    """Zero patch and strength 0 are the quantised model bit for bit, and other patches differ."""
    if "COMFYUI_GGUF_PATH" not in os.environ or server.pid is None:
        pytest.skip("needs ComfyUI-GGUF: set COMFYUI_GGUF_PATH to its folder")
    graph = Graph(server.checkpoint)
    file = linked(quantised("Q4_0"), server.models / "unet")
    graph.plain = graph.add("unet", "UnetLoaderGGUF", unet_name=file)
    branches(server, graph, "sd15", **variant)
