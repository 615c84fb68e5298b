"""Patches beside ComfyUI's other features in a real server, on SD 1.5; see `conftest.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch

from tests.comfyui_dmp.graphs import Graph
from tests.comfyui_dmp.server import ZERO, A, Server, same

pytestmark = [pytest.mark.host, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def three_ways(server: Server, graph: Graph, around: Callable[[list[Any]], list[Any]]) -> None:
    """A zero patch changes nothing and another one something, under a node around the model."""
    graph.picture("alone", around(graph.plain))
    graph.picture("zero", around(graph.patched(graph.plain, ZERO)))
    graph.picture("a", around(graph.patched(graph.plain, A)))
    pictures = server.run(graph.nodes)
    assert same(pictures["zero"], pictures["alone"])
    assert not same(pictures["a"], pictures["alone"])


def as_it_is(model: list[Any]) -> list[Any]:
    return model


def test_captions_of_unequal_length(server):
    graph = Graph(server.checkpoint)
    graph.text("positive", "a cat in the garden, " * 30)  # three windows of 77 tokens beside one
    three_ways(server, graph, as_it_is)


def test_area_conditioning(server):
    graph = Graph(server.checkpoint, (128, 64))
    area = {"width": 64, "height": 64, "x": 64, "y": 0, "strength": 1.0}
    there = graph.add(
        "area", "ConditioningSetArea", conditioning=graph.text("dog", "a dog"), **area
    )
    both = graph.add(
        "both", "ConditioningCombine", conditioning_1=["positive", 0], conditioning_2=there
    )
    graph.sampling["positive"] = both
    three_ways(server, graph, as_it_is)


def test_controlnet(server):
    graph = Graph(server.checkpoint)
    name = server.checkpoint_of("controlnet", "controlnet")
    grey = graph.add("hint", "EmptyImage", width=64, height=64, batch_size=1, color=0x808080)
    control = graph.add("control", "ControlNetLoader", control_net_name=name)
    inputs = {"control_net": control, "image": grey, "strength": 0.5}
    inputs |= {"start_percent": 0.0, "end_percent": 1.0}
    graph.picture("without", graph.plain)
    captions = {"positive": ["positive", 0], "negative": ["negative", 0]}
    graph.add("controlled", "ControlNetApplyAdvanced", **captions, **inputs)
    graph.sampling |= {"positive": ["controlled", 0], "negative": ["controlled", 1]}
    graph.picture("with", graph.plain)
    without = server.run(graph.nodes)
    assert not same(without["with"], without["without"])
    three_ways(server, graph, as_it_is)


def test_tiled_sampling(server):
    """Overlapping windows over the width, each a call of the model with its own crop."""
    graph = Graph(server.checkpoint, (160, 64))
    windows = {"context_length": 8, "context_overlap": 4, "context_schedule": "standard_static"}
    windows |= {"context_stride": 1, "closed_loop": False, "fuse_method": "pyramid"}
    windows |= {"dim": 3, "freenoise": False}
    node = "ContextWindowsManual"
    known = server.get(f"/object_info/{node}")[node]["input"]["required"]
    # Later versions of ComfyUI have more inputs.
    windows = {
        n: facts["default"] for n, (_, facts) in known.items() if "default" in facts
    } | windows

    def around(model: list[Any]) -> list[Any]:
        name = f"windows {model[0]}"
        return graph.add(name, node, model=model, **windows)

    three_ways(server, graph, around)


def test_tiled_decoding(server):
    graph = Graph(server.checkpoint, (128, 128))
    graph.picture("whole", graph.patched(graph.plain, A))
    graph.picture("tiled", graph.patched(graph.plain, A))
    graph.nodes["tiled vae"]["class_type"] = "VAEDecodeTiled"
    graph.nodes["tiled vae"]["inputs"] |= {"tile_size": 64, "overlap": 16}
    graph.nodes["tiled vae"]["inputs"] |= {"temporal_size": 64, "temporal_overlap": 8}
    pictures = server.run(graph.nodes)
    assert pictures["whole"][0].shape == pictures["tiled"][0].shape


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
