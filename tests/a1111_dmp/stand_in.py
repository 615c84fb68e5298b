"""Stands in for A1111 and gradio: as much of them as our files use, and nothing behind it."""

from __future__ import annotations

import importlib
import json
import re
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

# What imports the host, each after those of them that it imports.
OURS = ("options", "host", "axes", "tags", "listing", "cards", "controls", "script")


class Component:
    """A gradio component; also a context, as its rows and accordions are."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.args, self.options = args, options
        self.value = options.get("value", args[0] if args else None)
        self.label, self.elem_id = options.get("label"), options.get("elem_id")
        self.clicked: Callable[..., Any] | None = None

    def __enter__(self) -> Component:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def get_config(self) -> dict[str, Any]:
        """What the browser is told."""
        return {**self.options, "value": self.value}

    def preprocess(self, value: Any) -> Any:
        return value

    def postprocess(self, value: Any) -> Any:
        return value

    def render(self) -> None:
        """Puts the component where it is called."""

    def click(self, fn: Callable[..., Any], inputs: Any, outputs: Any) -> None:
        self.clicked, self.inputs = fn, inputs


class ToastError(Exception):
    """gradio's `Error`."""


class Script:
    """The host's `Script`."""

    is_img2img = False

    def elem_id(self, item: str) -> str:
        return f"script_{self.title()}_{item}"


class Axis:
    """The plot's `AxisOption`."""

    def __init__(self, label: str, kind: type, apply: Any, confirm: Any, choices: Any = None):
        self.label, self.type, self.apply = label, kind, apply
        self.confirm, self.choices = confirm, choices


class Processing:
    """The host's `p`: a generation."""

    def __init__(self, **attributes: Any) -> None:
        self.extra_generation_params: dict[str, Any] = {}
        self.comments: dict[str, int] = {}
        self.sampled: list[object] = []
        vars(self).update(attributes)

    def comment(self, text: str) -> None:
        self.comments[text] = 1

    def sample(self, *args: Any, **kwargs: Any) -> str:
        self.sampled.append(self)
        self.during(self)
        return "samples"

    def during(self, p: Processing) -> None:
        """What the sampler does; tests exchange it."""


@dataclass
class Processed:
    """The host's: what a generation gave."""

    p: Processing
    images: list[Any]
    seed: int
    info: str


class Network:
    """The host's `ExtraNetwork`."""

    def __init__(self, name: str) -> None:
        self.name = name


@dataclass
class Params:
    """The host's `ExtraNetworkParams`."""

    items: list[str]


def parse_prompt(prompt: str) -> tuple[str, dict[str, list[Params]]]:
    """The host's: a prompt without its tags, and the tags by kind."""
    found: dict[str, list[Params]] = {}
    for kind, items in re.findall(r"<(\w+):([^>]+)>", prompt):
        found.setdefault(kind, []).append(Params(items.split(":")))
    return re.sub(r"<\w+:[^>]+>", "", prompt), found


def user_metadata(filename: str) -> Any:
    """The host's: what the user has written into the JSON file beside a network."""
    path = Path(filename).with_suffix(".json")
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


class OptionInfo:
    """The host's: one of its settings."""

    def __init__(self, default: Any, label: str, *component: Any, section: tuple[str, str]) -> None:
        self.default, self.label, self.section = default, label, section

    def info(self, text: str) -> OptionInfo:
        return self


class Options(SimpleNamespace):
    """The host's `opts`."""

    samples_format = "png"

    def add_option(self, name: str, info: OptionInfo) -> None:
        setattr(self, name, info.default)


class Page:
    """The host's `ExtraNetworksPage`."""

    def __init__(self, title: str) -> None:
        self.title = title

    def find_preview(self, stem: str) -> str | None:
        return f"{stem}.png" if Path(f"{stem}.png").is_file() else None

    def find_description(self, stem: str) -> None:
        return None

    def search_terms_from_path(self, path: str) -> str:
        return path

    def get_sort_keys(self, path: str) -> dict[str, str]:
        return {"path": path}


def install(monkeypatch: pytest.MonkeyPatch, models: Path) -> SimpleNamespace:
    """Puts the stand-ins in place and imports our files afresh; they are its attributes.

    Args:
        models: the host's folder of models.
    """
    called: dict[str, list[Any]] = {}
    callbacks = {
        name: called.setdefault(name, []).append
        for name in (
            "on_cfg_denoiser",
            "on_script_unloaded",
            "on_before_ui",
            "on_infotext_pasted",
            "on_app_started",
            "on_ui_settings",
        )
    }
    pages: list[Any] = []
    networks: list[Any] = []
    parts: dict[str, dict[str, Any]] = {
        "paths": {"models_path": str(models)},
        "script_callbacks": callbacks,
        "sd_models": {"model_data": SimpleNamespace(sd_model=None)},
        "sd_unet": {"current_unet": None},
        "shared": {
            "cmd_opts": SimpleNamespace(),
            "sd_model": None,
            "state": SimpleNamespace(interrupted=False, skipped=False),
            "opts": Options(),
            "OptionInfo": OptionInfo,
        },
        "scripts": {"Script": Script, "AlwaysVisible": object(), "scripts_data": []},
        "processing": {"process_images": lambda p: p.sample(), "Processed": Processed},
        "ui_common": {"create_refresh_button": lambda *args: None},
        "ui_components": {"InputAccordion": Component},
        "extra_networks": {
            "ExtraNetwork": Network,
            "register_extra_network": networks.append,
            "parse_prompt": parse_prompt,
            "get_user_metadata": user_metadata,
        },
        "ui_extra_networks": {
            "ExtraNetworksPage": Page,
            "register_page": pages.append,
            "quote_js": lambda text: f'"{text}"',
        },
    }
    root = types.ModuleType("modules")
    monkeypatch.setitem(sys.modules, "modules", root)
    for name, attributes in parts.items():
        module = types.ModuleType(f"modules.{name}")
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        setattr(root, name, module)
    gradio = types.ModuleType("gradio")
    kinds = ("Row", "Accordion", "Dropdown", "Slider", "Textbox", "Button", "Gallery", "Checkbox")
    vars(gradio).update(
        {kind: type(kind, (Component,), {}) for kind in kinds}, Error=ToastError, update=dict
    )
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    fastapi = types.ModuleType("fastapi")
    vars(fastapi).update(FastAPI=object)
    monkeypatch.setitem(sys.modules, "fastapi", fastapi)
    for name in OURS:
        monkeypatch.delitem(sys.modules, f"a1111_dmp.{name}", raising=False)
    ours = {name: importlib.import_module(f"a1111_dmp.{name}") for name in OURS}
    for name in OURS:  # those of this installation go when the test ends
        monkeypatch.setitem(sys.modules, f"a1111_dmp.{name}", ours[name])
    return SimpleNamespace(**ours, modules=root, called=called, pages=pages, networks=networks)
