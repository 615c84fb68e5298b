"""Our page in the host's settings."""

from __future__ import annotations

import gradio as gr
from modules import script_callbacks, shared

from a1111_dmp.files import KEPT

_SECTION = ("dmp", "DMP")


def show_all() -> bool:
    """Returns whether lists and cards show the patches of other bases than the loaded model's."""
    return bool(getattr(shared.opts, "dmp_show_all", True))


def kept() -> int:
    """Returns how many loaded patches stay in memory."""
    return int(getattr(shared.opts, "dmp_kept", KEPT))


def add() -> None:
    """Adds our settings to the host's."""
    settings = {
        "dmp_show_all": shared.OptionInfo(
            True,
            "Show the patches of other bases too, in lists and cards",
            section=_SECTION,
        ).info(
            "otherwise only those that fit the loaded checkpoint; refresh them after changing it"
        ),
        "dmp_kept": shared.OptionInfo(
            KEPT,
            "Patches to keep in memory",
            gr.Slider,
            {"minimum": 1, "maximum": 32, "step": 1},
            section=_SECTION,
        ).info("each takes about 10 MB"),
    }
    for name, setting in settings.items():
        shared.opts.add_option(name, setting)


def register() -> None:
    """Asks the host to call `add` before it makes its settings."""
    script_callbacks.on_ui_settings(add)
