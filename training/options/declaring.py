"""How options of the trainer are declared: once, for the command line, TOML files and checks."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Options(BaseModel):
    """A group of options. Its checks are built when they are first needed: `--help` needs none."""

    model_config = ConfigDict(defer_build=True)


def option(section: str, default: Any, text: str, *, common: bool = False, **limits: Any) -> Any:
    """A field of the configuration.

    Args:
        section: its heading in `--help`.
        default: its value where neither the user nor a recipe or preset gives one.
        text: its meaning, in whole sentences.
        common: whether the short `--help` shows it.
        limits: of pydantic, such as ge=1.
    """
    extra: dict[str, Any] = {"section": section, "common": common}
    return Field(default, description=text, json_schema_extra=extra, **limits)
