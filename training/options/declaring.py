"""How options of the trainer are declared: once, for the command line, TOML files and checks."""

from __future__ import annotations

from typing import Any

from pydantic import Field


def option(section: str, default: Any, text: str, **limits: Any) -> Any:
    """A field of the configuration: its heading in `--help`, default, meaning and limits."""
    return Field(default, description=text, json_schema_extra={"section": section}, **limits)
