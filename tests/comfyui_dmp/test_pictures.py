"""What saved pictures say of their patches."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import pytest

from dmp_common import Patch
from dmp_common.patch.file import file_hash

pytestmark = [pytest.mark.host, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def pictures(folder) -> ModuleType:
    for name in ("a.v1.safetensors", "deep/b.safetensors"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        Patch.create("dit-s/2", grids=len(name)).save(path)
    return importlib.import_module("comfyui_dmp.pictures")


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def test_pictures_name_patches_hashes_and_strengths(pictures, folder):
    prompt = {
        "1": node("DMP_Load", patch_name="a.v1.safetensors"),
        "2": node("DMP_GateStrength", dmp_patch=["1", 0], strength=0.3),
        "3": node("DMP_GateStrength", dmp_patch=["2", 0], strength=0.7),
        "4": node("DMP_Apply", dmp_patch=["3", 0]),
        "5": node("DMP_CreateHook", dmp_patch=["1", 0]),
        "6": node("DMP_LoadApply", patch_name="deep/b.safetensors", strength=["9", 0]),
        "7": node("DMP_Stack", on_1=True, patch_1="deep/b.safetensors", strength_1=2, on_2=True,
                  patch_2="None", strength_2=1, on_3=False, patch_3="a.v1.safetensors"),
        "8": node("KSampler", seed=1),
    }  # fmt: skip
    a, b = (file_hash(folder / name) for name in ("a.v1.safetensors", "deep/b.safetensors"))
    about = {"workflow": {}, "Hashes": {"model": "0123456789"}}
    queued = {"prompt": prompt, "extra_data": {"extra_pnginfo": about}}
    assert pictures.with_patches(queued) is queued
    assert about["dmp"] == [
        {"name": "a.v1", "hash": a, "strength": 0.7},
        {"name": "a.v1", "hash": a, "strength": 1.0},
        {"name": "deep/b", "hash": b},
        {"name": "deep/b", "hash": b, "strength": 2},
    ]
    assert about["Hashes"] == {"model": "0123456789", "dmp:a.v1": a, "dmp:deep/b": b}


def test_what_is_not_there_is_left_out(pictures):
    prompt = {
        "1": node("DMP_Train"),
        "2": node("DMP_Apply", dmp_patch=["1", 0]),
        "3": node("DMP_Apply", dmp_patch=["3", 0]),
        "4": node("DMP_Apply"),
        "5": node("DMP_LoadApply", patch_name="gone.safetensors", strength=1.0),
        "6": node("DMP_LoadApply", patch_name="../a.v1.safetensors.x", strength=1.0),
        "7": node("DMP_GateStrength", dmp_patch=["7", 0]),
        "8": node("DMP_Apply", dmp_patch=["7", 0]),
    }
    assert pictures.with_patches({"prompt": prompt}) == {"prompt": prompt}
    assert pictures.with_patches({}) == {}


def test_the_server_is_asked_once(pictures, monkeypatch):
    class Instance:
        on_prompt_handlers: list[Any] = []  # noqa: RUF012

        def add_on_prompt_handler(self, handler: Any) -> None:
            self.on_prompt_handlers.append(handler)

    server = ModuleType("server")
    server.PromptServer = type("PromptServer", (), {"instance": Instance()})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "server", server)
    pictures.register()
    pictures.register()
    assert Instance.on_prompt_handlers == [pictures.with_patches]
