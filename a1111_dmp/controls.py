"""The controls of a script: patches, strengths, curves, and the picture of the gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr
from modules import scripts
from modules.ui_common import create_refresh_button

from a1111_dmp import host, listing
from a1111_dmp.choice import FIELDS, SLOTS, Choice
from a1111_dmp.files import NONE
from a1111_dmp.infotext import from_infotext, label
from dmp_common import PatchError
from dmp_common.errors import unmarked

_FACTOR = {"minimum": -10.0, "maximum": 10.0, "step": 0.01}
_PERCENT = {"minimum": 0.0, "maximum": 1.0, "step": 0.001}
_SLIDERS: dict[str, tuple[str, dict[str, float]]] = {
    "strength": ("Strength", _FACTOR),
    "start": ("Start percent", _PERCENT),
    "end": ("End percent", _PERCENT),
    "early": ("Early", _FACTOR),
    "middle": ("Middle", _FACTOR),
    "late": ("Late", _FACTOR),
}
_HELP = (
    "Start and end: 0 is pure noise, 1 the finished picture. The curve multiplies the strength: "
    "early where the composition forms, late where details form; 1, 1, 1 is no curve."
)


class Controls:
    """The controls of one script in one tab.

    Args:
        script: the script, which gives the elements their ids.
        prefix: begins its keys in an infotext.
        suffix: ends the labels. The host keeps the defaults of controls by script file and label,
            so two scripts of one file must not have the same labels.

    Attributes:
        all: the components, in the order of their values.
        fields: pairs of a component and the function that sets it from an infotext.
    """

    def __init__(self, script: scripts.Script, prefix: str, suffix: str = "") -> None:
        self._script, self._prefix, self._suffix = script, prefix, suffix
        self.all: list[Any] = []
        self.fields: list[tuple[Any, Any]] = []
        self._patches: list[Any] = []

    def build(self) -> None:
        """Makes the controls of all slots, and the button that draws the heat map."""
        choices = listing.choices()
        self._patches = [
            gr.Dropdown(
                label=self._label("Patch", slot),
                choices=choices,
                value=NONE,
                elem_id=self._id("patch", slot),
                render=False,
            )
            for slot in range(SLOTS)
        ]
        for slot in range(SLOTS):
            if slot == 0:
                self._slot(slot)
            else:
                with gr.Accordion(f"Patch {slot + 1}", open=False, elem_id=self._id("more", slot)):
                    self._slot(slot)
        gr.HTML(f"<p>{_HELP}</p>")
        text = "Show what the gate does" + self._suffix
        button = gr.Button(text, elem_id=self._id("gate", 0))
        picture = gr.Image(
            label="Gate",
            show_label=False,
            visible=False,
            elem_id=self._id("picture", 0),
            interactive=False,
        )
        button.click(fn=draw, inputs=self.all, outputs=[picture])

    def _slot(self, slot: int) -> None:
        patch = self._patches[slot]
        with gr.Row():
            patch.render()
            if slot == 0:  # one button for the lists of all slots
                create_refresh_button(
                    self._patches,
                    lambda: None,
                    lambda: {"choices": listing.choices()},
                    self._id("refresh", slot),
                )
            strength = self._slider("strength", slot)
        with gr.Row():
            ends = [self._slider(name, slot) for name in ("start", "end")]
        with gr.Row():
            curve = [self._slider(name, slot) for name in ("early", "middle", "late")]
        values = [patch, strength, *ends, *curve]
        self.all += values
        for name, component in zip(FIELDS, values, strict=True):
            self.fields.append((component, Reading(self._prefix, slot, name)))

    def _slider(self, name: str, slot: int) -> Any:
        text, limits = _SLIDERS[name]
        value = getattr(Choice(), name)
        elem_id = self._id(name, slot)
        return gr.Slider(label=self._label(text, slot), value=value, elem_id=elem_id, **limits)

    def _label(self, text: str, slot: int) -> str:
        return f"{text} {slot + 1}{self._suffix}"

    def _id(self, name: str, slot: int) -> str:
        return str(self._script.elem_id(f"{name}_{slot + 1}"))


def _used(prefix: str, texts: dict[str, Any]) -> bool:
    """Tells whether an infotext has a patch for any of these controls."""
    return any(label(prefix, "patch", slot) in texts for slot in range(SLOTS))


@dataclass(frozen=True)
class Switch:
    """Reads from an infotext whether the accordion is on; see `Reading`."""

    prefix: str

    def __call__(self, texts: dict[str, Any]) -> bool:
        return _used(self.prefix, texts)


@dataclass(frozen=True)
class Reading:
    """Reads the value of a control from an infotext.

    "Send to img2img" copies each control of one tab to the control of the other tab whose reading
    is equal, so readings are compared by what they read. Functions would be equal to nothing.
    """

    prefix: str
    slot: int
    name: str

    def __call__(self, texts: dict[str, Any]) -> Any:
        if not _used(self.prefix, texts):
            return None  # The switch goes off; the user's own settings stay as they are.
        try:
            return from_infotext(texts, self.prefix, self.slot, self.name, host.folder())
        except PatchError as error:
            raise PatchError(f"{label(self.prefix, self.name, self.slot)}: {error}") from error


def draw(*values: Any) -> Any:
    """Draws the heat map of the chosen patches, or shows a message why it cannot."""
    size = len(FIELDS)
    try:
        slots = [Choice.of(values[n * size : (n + 1) * size]) for n in range(SLOTS)]
        return gr.update(value=host.heat_map(slots), visible=True)
    except PatchError as error:
        raise gr.Error(unmarked(f"DMP: {error}")) from error  # newer hosts show HTML there
