"""The controls of a script: patches, strengths, curves, and the picture of the gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr
from modules import scripts
from modules.ui_common import create_refresh_button

from a1111_dmp import host, listing
from a1111_dmp.choice import EXAMPLES, ORDER, SLOTS, Choice, by_slot
from a1111_dmp.files import NONE
from a1111_dmp.infotext import from_infotext, label
from dmp_common import PatchError
from dmp_common.errors import unmarked

_FREE = "dmp-free-range"  # javascript/dmp.js lets users type numbers beyond the range of these
_FACTOR = {"minimum": 0.0, "maximum": 2.0, "step": 0.05, "elem_classes": [_FREE]}
_PERCENT = {"minimum": 0.0, "maximum": 1.0, "step": 0.01}
_LABELS = {
    "strength": "Strength",
    "start": "Start percent",
    "end": "End percent",
    "early": "Early",
    "middle": "Middle",
    "late": "Late",
    "keyframes": "Keyframes",
    "site_strengths": "Site strengths",
}
_FACTOR_TIP = "Multiplies the strength {}; straight lines in between. 1, 1, 1 is no curve."
_TIPS = {
    "patch": "A file of models/DMP. A remark behind the name says that it does not fit the model.",
    "strength": "Multiplies what the patch adds. 0 is exactly the plain model, 1 as trained. "
    "Numbers beyond the slider can be typed.",
    "start": "When the patch begins to act, by noise level: 0 is pure noise.",
    "end": "When it stops: 100 is the finished picture.",
    "early": _FACTOR_TIP.format("at the beginning, where the composition forms"),
    "middle": _FACTOR_TIP.format("half-way"),
    "late": _FACTOR_TIP.format("at the end, where details form"),
    "keyframes": "A curve as text, in place of early, middle and late: progress (0 is pure noise, "
    "1 the finished picture), a colon and a factor, with straight lines in between.",
    "site_strengths": "Factors of the strength at single sites (block inputs). Ranges and stars "
    "are allowed; sites that are not named keep 1.",
}
_GROUPS = (
    ("When it acts", True, ("start", "end")),
    ("Curve of the strength", False, ("early", "middle", "late"), ("keyframes",)),
    ("Strength in parts of the model", False, ("site_strengths",)),
)


class Percent(gr.Slider):  # type: ignore[misc]
    """A slider that shows percent in the browser; its value in Python is a fraction.

    So requests, infotexts and the values of a script have one meaning, from 0 to 1.
    """

    webui_do_not_create_gradio_pyi_thank_you = True  # Forge would write a file for this class

    @classmethod
    def of(cls, **options: Any) -> Percent:
        """Makes a slider; the options are those of a slider, in fractions."""
        slider = cls(**options)
        slider.value = options["value"]  # gradio keeps it as the browser has it
        return slider

    def get_block_name(self) -> str:
        return "slider"  # the browser's part is that of a plain slider

    def get_config(self, *args: Any, **options: Any) -> dict[str, Any]:
        config = super().get_config(*args, **options)
        shown = ("value", "minimum", "maximum", "step")
        return {**config, **{name: round(100.0 * config[name], 6) for name in shown}}

    def preprocess(self, *args: Any, **options: Any) -> float | None:
        shown = super().preprocess(*args, **options)
        return None if shown is None else round(shown / 100.0, 6)

    def postprocess(self, *args: Any, **options: Any) -> float:
        return round(100.0 * super().postprocess(*args, **options), 6)


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
        self._made: dict[tuple[int, str], Any] = {}

    def build(self) -> None:
        """Makes the controls of all slots, and the buttons for the picture of the gate."""
        choices = listing.choices()
        for slot in range(SLOTS):
            self._made[slot, "patch"] = gr.Dropdown(
                label=self._label("Patch", slot),
                choices=choices,
                value=NONE,
                elem_id=self._id("patch", slot),
                render=False,
                tooltip=_TIPS["patch"],
            )
        self._slot(0)
        for slot in range(1, SLOTS):
            with gr.Accordion(f"Patch {slot + 1}", open=False, elem_id=self._id("more", slot)):
                self._slot(slot)
        self.all = [self._made[place] for place in ORDER]
        self.fields = [
            (component, Reading(self._prefix, *place))
            for place, component in zip(ORDER, self.all, strict=True)
        ]
        self._gate()

    def _slot(self, slot: int) -> None:
        with gr.Row():
            self._made[slot, "patch"].render()
            if slot == 0:  # one button for the lists of all slots
                create_refresh_button(
                    [self._made[slot, "patch"] for slot in range(SLOTS)],
                    lambda: None,
                    lambda: {"choices": listing.choices()},
                    self._id("refresh", slot),
                )
            self._setting("strength", slot)
        for index, (title, is_open, *rows) in enumerate(_GROUPS):
            name = f"group_{index}"
            with gr.Accordion(title, open=is_open, elem_id=self._id(name, slot)):
                for row in rows:
                    with gr.Row():
                        for field in row:
                            self._setting(field, slot)

    def _setting(self, name: str, slot: int) -> None:
        options = {
            "label": self._label(_LABELS[name], slot),
            "value": getattr(Choice(), name),
            "elem_id": self._id(name, slot),
            "tooltip": _TIPS[name],
        }
        if name in EXAMPLES:
            made = gr.Textbox(placeholder=EXAMPLES[name], **options)
        elif name in ("start", "end"):
            made = Percent.of(**options, **_PERCENT)
        else:
            made = gr.Slider(**options, **_FACTOR)
        self._made[slot, name] = made

    def _gate(self) -> None:
        with gr.Row():
            show = gr.Button("Show what the gate does" + self._suffix, elem_id=self._id("gate", 0))
            close = gr.Button(
                "Close the picture" + self._suffix, visible=False, elem_id=self._id("close", 0)
            )
        # The host opens pictures of a gallery in full size, but no other ones.
        pictures = gr.Gallery(
            label="Gate",
            show_label=False,
            visible=False,
            columns=1,
            preview=True,
            object_fit="contain",
            height=480,
            elem_id=self._id("pictures", 0),
        )
        show.click(fn=draw, inputs=self.all, outputs=[pictures, close])
        close.click(fn=hide, inputs=[], outputs=[pictures, close])

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


def draw(*values: Any) -> tuple[Any, Any]:
    """Draws the heat maps of the chosen patches, or shows a message why it cannot."""
    try:
        pictures = host.heat_maps([Choice.of(own) for own in by_slot(values)])
    except PatchError as error:
        raise gr.Error(unmarked(f"DMP: {error}")) from error  # newer hosts show HTML there
    return gr.update(value=pictures, visible=True), gr.update(visible=True)


def hide() -> tuple[Any, Any]:
    """Takes the heat maps and their button off the page."""
    return gr.update(value=None, visible=False), gr.update(visible=False)
