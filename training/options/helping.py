"""The help of a command line: the options that most people need, or all of them."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

# In the order in which somebody new meets them.
SECTIONS = (
    "model", "data", "image size", "captions", "patch", "optimisation", "precision and scale",
    "loading", "validation", "previews", "output", "logging", "hub", "objective", "run",
)  # fmt: skip


def sections(options: type[BaseModel]) -> dict[str, list[str]]:
    """The names of options by their heading in `--help`."""
    found: dict[str, list[str]] = {}
    for name, info in options.model_fields.items():
        found.setdefault(section_of(info), []).append(name)
    order = {section: number for number, section in enumerate(SECTIONS)}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))


def section_of(info: FieldInfo) -> str:
    """The heading of an option."""
    return str(_extra(info)["section"])


def is_common(info: FieldInfo) -> bool:
    """Whether the short help shows an option."""
    return bool(_extra(info).get("common"))


def _extra(info: FieldInfo) -> dict[str, Any]:
    assert isinstance(info.json_schema_extra, dict)
    return info.json_schema_extra


def add_options(
    parser: argparse.ArgumentParser,
    options: type[BaseModel],
    names: Iterable[str],
    common: bool = False,
    recipe: Mapping[str, Any] | None = None,
) -> None:
    """Adds options by name to the help of a parser, under their headings.

    Args:
        common: only those that most people need.
        recipe: the values of the paper's recipe, which is the default of most bases.
    """
    wanted = set(names)
    for section, members in sections(options).items():
        infos = {name: options.model_fields[name] for name in members if name in wanted}
        chosen = [name for name, info in infos.items() if is_common(info) or not common]
        if chosen:
            group = parser.add_argument_group(section)
            for name in chosen:
                _add_option(group, name, infos[name], (recipe or {}).get(name))


def _add_option(group: Any, name: str, info: FieldInfo, paper: Any) -> None:
    kinds = get_args(info.annotation) or (info.annotation,)
    default = "" if info.default in (None, "", []) else f" (default: {info.default})"
    if paper is not None and paper != info.default:
        default = f" (default: {paper} in the recipe paper, else {info.default})"
    settings: dict[str, Any] = {"help": f"{info.description}{default}".replace("%", "%%")}
    if info.annotation is bool:
        # Also --no-name, so that a command line can switch off what a TOML file switches on.
        switch = argparse.BooleanOptionalAction
        settings["action"] = "store_true" if name.startswith("no_") else switch
        settings["help"] = str(info.description).replace("%", "%%")
    elif name == "model":
        settings["metavar"] = "LABEL=KIND:PATH"
    elif get_origin(info.annotation) is list:
        settings |= {"nargs": "*", "metavar": "NAME=VALUE"}
    else:
        choices = [c for kind in kinds for c in (get_args(kind) or (kind,)) if _is_choice(c)]
        named = next((kind for kind in kinds if isinstance(kind, type)), str)
        settings |= {"choices": choices} if choices else {"metavar": named.__name__.upper()}
        if name == "output_config":
            settings["nargs"] = "?"
    group.add_argument(f"--{name}", **settings)


def _is_choice(value: object) -> bool:
    return isinstance(value, (str, int)) and not isinstance(value, (type, bool))
