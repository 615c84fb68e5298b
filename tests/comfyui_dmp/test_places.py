"""What ComfyUI's page is told about the places at which a patch acts."""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from dmp_common import Patch

pytestmark = [pytest.mark.host, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def places(folder) -> ModuleType:
    (folder / "deep").mkdir()
    Patch.create("dit-s/2").save(folder / "deep" / "a.safetensors")
    (folder / "text.safetensors").write_text("not a patch")
    return importlib.import_module("comfyui_dmp.places")


def test_places_of_a_file(places):
    listed = places.answer_about("deep/a.safetensors")["places"]
    assert listed[:3] == ["all", "block.*", "block.0"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.safetensors", "expected gone.safetensors in "),
        ("../../gone.safetensors", "expected ../../gone.safetensors in "),
        ("", "expected "),
        ("text.safetensors", "text.safetensors: expected "),
    ],
)
def test_other_files_are_refused_with_a_message(places, name, message):
    answer = places.answer_about(name)
    assert set(answer) == {"error"}
    assert message in answer["error"]


def test_the_route_is_added_once(places, monkeypatch):
    web = pytest.importorskip("aiohttp.web", reason="needs aiohttp")
    instance = SimpleNamespace(routes=web.RouteTableDef())
    server = ModuleType("server")
    server.PromptServer = SimpleNamespace(instance=instance)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "server", server)
    places.register()
    places.register()
    (route,) = instance.routes
    assert (route.method, route.path) == ("GET", "/dmp/places")

    def asked(name: str) -> Any:
        return asyncio.run(route.handler(SimpleNamespace(query={"patch": name})))

    assert asked("gone.safetensors").status == 404
    answer = asked("deep/a.safetensors")
    assert answer.status == 200
    assert json.loads(answer.text)["places"][0] == "all"
    monkeypatch.setitem(sys.modules, "server", ModuleType("server"))
    places.register()  # A server that is not running is no error.
